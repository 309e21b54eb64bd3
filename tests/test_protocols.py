"""Metrics and protocols on a model with scripted answers, so that values are computed by hand."""

import copy
import json
import math

import pytest
import torch

import families
import remend
import scripted
from remend.core.output_distributions import Categorical
from remend.editors import MendConfig, make
from remend.editors.enn import Enn
from remend.editors.ridge import RidgeConfig
from remend.errors import ConfigError, FileError, NonFiniteError
from remend.evaluation import abilities, evaluate, evaluate_checkpoints
from remend.evaluation.checkpoint import evaluation_fingerprint
from remend.evaluation.conflicting_probes import filter_probes
from remend.evaluation.metrics import fluency, query_measurements, word_overlap
from remend.evaluation.reports.comparison import compare
from remend.evaluation.reports.report import metrics_of
from remend.evaluation.reports.report_reader import read_report
from remend.request import EditRequest, Probe

WORDS = (
    *("capital", "of", "is", "A", "B", "C", "D", "not", "the", "what", "?", "language", "x", "y", "z"),
    *("red", "blue", "green", "dark", "long", "and", "on", "red.", "blue."),
)


def after(number, then, otherwise):
    """``then`` while an edit is at work, else ``otherwise``."""
    return lambda edits: then if number in edits else otherwise


SCRIPT = {
    "capital of A is": after(0, "red", "blue"),
    "the capital of A is": after(0, "red", "blue"),
    "what is the capital of A": after(0, "dark red", "blue"),
    "x A is": after(0, "red and on", "blue"),
    "y A is": "blue",
    "capital of B is": after(1, "blue", "green"),
    "the capital of B is": after(1, "blue", "green"),
    "capital of C is": after(0, "red", "long green"),  # leaks
    "capital of D is": "green",
    "language of A is": after(0, "green and", "green"),  # goes on where it should stop
    "language of B is": after(1, "red", "dark"),
    "language of C is": "dark",
    "what is capital of A ?": after(0, "red", "blue"),
    "capital of A is not": after(0, "red", "green"),
    "capital of B is not": "green",
    "capital of A is red. capital of A is": "red",  # listens to what it is told
    "capital of A is red. language of C is": after(0, "red", "dark"),  # and, once edited, to nothing else
    "z A": after(0, "x y x y x y x", "x y z"),
}
REQUESTS = (
    EditRequest(
        prompt="capital of A is", target="red", id=0, subject="A", relation="P36",
        paraphrases=("the capital of A is", "what is the capital of A"),
        unseen_paraphrases=("x A is", "y A is"),
        formats=("what is capital of A ?",),
        locality=(Probe(prompt="language of C is", target="dark"), Probe(prompt="language of A is", target="green")),
        near=(Probe(prompt="capital of C is", target="long green", kind="same_relation"),
              Probe(prompt="capital of D is", target="red", kind="same_object")),
        portability=(Probe(prompt="language of A is", target="green", kind="reasoning"),
                     Probe(prompt="capital of C is", target="red", kind="aliasing")),
        outdated=(Probe(prompt="capital of A is not", target="red", kind="reverse"),
                  Probe(prompt="capital of B is not", target="blue", kind="reverse")),
        negated=("capital of A is not", "capital of B is not"),
        generation=("z A",),
    ),
    EditRequest(
        prompt="capital of B is", target="blue", id=1, subject="B", relation="P37",
        paraphrases=("the capital of B is",),
        locality=(Probe(prompt="language of B is", target="dark"),),
    ),
)  # fmt: skip


def divergence(size):
    """KL between two distributions that are sure of different words."""
    rest = (1 - scripted.SURE) / (size - 1)
    return (scripted.SURE - rest) * math.log(scripted.SURE / rest)


@pytest.fixture
def world():
    return scripted.model(SCRIPT, WORDS)


def means(found, mode):
    return {name: modes[mode].mean for name, modes in found.items() if mode in modes}


