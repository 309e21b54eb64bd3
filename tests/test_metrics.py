"""Metrics: one that another package adds, and those of models whose outputs are no text."""

import json
import math

import pytest
import torch
from rich.console import Console

import scripted
from remend.cli.report_tables import print_report
from remend.core.low_rank import LowRank
from remend.edit import Edit
from remend.errors import RegistryError
from remend.evaluation import evaluate
from remend.evaluation.metrics.edit_outcome import PromptScore
from remend.evaluation.reports.comparison import compare
from remend.evaluation.reports.html_report import write_html_report
from remend.evaluation.reports.metric_titles import find_metric, higher_is_better, title_of
from remend.evaluation.robustness import measure_robustness
from remend.fingerprint import ModelFingerprint
from remend.registries import METRICS
from remend.request import EditRequest, Probe
from remend.tasks import wrap
from remend.tasks.policy import DiscreteActions, GaussianActions, Observation

REQUESTS = (
    EditRequest(prompt="capital of A is", target="red", id=0, paraphrases=("A is",)),
    EditRequest(prompt="capital of B is", target="blue", id=1),
)
SCRIPT = {
    "capital of A is": lambda edits: "red and red" if 0 in edits else "blue",
    "capital of B is": "green",
    "A is": "red",
}
WORDS = ("capital", "of", "is", "A", "B", "red", "blue", "green", "and")


def answer_length(outcome):
    """Score the prompt, and each paraphrase as a kind, by the words of the answer."""
    for kind, prompts in (("", [outcome.request.prompt]), ("paraphrased", outcome.request.paraphrases)):
        for prompt in prompts:
            if (answer := outcome.answer(prompt)) is not None:
                yield PromptScore({"words": len(outcome.task.decode(answer).split())}, kind)


@pytest.fixture
def registered():
    details = {"title": "length of the answer", "higher_is_better": False, "modes": ("words",), "headline": True}
    METRICS.register("answer_length", answer_length, "words of the free answer", **details)
    yield
    METRICS.unregister("answer_length")


