"""Metrics that are known by construction, and the report."""

import copy
import json
import math
from dataclasses import dataclass

import pytest
import torch

import worlds
from remend.core.low_rank import LowRank
from remend.edit import Edit
from remend.errors import ConfigError, FileError, NonFiniteError, RequestError
from remend.evaluation import evaluate
from remend.evaluation.before_after import before_after
from remend.evaluation.perturbed_edits import with_mask, with_noise
from remend.evaluation.reports.figure_style import check_plot, save_figure
from remend.evaluation.reports.plots import frontier, groups
from remend.evaluation.reports.report import Case, Report, Run
from remend.evaluation.reports.report_reader import read_report
from remend.evaluation.strength_choice import CANDIDATE_STRENGTHS, choose_strength
from remend.evaluation.summary import Summary
from remend.fingerprint import ModelFingerprint
from remend.request import EditRequest, Probe
from remend.tasks import wrap
from remend.tasks.causal_lm import CausalLM


@dataclass
class Fixed:
    """An editor that makes the same edit whatever it is asked."""

    model: object
    changes: dict

    def edit_each(self, task, requests):
        base = ModelFingerprint.of(task.model, self.changes)
        return [Edit(self.changes, base, (request,)) for request in requests]

    def edit(self, task, requests):
        return self.edit_each(task, requests[:1])[0]


def test_an_edit_of_rank_zero_keeps_every_answer(task):
    name = next(name for name, module in task.model.named_modules() if "mlp." in name and hasattr(module, "weight"))
    d_in, d_out = (16, 64) if "c_fc" in name else (16, 40)
    nothing = Fixed(task.model, {name: LowRank(torch.zeros(1, d_in), torch.zeros(1, d_out))})
    report = evaluate(task, nothing, worlds.requests(40), max_new_tokens=5)
    means = {name: {mode: s.mean for mode, s in modes.items()} for name, modes in report.metrics().items()}
    for name in ("locality_far", "locality_near"):
        assert means[name] == {"teacher_forced": 1.0, "generated": 1.0, "contains": 1.0, "token_f1": 1.0}
    assert means["accuracy_drawdown"] == {"teacher_forced": 0.0, "generated": 0.0}
    for name in ("reliability", "generality", "generality_unseen", "edit_success"):
        assert means[name]["generated"] == 0.0
    assert "portability" not in means, "a metric without data is absent"


def test_metrics_agree_with_free_decoding_of_each_edit(task, editor):
    """The fast path against the obvious one: apply, generate, compare."""
    requests = worlds.requests(12)
    report = evaluate(task, editor, requests, max_new_tokens=6)
    end = task.tokenizer.eos_token_id
    for request, case in zip(requests, report.cases, strict=True):
        edit = editor.edit(task, [request])
        kept = [probe.prompt for probe in (*request.locality, *request.near)]
        before = task.predict(kept, 6)
        with edit.applied(task.model):
            after = task.predict(kept, 6)
            (now,) = task.predict([request.prompt], 6)
        assert case.values["locality_far"]["generated"] == float(before[0] == after[0])
        assert case.values["locality_near"]["generated"] == float(before[1] == after[1])
        wanted = task.encode(request.prompt, request.target).target
        assert case.values["reliability"]["generated"] == float(now == wanted)
        assert case.values["reliability"]["teacher_forced"] >= case.values["reliability"]["generated"]
        assert end == wanted[-1]