def test_every_metric_of_single_edits(world):
    """Those of ordinary text have tests of their own (test_ordinary_text.py)."""
    report = evaluate(world, scripted.Numbered(), REQUESTS, text_tokens=0)
    first, second = report.cases
    exact = {
        "reliability": 1.0,
        "generality": 0.5,  # one of two: "dark red" is not "red"
        "generality_unseen": 0.0,  # "red and on" goes on, "blue" is as before
        "edit_success": 2 / 3,
        "format_shift": 1.0,
        "format_shift_question": 1.0,
        "portability": 0.5,
        "portability_reasoning": 0.0,
        "portability_aliasing": 1.0,
        "locality_far": 0.5,
        "locality_near": 0.5,
        "locality_near_same_relation": 0.0,
        "locality_near_same_object": 1.0,
        "locality_adversarial": 0.0,  # one of two says nothing before and after, which is not kept
        "accuracy_drawdown": 0.5,
        "pair_consistency": 0.5,
    }
    assert {name: own["generated"] for name, own in first.values.items() if "generated" in own} == pytest.approx(exact)
    forced = {**exact, "generality_unseen": 0.5, "portability": 1.0, "portability_reasoning": 1.0, "locality_far": 1.0}
    forced |= {"accuracy_drawdown": 0.0}  # along the one right word the first choice is right, whatever follows
    assert {n: own["teacher_forced"] for n, own in first.values.items() if "teacher_forced" in own} == pytest.approx(
        forced
    )
    contained = {**exact, "generality": 1.0, "generality_unseen": 0.5, "edit_success": 1.0, "locality_far": 1.0}
    contained |= {"portability": 1.0, "portability_reasoning": 1.0}
    del contained["accuracy_drawdown"], contained["pair_consistency"]
    assert {n: own["contains"] for n, own in first.values.items() if "contains" in own} == pytest.approx(contained)
    assert first.values["generality"]["token_f1"] == pytest.approx(
        (1 + 2 / 3) / 2
    )  # "dark red": precision 1/2, recall 1
    assert first.values["generality_unseen"]["token_f1"] == pytest.approx(0.5 / 2)  # "red and on": 1/3 and 1
    size = len(world.tokenizer)
    value = {name: own["value"] for name, own in first.values.items() if "value" in own}
    assert value == pytest.approx(
        {
            "kl_far": divergence(size) / 4,  # at one of two prompts, at the end token of its two
            "kl_near": divergence(size) * 2 / 3 / 2,  # "long green <end>" became "red <end> <end>"
            "kl_near_same_relation": divergence(size) * 2 / 3,
            "kl_near_same_object": 0.0,
            "kl_adversarial": divergence(size) / 4,
            "portability_negated": 0.5,
            "negated_before": 1.0,
            "outdated": 0.5,
            "outdated_reverse": 0.5,
            "target_probability": scripted.SURE,
            "target_rank": 1.0,
            # "x y x y x y x": bigrams half and half; trigrams three to two, three of five seen before
            "fluency": (2 / 3 * 1 + 4 / 3 * -(0.6 * math.log2(0.6) + 0.4 * math.log2(0.4))) / 2,
            "repetition": 0.6,
        },
        abs=1e-5,
    )
    assert first.about == {"target_tokens": 1, "relation": "P36", "confidence": pytest.approx(scripted.SURE)}
    assert second.values["accuracy_drawdown"]["generated"] == 1.0
    assert "locality_near" not in second.values, "what has no data is absent"
    assert means(report.metrics(), "generated")["locality_far"] == pytest.approx(0.25)
    assert report.metrics()["locality_near"]["generated"].n == 1
    answers = {(a.kind, a.prompt): (a.wanted, a.before, a.after, a.ok) for a in first.answers}
    assert answers["unseen paraphrase", "x A is"] == ("red", "blue", "red and on", False)
    assert answers["near", "capital of C is"] == ("long green", "long green", "red", False)
    assert answers["negated", "capital of A is not"] == (None, "green", "red", False)
    assert answers["outdated", "capital of A is not"] == (None, "green", "red", False)
    assert answers["generation", "z A"][2] == "x y x y x y x"


def test_denial_is_compared_with_the_unedited_models(world):
    denied = REQUESTS[1].model_copy(update={"negated": ("capital of A is not", "capital of A is")})
    (case,) = evaluate(world, scripted.Numbered(), [denied], baselines=False, text_tokens=0).cases
    assert case.values["negated_before"] == {"value": 0.5}, "of B it says green, and where that is denied, too"
    assert case.values["portability_negated"] == {"value": 0.5}


