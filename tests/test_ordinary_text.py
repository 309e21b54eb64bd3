"""What an edit changes on ordinary text: the values, from passes that are written out, and where they are shown."""

import json
import math

import pytest
import torch

import families
import scripted
import worlds
from remend.core.low_rank import LowRank
from remend.edit import Edit
from remend.errors import ConfigError, NonFiniteError
from remend.evaluation import evaluate, ordinary_text
from remend.evaluation.interventions import SeparateEdits, SharedEdit
from remend.evaluation.ordinary_text import TEXT_WINDOW, OrdinaryText
from remend.evaluation.reports.html_report import write_html_report
from remend.evaluation.reports.report_reader import read_report
from remend.evaluation.summary import Summary
from remend.fingerprint import ModelFingerprint
from remend.request import EditRequest

PASSAGES = [f"The capital of {country} is {city} . It is the city of {country}" * 3 for country, city in zip(
    worlds.COUNTRIES, worlds.CITIES, strict=True)]  # fmt: skip
LAYERS = {"gpt2": "transformer.h.2.mlp.c_proj", "bert, binary": "bert.encoder.layer.2.output.dense"}


def random_edit(task, name, size, seed=0):
    """An edit of one matrix by random factors."""
    generator = torch.Generator().manual_seed(seed)
    weight = task.model.get_submodule(name).weight
    d_in, d_out = weight.shape if name.endswith("c_proj") else weight.shape[::-1]
    change = LowRank(torch.randn(2, d_in, generator=generator), size * torch.randn(2, d_out, generator=generator))
    return Edit({name: change}, ModelFingerprint.of(task.model, [name]), ())


@torch.no_grad()
def written_out(task, edit, examples):
    """For each text, what the model does at every token without and with the edit, one text at a time."""
    rows = []
    for example in examples:
        ids = torch.tensor([[*example.input, *example.target]])
        before = task.model(ids).logits[0, :-1].double()
        with edit.applied(task.model):
            after = task.model(ids).logits[0, :-1].double()
        p, q = before.softmax(-1), after.softmax(-1)
        following = ids[0, 1:, None]
        rows.append([
            (before.argmax(-1) == after.argmax(-1)).double(), (p * (p.log() - q.log())).sum(-1),
            -p.log().gather(1, following)[:, 0], -q.log().gather(1, following)[:, 0],
        ])  # fmt: skip
    return rows


@pytest.mark.parametrize("passages", [(), PASSAGES], ids=["its own", "given"])
def test_the_values_are_those_of_passes_that_are_written_out(passages):
    task = families.task("gpt2")
    edit = random_edit(task, LAYERS["gpt2"], 0.3)
    text = OrdinaryText(task, passages)
    (found,) = text.measure(SharedEdit(task, edit))
    rows = written_out(task, edit, text.examples)
    stays, divergence, before, after = (torch.cat(column) for column in zip(*rows, strict=True))
    assert (found.given, found.texts, found.choices) == (bool(passages), len(rows), len(stays))
    assert 0 < found.stays.mean < 1
    assert found.stays.mean == pytest.approx(float(stays.mean()))
    assert found.divergence.mean == pytest.approx(float(divergence.mean()), rel=1e-4)
    assert found.perplexity == text.perplexity == pytest.approx(float(before.mean().exp()), rel=1e-5)
    assert found.perplexity_ratio.mean == pytest.approx(float((after.mean() - before.mean()).exp()), rel=1e-5)
    low, high = found.stays.ci95
    assert low < found.stays.mean < high
    shares = [float(row[0].mean()) for row in rows]
    assert found.stays.ci95 == Summary.of(shares, weights=[len(row[0]) for row in rows]).ci95


