"""What editors measure is kept on disk: read by the next run, per model and settings, checked, and bounded."""

import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch

import families
import worlds
from remend import disk_cache
from remend.cli import run
from remend.editors import make, make_or_load
from remend.editors.locate_then_edit.base import LocateThenEdit
from remend.editors.locate_then_edit.fit import FitConfig
from remend.editors.ridge import Ridge, RidgeConfig
from remend.registries import EDITORS
from remend.tasks import wrap
from remend.tasks.causal_lm import CausalLM
from remend.tasks.kept_texts import sampled_or_kept

TEXT = [f"The capital of {country} is {city}" for country in worlds.COUNTRIES for city in worlds.CITIES]
MEASURING = [name for name in EDITORS.registered_names() if "text" in EDITORS.load(name).info.options]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of an empty cache."""
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def task():
    return families.task("llama")


def entries(folder):
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else []


def said(task, name="fit", **arguments):
    """What is announced: ``measured once`` or ``measured before``, and the editor."""
    messages = []
    editor = make_or_load(name, task, announce=messages.append, **{"text": TEXT, **arguments})
    (message,) = messages
    return message.partition(",")[0].partition(" and")[0], editor


@pytest.mark.parametrize("name", MEASURING)
def test_the_second_editor_is_read_and_makes_the_same_edit(name, cache, task):
    requests = families.requests("llama", 2)
    first, second = said(task, name), said(task, name)
    assert (first[0], second[0]) == ("measured once", "measured before")
    tensors, others = (editor.saved_tensors() for editor in (first[1], second[1]))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[key].cpu(), others[key].cpu()) for key in tensors)
    if name != "lookup":
        one, other = (editor.edit(task, requests).changes for editor in (first[1], second[1]))
        assert all(torch.equal(change.u, other[matrix].u) for matrix, change in one.items())


def test_whatever_statistics_depend_on_has_an_entry_of_its_own(cache, task):
    said(task)
    others = [
        {"text": TEXT[:40]},
        {"text": ()},
        {"seed": 1},
        {"layers": "0"},
        {"config": FitConfig(beginnings=1)},
        {"config": FitConfig(kind="low-rank")},
        {"name": "ridge"},
    ]
    for arguments in others:
        assert said(task, **arguments)[0] == "measured once", arguments
    with torch.no_grad():
        task.model.lm_head.weight[0, 0] += 1e-3
    assert said(task)[0] == "measured once", "other weights"
    assert said(families.task("llama", torch.bfloat16))[0] == "measured once", "another dtype"
    assert len(entries(cache)) == len(others) + 3


def test_another_tokenizer_has_an_entry_of_its_own(cache, task):
    said(task)
    task.processor(["a", "a a"], padding=True)  # how it padded last is kept in a tokenizer
    assert said(task)[0] == "measured before"
    tokenizer = copy.deepcopy(task.processor)
    tokenizer.add_special_tokens({"bos_token": "."})
    assert said(wrap(task.model, tokenizer))[0] == "measured once"


def test_settings_that_statistics_do_not_depend_on_share_an_entry(cache, task):
    said(task)
    message, editor = said(task, config=FitConfig(steps=3, threshold=0.5))
    assert (message, editor.config.steps, editor.config.threshold) == ("measured before", 3, 0.5)


@pytest.mark.parametrize("name", MEASURING)
def test_statistics_depend_on_no_other_settings(name, task):
    kind = EDITORS.load(name)
    if kind.measured_settings is None:
        return
    read = set()

    class Recording:
        def __getattr__(self, setting):
            read.add(setting)
            return getattr(kind.default_config(), setting)

    config = kind.default_config()
    editor = kind(config, make(name, task, TEXT).base, make(name, task, TEXT).shapes)
    editor.config = Recording()
    editor.prepare(task, TEXT, 0)
    assert read
    assert read <= set(kind.measured_settings)


@pytest.mark.parametrize("file", ["manifest.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_a_damaged_entry_is_measured_again(file, damage, cache, task):
    said(task)
    (entry,) = entries(cache)
    content = (entry / file).read_bytes()
    if damage == "missing":
        (entry / file).unlink()
    else:
        middle = len(content) // 2
        (entry / file).write_bytes(content[:middle] + (b"" if damage == "cut" else b"\xff" + content[middle + 1 :]))
    with pytest.warns(UserWarning, match="cannot be used and is measured again"):
        assert said(task)[0] == "measured once"
    assert said(task)[0] == "measured before"
    assert entries(cache) == [entry]


def test_the_entry_of_another_model_is_not_taken(cache, task):
    said(task)
    (entry,) = entries(cache)
    with torch.no_grad():
        task.model.model.layers[1].mlp.down_proj.weight.mul_(2)
    said(task)
    (other,) = set(entries(cache)) - {entry}
    shutil.rmtree(other)
    shutil.copytree(entry, other)
    with pytest.warns(UserWarning, match="holds an editor of another model"):
        assert said(task)[0] == "measured once"


def test_processes_at_once_leave_one_entry(cache):
    code = "import test_kept_statistics as t, families; t.said(families.task('llama'))"
    python = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(python, env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(entries(cache)) == 1
    assert said(families.task("llama"))[0] == "measured before"


def test_the_least_used_are_removed(cache, task, monkeypatch):
    for seed in range(3):
        said(task, seed=seed)
    size = sum(file.stat().st_size for file in entries(cache)[0].iterdir())
    (cache / "notes").mkdir()  # somebody else's
    by_age = sorted(entries(cache)[:3], key=lambda entry: entry.name)
    for age, entry in enumerate(by_age):
        os.utime(entry / "manifest.json", (1e9 - age, 1e9 - age))
    monkeypatch.setattr(disk_cache, "MAX_BYTES", int(2.5 * size))
    said(task, seed=3)
    left = set(entries(cache))
    assert len(left) == 3
    assert {by_age[0], cache / "notes"} < left
    monkeypatch.setattr(disk_cache, "MAX_BYTES", size // 2)
    said(task, seed=4)
    assert entries(cache) == [cache / "notes"], "not even the newest, if it is too large"


def test_an_entry_that_was_used_counts_as_new(cache, task):
    said(task)
    (entry,) = entries(cache)
    os.utime(entry / "manifest.json", (1e9, 1e9))
    said(task)
    assert (entry / "manifest.json").stat().st_mtime > 1e9


def test_where_nothing_can_be_written_it_is_measured_and_a_warning_says_so(tmp_path, monkeypatch, task):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="REMEND_CACHE can name another folder, or be off"):
        assert said(task)[0] == "measured once"


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"REMEND_CACHE": "off"}, None),
        ({"REMEND_CACHE": "/somewhere"}, "/somewhere"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/remend"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.cache/remend"),
        ({"HOME": "/home/me"}, "/home/me/.cache/remend"),
    ],
)
def test_the_folder(variables, folder, monkeypatch):
    for name in ("REMEND_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = disk_cache.cache_folder()
    assert (found and str(found)) == folder


def test_the_second_command_measures_nothing(cache, tmp_path, capsys, monkeypatch):
    worlds.llama().save_pretrained(tmp_path / "model")
    worlds.tokenizer().save_pretrained(tmp_path / "model")
    edit = ["edit", str(tmp_path / "model"), "--prompt", "The capital of Peru is", "--target", "Rome"]
    edit += ["--keep-failed", "--overwrite", "--out", str(tmp_path / "edit")]
    run(edit)
    assert f"measured once and kept in {cache}" in capsys.readouterr().err
    assert len(entries(cache)) == 2, "the statistics, and other texts that the model writes, to measure the edit on"
    monkeypatch.setattr(LocateThenEdit, "prepare", None)
    monkeypatch.setattr(CausalLM, "ordinary_examples", None)
    run(edit)
    assert f"measured before, read from {cache}" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("REMEND_CACHE", "off")
    run(edit)
    assert "for this run alone" in capsys.readouterr().err


def test_what_the_model_writes_is_kept(cache, task):
    first = sampled_or_kept(task, 3, 5)
    assert first == task.ordinary_examples((), 3, 5)
    assert sampled_or_kept(task, 3, 5) == first
    assert len(entries(cache)) == 1
    assert sampled_or_kept(task, 4, 5) != first
    for entry in entries(cache):
        (entry / "tensors.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="measured again"):
        assert sampled_or_kept(task, 3, 5) == first


def test_what_reads_no_text_is_not_kept(cache):
    from test_default_editor import policy

    assert isinstance(make_or_load("ridge", policy(), config=RidgeConfig()), Ridge)
    assert entries(cache) == []