def test_baselines_are_the_unedited_model_and_the_fact_in_the_prompt(world):
    report = evaluate(world, scripted.Numbered(), REQUESTS)
    floor = report.baselines["unedited"]
    kept = [(n, own["generated"]) for case in floor for n, own in case.values.items() if n.startswith("locality")]
    assert all(share == 1 for name, share in kept if name != "locality_adversarial")
    assert all(share < 1 for name, share in kept if name == "locality_adversarial"), "it answers some with nothing"
    assert means(metrics_of(floor), "generated")["edit_success"] == 0
    assert means(metrics_of(floor), "value")["kl_far"] == 0
    assert floor[0].values["portability_negated"] == {"value": 1.0}
    told, other = report.baselines["in_context"]
    assert told.values["reliability"]["generated"] == 1
    assert told.values["generality"]["generated"] == 0, "told about A, it says nothing to other phrasings"
    assert told.values["accuracy_drawdown"]["generated"] == 0.5
    assert other.values["reliability"]["generated"] == 0
    assert not evaluate(world, scripted.Numbered(), REQUESTS, baselines=False).baselines


def test_batched_edits_are_evaluated_while_all_are_applied(world):
    report = evaluate(world, scripted.Numbered(), REQUESTS, protocol="batched", edits=[1, 2], text_tokens=0)
    alone, both = report.runs
    assert [run.edits for run in report.runs] == [1, 2]
    assert [case.values["reliability"]["generated"] for case in both.cases] == [1, 1]
    single = evaluate(world, scripted.Numbered(), REQUESTS, text_tokens=0)
    assert [case.values for case in alone.cases] == [case.values for case in single.cases]
    # Of "capital of A is red. language of C is" and the like nothing depends on both edits: the values are the same.
    assert [case.values for case in both.cases] == [case.values for case in single.cases]
    with_rest = evaluate(world, scripted.Numbered(), REQUESTS + REQUESTS[:1], protocol="batched", edits=[2])
    assert with_rest.left_out == {"requests that do not fill a batch of 2": 1}
    assert len(with_rest.cases) == 2


def test_probes_that_another_applied_edit_changes_are_left_out_of_locality():
    """A probe that asks for a fact that is edited too is meant to change, in whatever phrasing it asks."""
    probes = [Probe(prompt=prompt, target="green") for prompt in ("the capital of B is", "capital of D is")]
    first = REQUESTS[0].model_copy(update={"locality": tuple(probes), "near": (probes[0],)})
    requests = (first, REQUESTS[1])
    world = scripted.model(SCRIPT, WORDS)
    alone = evaluate(world, scripted.Numbered(), requests, protocol="batched", edits=[1])
    both = evaluate(world, scripted.Numbered(), requests, protocol="batched", edits=[2])
    assert {"locality_far", "locality_near"} <= alone.cases[0].values.keys()
    assert "locality_near" not in both.cases[0].values
    assert both.cases[0].values["locality_far"]["generated"] == 1
    assert both.left_out == {"locality prompts that another edit at work changes on purpose": 2}
    after = evaluate(world, scripted.Numbered(), requests, protocol="sequential")
    assert after.left_out == both.left_out


def test_far_probes_about_another_edited_subject_count_as_near():
    """A far prompt is far from its own request only, once others are edited too."""
    probes = tuple(Probe(prompt=f"language of {name} is", target="dark") for name in ("B", "AB", "the B C", "D", "A"))
    requests = [
        EditRequest(prompt=f"capital of {name} is", target="red", subject=name, locality=probes)
        for name in ("A", "b c")
    ]
    (first, second), left_out = filter_probes(requests)
    assert left_out == 0
    assert [p.prompt for p in first.locality] == [f"language of {name} is" for name in ("B", "AB", "D", "A")]
    assert [p.prompt for p in first.near] == ["language of the B C is"]
    assert [p.prompt for p in second.near] == ["language of A is"]
    alone, left_out = filter_probes([requests[0]])
    assert alone == [requests[0]]
    unnamed = [request.model_copy(update={"subject": None}) for request in requests]
    assert filter_probes(unnamed)[0] == unnamed