def test_an_interval_is_over_texts_each_with_the_weight_of_its_choices():
    assert Summary.of([1.0, 0.0], weights=[3, 1]).mean == 0.75
    assert Summary.of([0.0, 0.5, 1.0]) == Summary.of([0.0, 0.5, 1.0], weights=[2, 2, 2])
    assert Summary.of([0.2], weights=[5]) == Summary(0.2, (0.2, 0.2), 1)
    with pytest.raises(NonFiniteError, match="1 of the 2 values"):
        Summary.of([1.0, math.nan], weights=[1, 1])


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert, binary"])
def test_an_edit_that_does_nothing_changes_nothing(family):
    task = families.task(family)
    name = LAYERS.get(family, "decoder.block.2.layer.2.DenseReluDense.wo")
    (found,) = OrdinaryText(task).measure(SharedEdit(task, random_edit(task, name, 0.0)))
    assert (found.stays.mean, found.divergence.mean) == (1.0, 0.0)
    assert found.stays.ci95 == (1.0, 1.0)
    if family == "gpt2":
        assert found.perplexity_ratio == Summary(1.0, (1.0, 1.0), found.texts)
    else:
        assert found.perplexity is found.perplexity_ratio is None


def test_a_broken_model_keeps_few_choices():
    task = families.task("gpt2")
    (found,) = OrdinaryText(task).measure(SharedEdit(task, random_edit(task, LAYERS["gpt2"], 1e4)))
    assert found.stays.mean < 0.3
    (slight,) = OrdinaryText(task).measure(SharedEdit(task, random_edit(task, LAYERS["gpt2"], 0.01)))
    assert found.divergence.mean > 100 * slight.divergence.mean
    assert found.perplexity_ratio.mean > 1.05 > slight.perplexity_ratio.mean
    low, high = found.stays.ci95
    assert found.description == (
        f"{found.stays.mean:.1%} of the model's {found.choices} choices on ordinary text stayed (95 %: {low:.1%} to "
        f"{high:.1%}), with a divergence of {found.divergence.mean:.3f} nats, perplexity × "
        f"{found.perplexity_ratio.mean:.3f}"
    )


def test_a_classifier_makes_one_choice_for_each_input():
    task = families.task("bert, binary")
    text = OrdinaryText(task)
    edit = random_edit(task, LAYERS["bert, binary"], 3.0)
    (found,) = text.measure(SharedEdit(task, edit))
    assert found.texts == found.choices == len(text.examples)
    with torch.no_grad():
        kept = 0
        for example in text.examples:
            before = task.outputs(task.collate([example])).argmax()
            with edit.applied(task.model):
                kept += int(task.outputs(task.collate([example])).argmax() == before)
    assert 0 < kept < len(text.examples)
    assert found.stays.mean == pytest.approx(kept / len(text.examples))


def test_edits_that_are_told_apart_are_measured_as_each_alone():
    task = families.task("gpt2")
    edits = [random_edit(task, LAYERS["gpt2"], size, seed) for seed, size in enumerate((0.0, 0.2, 0.5))]
    text = OrdinaryText(task, PASSAGES)
    together = text.measure(SeparateEdits(task, edits), 3)
    alone = [text.measure(SharedEdit(task, edit))[0] for edit in edits]
    for one, other in zip(together, alone, strict=True):
        assert one.stays == other.stays
        assert one.divergence.mean == pytest.approx(other.divergence.mean, rel=1e-4, abs=1e-7)
    assert together[1] != together[2]


def test_the_unedited_model_runs_once_for_all_edits(monkeypatch):
    task = families.task("gpt2")
    text = OrdinaryText(task, PASSAGES)
    batches = len(text._batches(task))
    passes = []
    task.model.register_forward_pre_hook(lambda *_: passes.append(1))
    first = text.measure(SharedEdit(task, random_edit(task, LAYERS["gpt2"], 0.2)))
    assert len(passes) == 2 * batches
    text.measure(SharedEdit(task, random_edit(task, LAYERS["gpt2"], 0.4)))
    assert len(passes) == 3 * batches
    monkeypatch.setattr(ordinary_text, "STORED_OUTPUTS", 0)
    without_room = OrdinaryText(task, PASSAGES)
    assert without_room.measure(SharedEdit(task, random_edit(task, LAYERS["gpt2"], 0.2))) == first