def memorised():
    """A world whose model was trained to answer, so that answers are whole and stop."""
    task = CausalLM(worlds.llama(), worlds.tokenizer())
    facts = list(zip(worlds.COUNTRIES, worlds.CITIES, strict=True))
    pairs = [task.encode(p.format(country), city) for country, city in facts for p in worlds.PHRASINGS]
    batch = task.collate(pairs)
    optimizer = torch.optim.Adam(task.model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        task.loss(batch).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return task


@pytest.fixture(scope="module")
def world():
    return memorised()


def test_known_answers_give_known_values(world):
    """Every metric by hand: the edit is nothing, so the values follow from what the model is known to answer."""
    nothing = Fixed(world.model, {"model.layers.3.mlp.down_proj": LowRank(torch.zeros(1, 40), torch.zeros(1, 16))})
    right, wrong = (
        Probe(prompt="The capital of Norway is", target="Oslo"),
        Probe(prompt="Peru has the capital", target="Rome"),
    )
    requests = [
        EditRequest(  # asks for what the model says anyway, and in one paraphrase of two for what it does not
            prompt="The capital of France is", target="Paris", subject="France",
            paraphrases=("France has the capital", "The capital of Italy is"),
            unseen_paraphrases=("The capital of Egypt is",),
            locality=(right, wrong), near=(wrong,), portability=(right, wrong, wrong, wrong),
        ),
        EditRequest(prompt="The capital of Peru is", target="Rome", subject="Peru", locality=(right,)),
    ]  # fmt: skip
    report = evaluate(world, nothing, requests)
    means = {
        name: (modes["generated"].mean, modes["generated"].n)
        for name, modes in report.metrics().items()
        if "generated" in modes
    }
    assert means == {
        "reliability": (0.5, 2),
        "generality": (0.5, 1),
        "generality_unseen": (0.0, 1),
        "edit_success": (pytest.approx((2 / 3 + 0) / 2), 2),
        "locality_far": (1.0, 2),
        "locality_near": (1.0, 1),
        "locality_adversarial": (1.0, 2),
        "accuracy_drawdown": (0.0, 2),
        "portability": (0.25, 1),
    }
    assert report.cases[0].before == "Paris"


def test_a_model_that_answers_everything_alike_after_the_edit(world):
    """An edit that ruins the model: locality must say so, and drawdown be the accuracy that was lost."""
    generator = torch.Generator().manual_seed(3)
    noise = LowRank(torch.randn(8, 40, generator=generator) * 30, torch.randn(8, 16, generator=generator) * 30)
    ruin = Fixed(world.model, {f"model.layers.{i}.mlp.down_proj": noise for i in (1, 2, 3)})
    right, wrong = (
        Probe(prompt="The capital of Norway is", target="Oslo"),
        Probe(prompt="Peru has the capital", target="Rome"),
    )
    request = EditRequest(prompt="The capital of France is", target="Paris", locality=(right, wrong), near=(right,))
    (case,) = evaluate(world, ruin, [request]).cases
    assert case.values["locality_far"]["generated"] == 0.0
    assert case.values["locality_near"]["generated"] == 0.0
    assert case.values["accuracy_drawdown"]["generated"] == 0.5, "one of two was right before, none after"


def test_before_after_names_the_expected_answers(world):
    nothing = Fixed(world.model, {"model.layers.3.mlp.down_proj": LowRank(torch.zeros(1, 40), torch.zeros(1, 16))})
    request = worlds.requests(1)[0]
    edit = nothing.edit(world, [request])
    (answers,) = before_after(world, edit, [request])
    found = [(a.kind, a.wanted, a.before, a.after, a.ok) for a in answers]
    assert found == [
        ("prompt", "Rome", "Paris", "Paris", False),
        ("paraphrase", "Rome", "Paris", "Paris", False),
        ("unseen paraphrase", "Rome", "Paris", "Paris", False),
        ("near", "Bern", "Bern", "Bern", True),
        ("far", "Bern", "Bern", "Bern", True),
    ]


def test_a_summary_has_the_mean_and_its_bootstrap_interval():
    summary = Summary.of([0.0, 1.0, 1.0, 1.0])
    assert (summary.mean, summary.n) == (0.75, 4)
    assert 0 <= summary.ci95[0] < 0.75 < summary.ci95[1] <= 1
    assert Summary.of([1.0, 1.0]).ci95 == (1.0, 1.0)
    narrow, wide = Summary.of([0.0, 1.0] * 500).ci95, Summary.of([0.0, 1.0] * 5).ci95
    assert narrow[1] - narrow[0] < wide[1] - wide[0]
    assert narrow[1] - narrow[0] == pytest.approx(4 * 0.5 / math.sqrt(1000), rel=0.15)
    for values in ([1.0, math.nan], []):
        with pytest.raises(NonFiniteError):
            Summary.of(values)


def test_the_report_file_follows_its_schema(tmp_path):
    modes = {"teacher_forced": 1.0, "generated": 0.0}
    case = Case("a", "p", "t", "b", {"reliability": modes})
    report = Report("toy", "some.jsonl", [Run(1, [case], 0.5)], {"torch": "x"})
    report.save(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["schema"] == "remend.report/2"
    (run,) = found["runs"]
    assert run["metrics"] == {
        "reliability": {
            "teacher_forced": {"mean": 1.0, "ci95": [1.0, 1.0], "n": 1},
            "generated": {"mean": 0.0, "ci95": [0.0, 0.0], "n": 1},
        }
    }
    assert run["seconds_per_edit"] == 0.5
    assert found["peak_memory_bytes"] > 1e6
    assert run["cases"][0]["values"]["reliability"] == modes


def test_edits_of_different_modules_are_each_applied_whole(world):
    """Some editors touch other matrices for each request; what one does not touch stays as it is there."""
    noise = LowRank(torch.randn(2, 40) * 30, torch.randn(2, 16) * 30)
    nothing = LowRank(torch.zeros(1, 40), torch.zeros(1, 16))

    class Alternating(Fixed):
        def edit_each(self, task, requests):
            first = Fixed(task.model, {"model.layers.3.mlp.down_proj": nothing}).edit_each(task, requests[:1])
            ruin = {f"model.layers.{i}.mlp.down_proj": noise for i in (1, 2)}
            return first + Fixed(task.model, ruin).edit_each(task, requests[1:])

    quiet, loud = evaluate(world, Alternating(None, {}), worlds.requests(2)).cases
    assert quiet.values["locality_far"]["generated"] == 1.0
    assert loud.values["locality_far"]["generated"] == 0.0


def test_a_model_in_training_mode_is_evaluated_without_dropout():
    model = worlds.gpt2(resid_pdrop=0.5, embd_pdrop=0.5).train()
    nothing = Fixed(model, {"transformer.h.1.mlp.c_fc": LowRank(torch.zeros(1, 16), torch.zeros(1, 64))})
    report = evaluate(wrap(model, worlds.tokenizer()), nothing, worlds.requests(10), max_new_tokens=5)
    assert report.metrics()["locality_far"]["generated"].mean == 1.0
    assert model.training


def test_answers_without_an_end_token_are_right_if_they_begin_with_the_target(world):
    tokenizer = copy.deepcopy(world.tokenizer)
    tokenizer.eos_token = None
    bare = wrap(world.model, tokenizer)
    nothing = Fixed(world.model, {"model.layers.3.mlp.down_proj": LowRank(torch.zeros(1, 40), torch.zeros(1, 16))})
    request = EditRequest(prompt="The capital of France is", target="Paris")
    edit = nothing.edit(bare, [request])
    ((answer,),) = before_after(bare, edit, [request], max_new_tokens=4)
    assert answer.ok


def test_no_request_is_refused(task, editor):
    with pytest.raises(RequestError, match="no request"):
        evaluate(task, editor, [])


def test_the_frontier_is_what_scaled_edits_do(task, editor, tmp_path):
    requests = worlds.requests(12)
    report = evaluate(task, editor, requests, max_new_tokens=5, strengths=(0.5, 1.0, 2.0))
    assert list(report.frontier) == [0.5, 1.0, 2.0]
    assert report.frontier[1.0] == report.cases
    free = ("generated", "teacher_forced")

    class ScaledEdit:
        def edit_each(self, task, some):
            return [edit.scaled(2.0) for edit in editor.edit_each(task, some)]

    alone = evaluate(task, ScaledEdit(), requests, max_new_tokens=5, text_tokens=0)
    for one, other in zip(alone.cases, report.frontier[2.0], strict=True):
        assert one.values.keys() == other.values.keys()
        for name, modes in other.values.items():
            assert {m: one.values[name][m] for m in modes if m in free} == {m: modes[m] for m in modes if m in free}
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert [point["scale"] for point in saved["frontier"]] == [0.5, 1.0, 2.0]
    assert saved["frontier"][1]["metrics"]["reliability"] == saved["runs"][0]["metrics"]["reliability"]


def test_edits_are_evaluated_with_inexact_numbers(task, editor, tmp_path):
    requests = worlds.requests(8)
    report = evaluate(task, editor, requests, max_new_tokens=5, perturbed=True, text_tokens=64)
    assert list(report.baselines) == ["unedited", "in_context", "noise_10%", "mask_10%"]
    assert "elsewhere" not in report.baselines["noise_10%"][0].values
    edits = editor.edit_each(task, requests)

    class Inexact:
        def __init__(self, perturb):
            self.perturb = perturb

        def edit_each(self, task, some):
            return [self.perturb(edit, number) for number, edit in enumerate(edits)]

    for name, perturb in (("noise_10%", with_noise), ("mask_10%", with_mask)):
        alone = evaluate(task, Inexact(perturb), requests, max_new_tokens=5, baselines=False, text_tokens=0)
        assert [case.values for case in alone.cases] == [case.values for case in report.baselines[name]]
    again = evaluate(task, editor, requests, max_new_tokens=5, perturbed=True, text_tokens=0)
    assert again.baselines["mask_10%"] == report.baselines["mask_10%"]
    report.save(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json").baselines.keys() == report.baselines.keys()
    with pytest.raises(ConfigError, match="single edits are perturbed"):
        evaluate(task, editor, requests, protocol="batched", perturbed=True)


def test_noise_and_masks_change_a_tenth():
    torch.manual_seed(0)
    change = LowRank(torch.randn(4, 3000), torch.randn(4, 2000))
    model = torch.nn.ModuleDict({"m": torch.nn.Linear(3000, 2000)})
    edit = Edit({"m": change}, ModelFingerprint.of(model, ["m"]))
    noisy, masked = with_noise(edit, 0).changes["m"], with_mask(edit, 0).changes["m"]
    assert ((noisy.u / change.u).std() - 0.1).abs() < 0.005
    assert ((noisy.delta / change.delta).mean() - 1).abs() < 0.005
    for factor, before in ((masked.u, change.u), (masked.delta, change.delta)):
        assert ((factor == 0).float().mean() - 0.1).abs() < 0.01
        assert torch.equal(factor[factor != 0], before[factor != 0])
    assert torch.equal(with_mask(edit, 0).changes["m"].u, masked.u)
    assert not torch.equal(with_mask(edit, 1).changes["m"].u, masked.u)


def test_near_probes_are_also_reported_by_their_kind(task, editor):
    probes = [
        Probe(prompt="The capital of Peru is", target="Lima", kind=kind) for kind in ("same_object", "same_subject")
    ]
    request = worlds.requests(1)[0].model_copy(update={"near": tuple(probes)})
    metrics = evaluate(task, editor, [request], max_new_tokens=5).metrics()
    assert {"locality_near", "locality_near_same_object", "locality_near_same_subject"} <= metrics.keys()
    assert "locality_near_same_relation" not in metrics


def test_the_strength_is_chosen_on_the_prompts_of_the_requests(task, editor):
    requests = worlds.requests(3)
    edit = editor.edit(task, requests)
    best, tried = choose_strength(task, edit, requests, 5)
    assert [one.strength for one in tried] == list(CANDIDATE_STRENGTHS)
    assert best.sort_key == max(one.sort_key for one in tried)
    for one in tried:
        with edit.scaled(one.strength).applied(task.model):
            answers = task.predict([r.prompt for r in requests], 5)
        wanted = [task.encode(r.prompt, r.target).target for r in requests]
        assert one.reliability == sum(a == w for a, w in zip(answers, wanted, strict=True)) / 3


def test_without_near_prompts_no_edit_is_made_stronger_than_it_needs(task, editor, monkeypatch):
    request = worlds.requests(1)[0]
    edit = editor.edit(task, [request])

    def judged(taken_from):
        def values(_, request, looks):
            scale = next(scales)
            found = {"reliability": float(scale >= taken_from), "generality": scale / 2, "locality_near": 1.0}
            return {name: {"generated": value} for name, value in found.items()}

        scales = iter(CANDIDATE_STRENGTHS)
        monkeypatch.setattr("remend.evaluation.strength_choice.Scorer.values", values)

    bare = request.model_copy(update={"near": ()})
    for own, taken_from, scale in (
        (request, 0.5, 2.0),
        (bare, 0.5, 1.0),
        (bare, CANDIDATE_STRENGTHS[6], CANDIDATE_STRENGTHS[6]),
    ):
        judged(taken_from)
        assert choose_strength(task, edit, [own], 5)[0].strength == scale


def test_without_probes_the_strength_is_the_one_nearest_to_one(task):
    request = EditRequest(prompt=worlds.requests(1)[0].prompt, target="Oslo")
    name = next(name for name, module in task.model.named_modules() if "mlp." in name and hasattr(module, "weight"))
    d_in, d_out = (16, 64) if "c_fc" in name else (16, 40)
    nothing = Fixed(task.model, {name: LowRank(torch.zeros(1, d_in), torch.zeros(1, d_out))})
    edit = nothing.edit(task, [request])
    assert choose_strength(task, edit, [request], 5)[0].strength == 1.0


def test_a_frontier_can_be_drawn(task, editor, tmp_path):
    pytest.importorskip("matplotlib")
    report = evaluate(task, editor, worlds.requests(6), max_new_tokens=5, strengths=(0.5, 2.0))
    save_figure(frontier({"tiny": report}), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"the file's name should end with \.pdf, \.png, \.svg"):
        check_plot(tmp_path / "frontier.txt")
    with pytest.raises(FileError, match="is not a folder"):
        check_plot(tmp_path / "nowhere" / "frontier.png")


def test_cases_are_grouped_whole():
    """Every case is in one group, also where many have the same number, or numbers that are written alike."""
    for numbers in ([1, 1, 1, 2, 2, 3], [0.99901 + n * 1e-6 for n in range(40)], [n / 40 for n in range(40)], [5]):
        cases = [Case(n, "", "", "", {}, {"confidence": float(number)}) for n, number in enumerate(numbers)]
        found = groups(cases, "confidence")
        assert sorted(case.id for own in found.values() for case in own) == list(range(len(numbers)))
        assert all(name.endswith(f"({len(own)})") for name, own in found.items())
    assert list(groups([Case(0, "", "", "", {}, {"relation": "P36"})], "relation")) == ["P36 (1)"]