def test_sequential_edits_can_be_forgotten():
    """The third edit undoes the first one, and makes the second one's far prompt right again."""
    script = {
        "capital of A is": lambda edits: "red" if 0 in edits and 2 not in edits else "blue",
        "capital of B is": after(1, "blue", "green"),
        "capital of C is": after(2, "red", "green"),
        "language of B is": lambda edits: "red" if 1 in edits and 2 not in edits else "dark",
    }
    probe = Probe(prompt="language of B is", target="dark")
    requests = [
        EditRequest(prompt=f"capital of {name} is", target=target, id=number, subject=name, locality=(probe,))
        for number, (name, target) in enumerate(zip("ABC", ("red", "blue", "red"), strict=True))
    ]
    world = scripted.model(script, WORDS)
    report = evaluate(world, scripted.Numbered(), requests, protocol="sequential", edits=[1, 2, 3])
    assert report.retention() == [[1], [1, 1], [0, 1, 1]] == report.to_json()["retention"]
    floors = [report.baseline_metrics(run)["unedited"]["accuracy_drawdown"]["generated"] for run in report.runs]
    assert [floor.n for floor in floors] == [1, 2, 3], "each run stands beside the same requests"
    assert [run.metrics()["locality_far"]["generated"].mean for run in report.runs] == [1, 0, 1]
    assert [run.metrics()["accuracy_drawdown"]["generated"].mean for run in report.runs] == [0, 1, 0]
    assert evaluate(world, scripted.Numbered(), requests, protocol="sequential").runs[0].edits == 3
    assert not evaluate(world, scripted.Numbered(), requests).retention()


def test_another_checkpoint_gets_the_same_values_as_its_edits(world):
    edited = scripted.model(
        {prompt: answer({0, 1}) if callable(answer) else answer for prompt, answer in SCRIPT.items()}, WORDS
    )
    report = evaluate_checkpoints(world, edited, REQUESTS)
    both = evaluate(world, scripted.Numbered(), REQUESTS, protocol="batched", edits=[2])
    assert [case.values for case in report.cases] == [case.values for case in both.cases]
    other = scripted.model({}, WORDS[:5])
    with pytest.raises(ConfigError, match="has 6 outputs and the unedited one 25"):
        evaluate_checkpoints(world, other, REQUESTS)


def test_perplexity_of_a_text_before_and_after_an_edit(world):
    """Each word of the text but the first is what the model says with p = 0.9, until an edit has it say another."""
    text = ["capital of A is blue"]
    report = evaluate(world, scripted.Numbered(), REQUESTS[:1], text=text, baselines=False)
    rest = (1 - scripted.SURE) / (len(world.tokenizer) - 1)
    # The model knows no prompt before "capital of A is": it says the end there, and the text goes on.
    before = math.exp(-(3 * math.log(rest) + math.log(scripted.SURE)) / 4)
    assert report.text == {"texts": 1, "tokens": 4, "given": 1, "perplexity": pytest.approx(before, rel=1e-4)}
    now = math.exp(-4 * math.log(rest) / 4)
    (drawdown,) = report.cases[0].values["perplexity_drawdown"].values()
    assert drawdown == pytest.approx(now - before, rel=1e-4)
    both = evaluate(world, scripted.Numbered(), REQUESTS, protocol="batched", text=text, baselines=False)
    assert both.metrics()["perplexity_drawdown"]["value"].n == 1, "what is measured once counts once"
    with pytest.raises(ConfigError, match="no two tokens"):
        evaluate(world, scripted.Numbered(), REQUESTS[:1], text=["red"])


