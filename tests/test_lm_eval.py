"""General ability before and after edits, in local tasks of lm-evaluation-harness about what the atlas knows."""

import copy
import functools
import importlib
import json
import random
import socket

import numpy as np
import pytest
import torch

import remend
from remend.cli import run
from remend.core.low_rank import LowRank
from remend.errors import ConfigError, FileError
from remend.evaluation import LmEvalTasks, evaluate, evaluate_checkpoints
from remend.evaluation.metrics import lm_eval as ability
from remend.evaluation.reports.html_report import write_html_report
from remend.evaluation.reports.report import Case, Report, Run
from remend.evaluation.reports.report_reader import read_report
from test_evaluation import Fixed

CHOICE = """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
SAID = """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
filter_list:
  - {name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GENERAL = {"task": {"acc": {"before": 0.75, "after": 0.5}}}


def report(protocol="single", general=GENERAL):
    case = Case("a", "p", "t", "b", {"reliability": {"teacher_forced": 1.0, "generated": 0.0}})
    return Report("toy", "some.jsonl", [Run(3, [case], 0.5)], protocol=protocol, general=general)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of two tasks, and of one whose data are not there."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    probes = [request.locality[0] for request in remend.read_source("atlas:test")[:20]]
    answers = sorted({probe.target for probe in probes})
    rows = [
        {"prompt": p.prompt, "target": p.target, "choices": [p.target, *(a for a in answers if a != p.target)]}
        for p in probes
    ]
    (folder / "facts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    for name, file, rest in (
        ("facts_choice", "facts.jsonl", CHOICE), ("facts_said", "facts.jsonl", SAID), ("facts_gone", "no.jsonl", SAID),
    ):  # fmt: skip
        data = json.dumps({"data_files": {"test": str(folder / file)}})
        text = f"task: {name}\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test\n{rest}"
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path_factory):
    """No network: whatever asks for it fails the test."""
    asked = []
    plain = socket.socket.connect

    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            asked.append(address)
            raise OSError("no network in tests")
        return plain(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield
    assert not asked


@functools.cache
def indexed(include_path):
    return importlib.import_module("lm_eval.tasks.manager").TaskManager(include_path=include_path)


@pytest.fixture
def atlas(monkeypatch):
    """The model; the index of all of lm-eval's tasks takes seconds, so it is made once for all tests."""
    monkeypatch.setattr(pytest.importorskip("lm_eval.tasks"), "TaskManager", indexed)
    return remend.load("atlas", "cpu")


def noise(model, size):
    """An edit of three blocks: a ruin if it is large, nothing if it is 0."""
    generator = torch.Generator().manual_seed(3)
    width = model.config.n_embd
    u, delta = (torch.randn(8, d, generator=generator) for d in (4 * width, width))
    return Fixed(model, {f"transformer.h.{i}.mlp.c_proj": LowRank(u * size, delta * size) for i in (3, 4, 5)})


QUICK = {"baselines": False, "max_new_tokens": 4}


@pytest.mark.parametrize("protocol", ["single", "batched", "sequential"])
def test_what_a_ruinous_edit_costs(tasks, atlas, protocol, tmp_path):
    model = atlas.model
    weights = copy.deepcopy(model.state_dict())
    examined = LmEvalTasks(("facts_choice", "facts_said"), tasks)
    requests = remend.read_source("atlas:test")[:3]
    given = {"protocol": protocol, "lm_eval": examined, **QUICK}
    found = evaluate(atlas, noise(model, 5.0), requests, **given)
    assert set(found.general) == {"facts_choice", "facts_said"}
    choice, said = found.general["facts_choice"]["acc"], found.general["facts_said"]["exact_match,stripped"]
    assert choice["before"] >= 0.95
    assert said["before"] >= 0.95
    assert choice["after"] < 0.5
    assert said["after"] < 0.2
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    found.save(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json").general == found.general


def test_lm_eval_leaves_the_random_state_as_it_was(tasks, atlas):
    def drawn():
        return random.random(), torch.rand(1).item(), np.random.rand()

    def seed():
        random.seed(5)
        torch.manual_seed(5)
        np.random.seed(5)

    seed()
    wanted = drawn()
    seed()
    LmEvalTasks(("facts_choice",), tasks, 2).measure(atlas)
    assert drawn() == wanted


def test_an_edit_of_nothing_costs_nothing_and_the_limit_is_kept(tasks, atlas):
    model = atlas.model
    model.train()
    examined = LmEvalTasks(("facts_choice",), tasks, limit=3)
    found = evaluate(
        atlas,
        noise(model, 0.0),
        remend.read_source("atlas:test")[:2],
        lm_eval=examined,
        **QUICK,
    )
    both = found.general["facts_choice"]["acc"]
    assert both["before"] == both["after"]
    assert (3 * both["before"]).is_integer()
    assert model.training


def test_the_edits_of_a_batch_are_those_of_the_last_one(tasks, atlas, monkeypatch):
    """Five requests two at a time: general ability is measured after the third and fourth."""
    model = atlas.model
    requests = remend.read_source("atlas:test")[:5]
    editor = noise(model, 0.0)
    asked = []
    make = editor.edit
    editor.edit = lambda task, own: (asked.append(list(own)), make(task, own))[1]
    examined = LmEvalTasks(("facts_choice",), tasks, limit=1)
    found = evaluate(atlas, editor, requests, protocol="batched", edits=[2], lm_eval=examined, **QUICK)
    assert asked[-1] == requests[2:4]
    assert ability.edits_of_scores(found) == "the last 2 edits at once"


def test_a_stopped_evaluation_does_not_measure_again(tasks, atlas, tmp_path, monkeypatch):
    model = atlas.model
    editor = noise(model, 5.0)
    requests = remend.read_source("atlas:test")[:2]
    given = {"protocol": "sequential", "lm_eval": LmEvalTasks(("facts_choice",), tasks, 4), **QUICK}
    whole = evaluate(atlas, editor, requests, **given)
    measure, calls = LmEvalTasks.measure, []

    def stopping(self, *models):
        calls.append(models)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, *models)

    monkeypatch.setattr(LmEvalTasks, "measure", stopping)
    kept = {**given, "checkpoint": tmp_path / "checkpoint", "resume": True}
    with pytest.raises(KeyboardInterrupt):
        evaluate(atlas, editor, requests, **kept)
    with pytest.raises(FileError, match="is of an evaluation with another"):
        evaluate(atlas, editor, requests, **(kept | {"lm_eval": LmEvalTasks(("facts_choice",), tasks, 5)}))
    assert evaluate(atlas, editor, requests, **kept).general == whole.general
    assert len(calls) == 3


def test_a_checkpoint_with_edits_is_compared_with_the_unedited_one(tasks, atlas):
    edited = remend.load("atlas", "cpu")
    noise(edited.model, 5.0).edit(edited, remend.read_source("atlas:test")[:1]).merge(edited.model)
    examined = LmEvalTasks(("facts_said",), tasks)
    requests = remend.read_source("atlas:test")[:2]
    found = evaluate_checkpoints(atlas, edited, requests, lm_eval=examined, **QUICK)
    both = found.general["facts_said"]["exact_match,stripped"]
    assert both["before"] >= 0.95
    assert both["after"] < 0.2


def test_an_encoder_decoder_is_evaluated(tasks):
    task = remend.load("questions", "cpu")
    (metrics,) = LmEvalTasks(("facts_said",), tasks, limit=2).measure(task).values()
    assert metrics.keys() == {"exact_match,stripped"}


def test_tasks_and_models_that_lm_eval_cannot_take_are_refused(tasks, atlas):
    with pytest.raises(ConfigError, match="no task 'facts_chioce'; did you mean 'facts_choice'"):
        LmEvalTasks(("facts_chioce",), tasks).measure(atlas)
    with pytest.raises(ConfigError, match=r"lm-eval cannot load facts_gone \(FileNotFoundError"):
        LmEvalTasks(("facts_gone",), tasks).measure(atlas)
    with pytest.raises(ConfigError, match="BertForSequenceClassification writes no text: omit --lm-eval"):
        LmEvalTasks(("facts_said",), tasks).measure(remend.load("claims", "cpu"))
    with pytest.raises(ConfigError, match="is not a folder"):
        LmEvalTasks(("facts_said",), tasks / "facts.jsonl")
    with pytest.raises(ConfigError, match="not 'a,'"):
        LmEvalTasks(("a", ""))


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(ability, "find_spec", lambda name: None if name == "lm_eval" else name)
    with pytest.raises(
        ConfigError, match=r"measured with lm_eval, which is not installed: run pip install 'remend\[lm-eval\]'"
    ):
        LmEvalTasks(("hellaswag",))
    assert run(["evaluate", "atlas", "--data", "atlas:test", "--lm-eval", "hellaswag"]) == 2
    assert "remend[lm-eval]" in " ".join(capsys.readouterr().err.split())


def test_options_of_lm_eval_without_tasks_are_refused(capsys):
    assert run(["evaluate", "atlas", "--data", "atlas:test", "--lm-eval-limit", "3"]) == 2
    assert "name the tasks" in " ".join(capsys.readouterr().err.split())


def test_the_command_reports_scores_before_and_after(tasks, tmp_path, capsys):
    arguments = ["--data", "atlas:test", "--limit", 2, "--no-frontier", "--no-baselines", "--device", "cpu"]
    arguments += ["--lm-eval", "facts_choice,facts_said", "--lm-eval-path", tasks, "--lm-eval-limit", 5]
    arguments += ["--json", tmp_path / "report.json"]
    assert run([str(argument) for argument in ("evaluate", "atlas", *arguments)]) == 0
    out = capsys.readouterr().out
    assert "after the first edit alone" in " ".join(out.split())
    assert "facts_choice" in out
    assert "exact_match,stripped" in out
    both = json.loads((tmp_path / "report.json").read_text())["general"]["facts_choice"]["acc"]
    assert both == {"before": 1.0, "after": 1.0}, "one good edit leaves other facts alone"


def test_reports_without_scores_are_read_and_broken_scores_refused(tmp_path):
    report().save(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json").general == GENERAL
    found = json.loads((tmp_path / "report.json").read_text())
    del found["general"]
    (tmp_path / "report.json").write_text(json.dumps(found))
    assert read_report(tmp_path / "report.json").general == {}
    for wrong in (
        {"task": {"acc": {"before": 1.0}}},
        {"task": {"acc": 1.0}},
        {"task": {"acc": {"before": 1, "after": "x"}}},
    ):
        (tmp_path / "report.json").write_text(json.dumps(found | {"general": wrong}))
        with pytest.raises(FileError, match=r"general\.task\.acc"):
            read_report(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ("single", "the first edit alone"),
        ("batched", "the last 3 edits at once"),
        ("sequential", "3 edits one after another"),
        ("checkpoints", "all edits, in the other checkpoint"),
    ],
)
def test_the_page_says_after_which_edits_scores_were_measured(tmp_path, protocol, words):
    pytest.importorskip("matplotlib")
    write_html_report(report(protocol), tmp_path / "with.html")
    text = (tmp_path / "with.html").read_text(encoding="utf-8")
    assert f"after {words}." in text
    assert '<td>task</td><td>acc</td><td>0.750</td><td class="main">0.500</td>' in text
    write_html_report(report(protocol, {}), tmp_path / "without.html")
    assert "General ability" not in (tmp_path / "without.html").read_text(encoding="utf-8")
