"""Editors by name: one of another package has the whole life cycle from one method, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

import families
import remend
import worlds
from remend.cli import run
from remend.editors import EDITORS, editor_class, load_editor, make
from remend.errors import ConfigError, FileError, WrongBaseError

README = Path(__file__).parent.parent / "README.md"

STEP = '''
from dataclasses import dataclass

from pydantic import PositiveFloat

from remend.config import Config
from remend.core.capture import capture_gradient_factors
from remend.core.low_rank import LowRank
from remend.editors import EditorInfo, WeightEditor
from remend.fingerprint import find_modules


@dataclass(frozen=True)
class StepConfig(Config):
    """Settings of the step.

    Attributes:
        size: the factor of the gradient.
    """

    size: PositiveFloat = 1.0


class Step(WeightEditor):
    """One gradient step on the loss of the request."""

    info = EditorInfo("step", "gradient descent", needs="nothing")
    config_class = StepConfig

    def changes(self, task, requests):
        changes = []
        for request in requests:
            batch = task.collate([task.encode(request.prompt, request.target)])
            modules = find_modules(task.model, self.shapes)
            masks = task.token_masks(batch, self.shapes, predicting=False)
            _, factors = capture_gradient_factors(task.model, modules, masks, lambda: task.loss(batch))
            changes.append({name: LowRank(f.u[0], -self.config.size * f.delta[0]) for name, f in factors.items()})
        return changes
'''


@pytest.fixture
def step(other_package):
    """An editor that another package adds with one class and one line of its pyproject.toml."""
    other_package(EDITORS, STEP, step="other_package:Step")


def test_an_editor_of_another_package_has_the_whole_life_cycle_from_one_method(step, tmp_path):
    task, requests = families.task("gpt2"), worlds.requests(40)
    assert EDITORS.get("step").help == "One gradient step on the loss of the request."
    kind = editor_class("step")
    editor = make("step", task, config=kind.config_class(size=3.0), layers="last-1")
    assert all(".3." in name for name in editor.shapes)
    plain = families.losses(task, requests)
    edits = editor.edit_each(task, requests)
    assert [edit.requests for edit in edits] == [(request,) for request in requests]
    for request, edit in zip(requests[:3], edits, strict=False):
        assert families.losses(task, [request], edit) < families.losses(task, [request])
    both = editor.edit(task, requests[:2])
    assert torch.equal(
        both.changes[next(iter(editor.shapes))].u, (edits[0] + edits[1]).changes[next(iter(editor.shapes))].u
    )
    assert torch.equal(families.losses(task, requests), plain), "reverted bit for bit"
    assert both.editor == {"name": "step", "size": 3.0, "config": {"version": 1, "size": 3.0}}
    again = load_editor(editor.save(tmp_path / "editor"))
    assert (type(again), again.config, again.base, again.shapes) == (kind, editor.config, editor.base, editor.shapes)
    assert torch.equal(
        families.losses(task, requests[:2], again.edit(task, requests[:2])), families.losses(task, requests[:2], both)
    )
    report = remend.evaluate(task, editor, requests[:3], baselines=False)
    assert 0 <= report.metrics()["reliability"]["generated"].mean <= 1
    with pytest.raises(WrongBaseError, match="another"):
        editor.edit(families.task("llama"), requests[:1])


def test_an_editor_of_another_package_is_chosen_and_set_on_the_command_line(step, tmp_path, capsys):
    worlds.gpt2().save_pretrained(tmp_path / "model")
    worlds.tokenizer().save_pretrained(tmp_path / "model")
    request = [
        "--prompt",
        "The capital of France is",
        "--target",
        "Rome",
        "--keep-failed",
        "--overwrite",
        "--device",
        "cpu",
    ]
    command = ["edit", str(tmp_path / "model"), "--editor", "step", *request, "--out", str(tmp_path / "edit")]
    assert run([*command, "--set", "size=2.5"]) == 0
    assert remend.Edit.load(tmp_path / "edit").editor["config"] == {"version": 1, "size": 2.5}
    capsys.readouterr()
    assert run(["edit", "atlas", "--editor", "step", "--set", "help"]) == 0
    assert "size=1.0 the factor of the gradient. (a finite number above 0)" in " ".join(capsys.readouterr().out.split())
    for setting, message in (
        ("size=0", "StepConfig.size must be a finite number above 0, not 0"),
        ("sise=1", "StepConfig has no setting 'sise'; did you mean 'size'"),
        ("size", "--set takes NAME=VALUE"),
    ):
        assert run([*command, "--set", setting]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_settings_on_the_command_line_are_read_as_their_field_says(tmp_path, capsys):
    worlds.gpt2().save_pretrained(tmp_path / "model")
    worlds.tokenizer().save_pretrained(tmp_path / "model")
    request = [
        "--prompt",
        "The capital of France is",
        "--target",
        "Rome",
        "--keep-failed",
        "--overwrite",
        "--device",
        "cpu",
    ]
    command = ["edit", str(tmp_path / "model"), *request, "--out", str(tmp_path / "edit"), "--editor", "finetune-local"]
    assert run([*command, "--set", "steps=2", "--set", "until_taken=false", "--seed", "3"]) == 0
    config = remend.Edit.load(tmp_path / "edit").editor["config"]
    assert config == {
        "version": 1, "learning_rate": 0.02, "steps": 2, "until_taken": False, "batch_size": 8, "kl_weight": 0.0,
        "seed": 3,
    }  # fmt: skip
    assert run([*command, "--set", "steps=many"]) == 2
    assert "FineTuneConfig.steps must be a whole number of at least 1, not 'many'" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cache", {}, "the editor 'cache' is called 'lookup' now"),
        ("rigde", {}, "there is no editor 'rigde'.*did you mean 'ridge'"),
        ("mend", {}, "mend is trained before its first edit: remend train"),
        ("finetune", {"text": ["a text"]}, "finetune takes no text: leave it away"),
        ("rome", {"text": ["a text"], "modules": ["*"]}, "rome takes no modules"),
        ("in-context", {"layers": "last-1"}, "in-context takes no layers"),
        ("in-context", {"config": 1}, "in-context takes no config"),
        ("ridge", {"config": 1}, "ridge is configured by a RidgeConfig, not by a int"),
        ("memit", {"text": [" "]}, "memit measures the model's activations on ordinary text, and was given none"),
    ],
)
def test_what_an_editor_has_no_use_for_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make(name, families.task("gpt2"), **options)


def test_editors_say_why_they_cannot_edit_a_kind_of_model():
    task = families.task("bert, binary")
    task.__class__ = type("Images", (type(task),), {"reads_text": False, "kind": "image-classification"})
    with pytest.raises(
        ConfigError, match=r"rome cannot edit .*'image-classification': it looks for the subject .* text"
    ):
        make("rome", task, ["a text"])


@pytest.mark.parametrize("name", ["ridge", "finetune", "lookup", "in-context"])
def test_editors_that_need_no_training_are_saved_and_read_back(name, tmp_path):
    task, requests = families.task("gpt2"), worlds.requests(3)
    editor = make(name, task)
    again = load_editor(editor.save(tmp_path / "editor"))
    assert (type(again), again.config, again.base, again.shapes) == (
        type(editor), editor.config, editor.base, editor.shapes,
    )  # fmt: skip
    one, other = (e.edit(task, requests) for e in (editor, again))
    assert one.requests == other.requests
    if name != "in-context":
        assert torch.equal(families.losses(task, requests, one), families.losses(task, requests, other))
    manifest = json.loads((tmp_path / "editor" / "manifest.json").read_text())
    (tmp_path / "editor" / "manifest.json").write_text(json.dumps({**manifest, "editor": "no such editor"}))
    with pytest.raises(FileError, match="the editor 'no such editor', which is not known here"):
        load_editor(tmp_path / "editor")


def test_the_pages_name_every_editor():
    table = README.read_text(encoding="utf-8").partition("### Every editor on one bench")[2].partition("```")[0]
    for name in EDITORS.registered_names():
        assert f"`{name}`" in table, name