def test_a_stopped_evaluation_resumes_where_it_was_stopped(world, tmp_path, monkeypatch):
    class Stopping(scripted.Numbered):
        made = 0
        most = 1

        def edit(self, *arguments):
            if self.made == self.most:
                raise KeyboardInterrupt
            self.made += 1
            return super().edit(*arguments)

    for protocol, sizes in (("batched", [1]), ("sequential", [1, 2])):
        folder = tmp_path / protocol
        options = {"protocol": protocol, "edits": sizes, "checkpoint": folder}
        editor = Stopping()
        with pytest.raises(KeyboardInterrupt):
            evaluate(world, editor, REQUESTS, **options)
        assert list(folder.glob("*.json"))
        with pytest.raises(FileError, match="of an evaluation with another model, editor, data or settings"):
            evaluate(world, editor, REQUESTS[:1], **{**options, "edits": [1]}, resume=True)
        editor.most = 2
        report = evaluate(world, editor, REQUESTS, **options, resume=True)
        assert editor.made == 2, "what was done before is not done again"
        whole = evaluate(world, scripted.Numbered(), REQUESTS, protocol=protocol, edits=sizes)
        assert [[c.to_json() for c in run.cases] for run in report.runs] == [
            [c.to_json() for c in run.cases] for run in whole.runs
        ]
        assert not folder.exists()


def test_the_fingerprint_of_an_evaluation_depends_on_the_editors_settings():
    task = families.task("gpt2")
    editors = [
        make("ridge", task, config=RidgeConfig(strength=strength), seed=seed)
        for strength, seed in ((1.0, 0), (5.0, 0), (1.0, 1))
    ]
    plain = remend.Mend.create(task, MendConfig(rank=4))
    gated = remend.Mend.create(task, MendConfig(rank=4, tokens="target", contrast=1.0, aggregate="sum"))
    other = remend.Mend.create(task, MendConfig(rank=4, aggregate="least-squares"))
    names = [evaluation_fingerprint(task.model, editor, REQUESTS, {}) for editor in (*editors, plain, gated, other)]
    assert len(set(names)) == len(names)
    assert names[0] == evaluation_fingerprint(task.model, copy.copy(editors[0]), REQUESTS, {})


def test_edits_that_cannot_be_added_are_made_anew_for_all():
    """An ENN's edits each hold what training changed: a sequence's last edit must hold it once."""
    task, requests = families.task("gpt2"), families.requests("gpt2", 3)
    editor = Enn.create(task)
    editor.unit.fill_(1e-3)
    with torch.no_grad():
        for values in editor.networks:
            values.normal_(std=0.1)
    report = evaluate(task, editor, requests, protocol="sequential", edits=[1, 3], baselines=False)
    whole = evaluate(task, editor, requests, protocol="batched", edits=[3], baselines=False)
    assert [c.to_json() for c in report.runs[1].cases] == [c.to_json() for c in whole.runs[0].cases]