def test_a_metric_of_another_package_is_in_the_report_its_tables_and_its_page(registered, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report = evaluate(scripted.model(SCRIPT, WORDS), scripted.Numbered(), REQUESTS, name="numbered")
    report.save(tmp_path / "report.json")
    metrics = json.loads((tmp_path / "report.json").read_text())["runs"][0]["metrics"]
    assert metrics["answer_length"]["words"] == {"mean": 1.5, "ci95": [1.0, 2.0], "n": 2}
    assert metrics["answer_length_paraphrased"]["words"]["n"] == 1
    print_report(report, Console(width=200))
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    (row,) = [[cell.strip() for cell in line if cell] for line in lines if "length of the answer" in " ".join(line)]
    assert row[:3] == ["length of the answer", "1.500", "1.000–2.000"]
    write_html_report(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>length of the answer<small>words of the free answer</small></td>" in page
    column = {"name": "answer_length", "title": "length of the answer", "higher_is_better": False}
    columns = json.loads(page.partition('id="metric-columns">')[2].partition("</script>")[0])
    assert column in columns


def test_a_difference_is_better_in_the_direction_of_its_metric(registered):
    class Idle(scripted.Numbered):
        def edit(self, task, requests):
            return super().edit(task, requests).scaled(0.0)

    task = scripted.model(SCRIPT, WORDS)
    edited, idle = (evaluate(task, editor, REQUESTS[:1]) for editor in (scripted.Numbered(), Idle()))
    differences = {(own.metric, own.mode): own for own in compare(edited, idle)}
    assert differences["answer_length", "words"].better, "the idle editor's answer is shorter"
    assert differences["reliability", "teacher_forced"].better is False


def test_a_mode_that_the_registry_does_not_list_is_refused():
    METRICS.register("odd", lambda outcome: [PromptScore({"valeu": 1.0})], "a metric")
    try:
        with pytest.raises(RegistryError, match=r"'odd' gives a value of the mode 'valeu'.*did you mean 'value'"):
            evaluate(scripted.model(SCRIPT, WORDS), scripted.Numbered(), REQUESTS)
    finally:
        METRICS.unregister("odd")


def test_names_in_reports_are_a_metric_and_a_kind():
    metric, kind = find_metric("locality_near_same_object")
    assert (metric.name, kind) == ("locality_near", "same_object")
    assert find_metric("generality_unseen")[0].name == "generality_unseen"
    assert find_metric("unheard_of") == (None, "")
    assert title_of("locality_near_same_object") == "locality near same object"
    assert (higher_is_better("kl_far"), higher_is_better("reliability"), higher_is_better("unheard_of")) == (
        False, True, None,
    )  # fmt: skip


class Identity(torch.nn.Module):
    """A policy of one linear layer that returns what it observes."""

    def __init__(self, size):
        super().__init__()
        self.layer = torch.nn.Linear(size, size, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(size))

    def forward(self, observation):
        return self.layer(observation)


class Shift:
    """Makes an edit of the policy that adds ``delta`` to its outputs where the first observed value is 1."""

    def __init__(self, delta):
        self.delta = torch.tensor([delta])

    def edit_each(self, task, requests):
        u = torch.zeros_like(self.delta)
        u[0, 0] = 1.0
        changes = {"layer": LowRank(u, self.delta)}
        return [Edit(changes, ModelFingerprint.of(task.model, changes), (request,)) for request in requests]

    def edit(self, task, requests):
        return self.edit_each(task, requests[:1])[0]


def test_actions_of_numbers_are_compared_within_their_tolerance():
    """The edit moves the action at the prompt from 1 to 0.5, at the near probe by .04, at one of the far ones by .5."""
    std = -1.0
    task = wrap(Identity(2), GaussianActions(2, 2, (std, std), tolerance=0.05))
    request = EditRequest(
        prompt=Observation((1.0, 0.0)), target="0.5, 0",
        near=(Probe(prompt=Observation((0.08, 0.3)), target="0.08, 0.3"),),
        locality=(Probe(prompt=Observation((0.0, 1.0)), target="0, 1"),
                  Probe(prompt=Observation((-1.0, 0.0)), target="-1, 0")),
    )  # fmt: skip
    report = evaluate(task, Shift([-0.5, 0.0]), [request])
    values = report.cases[0].values
    assert values["reliability"] == {"teacher_forced": 1.0, "token_accuracy": 1.0, "generated": 1.0}
    assert values["locality_near"] == {"teacher_forced": 1.0, "generated": 1.0}
    assert values["locality_far"] == {"teacher_forced": 0.5, "generated": 0.5}
    assert values["accuracy_drawdown"] == {"teacher_forced": 0.5, "generated": 0.5}
    assert values["kl_far"]["value"] == pytest.approx(0.5**2 / (2 * math.exp(2 * std)) / 2 / 2, rel=1e-5)
    density = math.exp(-std - 0.5 * math.log(2 * math.pi)) ** 2
    assert values["target_probability"]["value"] == pytest.approx(density, rel=1e-5)
    assert not {"target_rank", "fluency", "locality_adversarial"} & values.keys()
    assert [answer.ok for answer in report.cases[0].answers] == [True, True, True, False]
    assert report.baselines["unedited"][0].values["reliability"]["generated"] == 0.0
    (edit,) = Shift([-0.5, 0.0]).edit_each(task, [request])
    robustness = measure_robustness(task, edit, [request])
    assert robustness.probability == pytest.approx(density, rel=1e-5)
    assert robustness.in_context is None
    assert 0 < robustness.elsewhere.stays.mean < 1


def test_actions_of_a_set_are_compared_as_labels():
    task = wrap(Identity(3), DiscreteActions(("left", "stay", "right"), 3))
    request = EditRequest(
        prompt=Observation((1.0, 0.0, 0.5)), target="right",
        near=(Probe(prompt=Observation((1.0, 3.0, 0.0)), target="stay"),),
    )  # fmt: skip
    (case,) = evaluate(task, Shift([0.0, 0.0, 2.0]), [request]).cases
    assert case.before == "left"
    assert case.values["reliability"]["generated"] == 1.0
    assert case.values["locality_near"]["generated"] == 1.0
    assert case.values["target_rank"]["value"] == 1.0
    assert case.values["target_probability"]["value"] == pytest.approx(
        math.exp(2.5) / (math.exp(2.5) + math.exp(1) + 1), rel=1e-5
    )