def test_no_more_text_is_read_than_asked():
    task = families.task("gpt2")
    text = OrdinaryText(task, PASSAGES * 20, 200)
    assert all(len(example) <= min(TEXT_WINDOW, task.context) for example in text.examples)
    assert 200 - TEXT_WINDOW < sum(map(len, text.examples)) <= 200
    assert text.examples == OrdinaryText(task, PASSAGES * 20, 200).examples
    assert text.examples != OrdinaryText(task, PASSAGES * 20, 100).examples


@pytest.mark.parametrize(("passages", "message"), [(["  ", "\n"], "text is empty"), (["?"], "no two tokens")])
def test_a_text_that_holds_nothing_to_measure_is_refused(passages, message):
    with pytest.raises(ConfigError, match=message):
        OrdinaryText(families.task("gpt2"), passages)


# -- where it is shown ---------------------------------------------------------------------------------------------


SCRIPT = {"A is": lambda edits: "red" if 0 in edits else "blue", "of": lambda edits: "and" if 0 in edits else "of"}
WORDS = ("A", "is", "of", "and", "red", "blue")
REQUESTS = (EditRequest(prompt="A is", target="red", id=0),)


def test_a_report_its_page_and_its_tables_show_it(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    task = scripted.model(SCRIPT, WORDS)
    text = ["of of of of", "of and A is blue", "red red of is"]
    report = evaluate(task, scripted.Numbered(), REQUESTS, text=text)
    metrics = report.metrics()
    (case,) = report.cases
    # Of eleven tokens' successors, those change that follow an "of" at the beginning of a text (others end it), and
    # the answer to "A is".
    text_measured = OrdinaryText(task, text)
    (edit,) = scripted.Numbered().edit_each(task, REQUESTS)
    (found,) = text_measured.measure(SharedEdit(task, edit))
    assert 0 < found.stays.mean < 1
    assert metrics["elsewhere"]["value"] == Summary(found.stays.mean, found.stays.ci95, 1)
    assert metrics["kl_elsewhere"]["value"].mean == found.divergence.mean > 0
    assert metrics["perplexity_ratio"]["value"].mean == found.perplexity_ratio.mean
    added = found.perplexity * (found.perplexity_ratio.mean - 1)
    assert case.values["perplexity_drawdown"]["value"] == pytest.approx(added)
    assert (
        report.text_in_words == f"3 texts, {found.choices} choices, perplexity {found.perplexity:.2f} before any edit"
    )
    assert "elsewhere" not in report.baseline_metrics(report.runs[0])["unedited"]
    report.save(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json").metrics() == metrics
    write_html_report(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>elsewhere<small>choices on ordinary text that stay</small></td>" in page
    assert report.text_in_words in page
    columns = json.loads(page.partition('id="metric-columns">')[2].partition("</script>")[0])
    assert "elsewhere" in [column["name"] for column in columns]


def test_a_report_without_ordinary_text(tmp_path):
    report = evaluate(scripted.model(SCRIPT, WORDS), scripted.Numbered(), REQUESTS, text_tokens=0)
    assert "elsewhere" not in report.metrics()
    assert report.text == {}


def test_reports_of_before_can_be_read(tmp_path):
    report = evaluate(scripted.model(SCRIPT, WORDS), scripted.Numbered(), REQUESTS, text_tokens=0).to_json()
    for part in (*report["runs"], *report["baselines"].values()):
        for case in part["cases"]:
            del case["intervals"]
    report["text"] = {"tokens": 1000.0, "perplexity": 3.0}
    (tmp_path / "old.json").write_text(json.dumps(report))
    assert read_report(tmp_path / "old.json").text_in_words == "1,000 choices, perplexity 3.00 before any edit"