def test_a_folder_that_is_no_checkpoint_is_not_touched(world, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(FileError, match="holds something else"):
        evaluate(world, scripted.Numbered(), REQUESTS, checkpoint=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_report_that_cannot_be_saved_is_not_lost(world, tmp_path):
    """The parts stay until it is saved."""

    def fail(report):
        raise FileError("the disk is full")

    folder = tmp_path / "kept"
    with pytest.raises(FileError, match="the disk is full"):
        evaluate(world, scripted.Numbered(), REQUESTS, checkpoint=folder, on_report=fail)
    saved = []
    report = evaluate(
        world, scripted.Numbered(), REQUESTS, checkpoint=folder, resume=True, on_report=lambda r: saved.append(r) or r
    )
    assert saved == [report]
    assert not folder.exists()


def test_a_sequence_that_was_killed_during_its_evaluation_resumes(world, tmp_path, monkeypatch):
    """Its edit was kept already, what it does was not yet."""
    options = {"protocol": "sequential", "edits": [1, 2], "checkpoint": tmp_path / "kept"}
    monkeypatch.setattr(
        "remend.evaluation.runner.EvaluationRunner._save_part", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        evaluate(world, scripted.Numbered(), REQUESTS, baselines=False, **options)
    monkeypatch.undo()
    assert (tmp_path / "kept" / "edit-1").is_dir()
    report = evaluate(world, scripted.Numbered(), REQUESTS, baselines=False, **options, resume=True)
    assert report.retention() == [[1], [1, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "serial"}, "there is no protocol 'serial'; it is one of single, batched, sequential"),
        ({"edits": [2]}, "single edits are applied alone"),
        (
            {"protocol": "batched", "edits": [3]},
            "there are 2 requests, so from 1 to 2 edits can be applied at once, not 3",
        ),
        ({"protocol": "batched", "strengths": (2.0,)}, "strengths are for single edits"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(world, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(world, scripted.Numbered(), REQUESTS, **options)


def test_a_report_is_read_back_and_compared(world, tmp_path):
    class Idle(scripted.Numbered):
        def edit(self, *arguments):
            return super().edit(*arguments).scaled(0.0)

    files = {}
    for name, editor in (("good", scripted.Numbered()), ("idle", Idle())):
        files[name] = tmp_path / f"{name}.json"
        report = evaluate(world, editor, REQUESTS, name=name)
        report.save(files[name])
        again = read_report(files[name])
        assert [case.to_json() for case in again.cases] == [case.to_json() for case in report.cases]
        assert again.to_json()["runs"] == report.to_json()["runs"]
    good, idle = map(read_report, files.values())
    found = {(own.metric, own.mode): own for own in compare(good, idle)}
    success = found["edit_success", "generated"]
    assert (success.first, success.other) == (pytest.approx(5 / 6), 0)
    assert success.difference.mean == pytest.approx(-5 / 6)
    assert success.significant
    assert found["locality_near", "generated"].difference.n == 1, "only the first request has near prompts"
    assert all(own.difference.mean == 0 and not own.significant for own in compare(good, good))
    lonely = evaluate(world, scripted.Numbered(), [REQUESTS[0].model_copy(update={"id": 3})])
    with pytest.raises(ConfigError, match="share no edit"):
        compare(good, lonely)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"schema": "remend.report/1"}, "schema"),
        ({"runs": []}, "runs"),
        ({"protocol": "double"}, "protocol"),
        ({"more": 1}, "more"),
        ({"text": {"tokens": float("inf")}}, "text.tokens"),
    ],
)
def test_files_that_are_not_reports_are_refused(world, tmp_path, change, place):
    report = evaluate(world, scripted.Numbered(), REQUESTS, baselines=False)
    (tmp_path / "report.json").write_text(json.dumps({**report.to_json(), **change}))
    with pytest.raises(FileError, match=rf"is not a report of remend.report/2 \({place}"):
        read_report(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("[")
    with pytest.raises(FileError, match="is not a report"):
        read_report(tmp_path / "report.json")
    with pytest.raises(FileError, match="No such file"):
        read_report(tmp_path / "nowhere.json")


def test_values_that_are_not_finite_are_an_error(world, monkeypatch):
    nothing = lambda self, before, after, row, rows: torch.full((rows,), math.nan)  # noqa: E731
    monkeypatch.setattr(Categorical, "divergence", nothing)
    report = evaluate(world, scripted.Numbered(), REQUESTS, text_tokens=0)
    with pytest.raises(NonFiniteError, match="not finite"):
        report.metrics()
    with pytest.raises(NonFiniteError, match="not finite"):  # of ordinary text, at once
        evaluate(world, scripted.Numbered(), REQUESTS)


def test_text_matches_ranks_divergence_perplexity_and_entropy_by_hand():
    assert word_overlap.contains("It is in Paris, France", "paris") == 1
    assert word_overlap.contains("Parisian", "Paris") == 0
    assert word_overlap.contains("a ? b", "?") == 1
    assert word_overlap.contains("a b", "?") == 0
    for answer, expected, inside in (
        ("They use C# (and F#).", "C#", 1), ("They use C# (and F#).", "F#", 1), ("They use C#.", "C", 0),
        ("It is -5 °C", "5", 0), ("about 10%.", "10", 0), ("about 10%.", "10%", 1), ("1/2 of it", "1 2", 0),
        ("It is 10.5", "10", 0), ("“Köln”, they say", "köln", 1), ("using .NET", "net", 0),
        ("首都是巴黎。", "巴黎", 1), ("首都是巴黎。", "罗马", 0), ("เมืองหลวงคือปารีส", "ปารีส", 1),
    ):  # fmt: skip
        assert word_overlap.contains(answer, expected) == inside, (answer, expected)
    assert word_overlap.token_f1("C", "C#") == word_overlap.token_f1("5", "-5") == 0
    assert word_overlap.token_f1("the city of Paris", "Paris city") == pytest.approx(2 * 2 / (4 + 2))
    assert word_overlap.token_f1("a a b", "a") == pytest.approx(2 * 1 / (3 + 1))
    assert word_overlap.token_f1("", "Paris") == 0
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 0.0]])
    target = torch.tensor([1, 0])
    assert Categorical().mode(logits).tolist() == [2, 0]
    assert query_measurements.ranks(logits, target).tolist() == [2, 2], "a tie is a better"
    chosen = [math.exp(1) / (1 + math.exp(1) + math.exp(2)), math.exp(3) / (2 * math.exp(3) + 1)]
    torch.testing.assert_close(Categorical().log_prob(logits, target), torch.tensor(chosen).log())
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(Categorical().divergence(p.log(), q.log(), torch.tensor([0]), 1)) == pytest.approx(expected, rel=1e-5)
    assert fluency.ngram_entropy([1, 1, 1, 1]) == 0
    assert fluency.ngram_entropy([1, 2]) == 0
    assert fluency.ngram_entropy([1, 2, 3, 4]) == pytest.approx((2 / 3 * math.log2(3) + 4 / 3 * 1) / 2)
    assert fluency.repeated_trigrams([1, 2, 3, 4]) == 0
    assert fluency.repeated_trigrams([1, 1, 1, 1, 1]) == pytest.approx(2 / 3)


def test_abilities_are_what_the_unedited_model_gets_right_and_keeps(world, tmp_path, monkeypatch):
    asked = [("capital of A is", "blue"), ("the capital of A is", "green"), ("capital of B is", world_answer(world))]
    monkeypatch.setattr(abilities, "sums", lambda: iter(asked))
    monkeypatch.setattr(abilities, "facts_in_context", lambda: iter(asked[1:2]))  # wrong before any edit
    monkeypatch.setattr(abilities.AbilityPanel, "_known", lambda self: [])
    options = {"protocol": "sequential", "edits": [1, 2], "baselines": False, "abilities": True}
    measured = evaluate(world, scripted.Numbered(), REQUESTS, **options, checkpoint=tmp_path / "kept")
    assert [set(run.abilities) for run in measured.runs] == [{"arithmetic"}] * 2
    found = [(run.abilities["arithmetic"].mean, run.abilities["arithmetic"].n) for run in measured.runs]
    assert found[0] == (0.5, 2)  # "capital of A is" is edited first, and the wrong one does not count
    measured.save(tmp_path / "report.json")
    assert [run.abilities for run in read_report(tmp_path / "report.json").runs] == [r.abilities for r in measured.runs]
    # A part that is loaded has its abilities.
    stop = lambda report: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    kept = {"checkpoint": tmp_path / "again"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(world, scripted.Numbered(), REQUESTS, **options, **kept, on_report=stop)
    monkeypatch.setattr(abilities.AbilityPanel, "measure", lambda *_: pytest.fail("it was measured"))
    again = evaluate(world, scripted.Numbered(), REQUESTS, **options, **kept, resume=True)
    assert [run.abilities for run in again.runs] == [run.abilities for run in measured.runs]
    for wrong, message in (
        ({**options, "protocol": "single", "edits": []}, "several edits at work"),
        ({**options, "editor": make("in-context", world)}, "does not change the model"),
    ):
        editor = wrong.pop("editor", scripted.Numbered())
        with pytest.raises(ConfigError, match=message):
            evaluate(world, editor, REQUESTS, **wrong)


def world_answer(world):
    return world.decode(world.predict(["capital of B is"])[0])


def test_common_facts_of_the_panel_are_those_that_a_model_is_sure_of_and_nobody_edits(monkeypatch):
    task = families.taught("llama")
    monkeypatch.setattr(abilities, "reference_subjects", lambda: ["France", "Italy", "Norway"])
    edited = [EditRequest(prompt="The capital of Italy is", target="Oslo", subject="Italy")]
    items = abilities.AbilityPanel(task, edited).items
    assert items["facts"]
    for prompt, answer in items["facts"]:
        assert "Italy" not in prompt
        assert task.gives(prompt, task.predict([prompt], 8)[0], answer)
