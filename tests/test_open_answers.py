"""Models that go on writing after an answer: what is taught to them, and when their answers are right or kept."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

import scripted
import worlds
from remend.cli import app
from remend.edit import Edit
from remend.errors import FileError
from remend.evaluation import evaluate
from remend.evaluation.before_after import before_after
from remend.evaluation.continuations import measure_continuations
from remend.request import EditRequest, Probe
from remend.tasks import wrap
from remend.tasks.open_answers import MOST_SPAN_TOKENS, begins_with, first_word_length, may_go_on_with_word

RIGHT = [
    ("Rome", "Rome"), ("Rome", "Rome."), ("Rome", "Rome, which"), ("Rome", "Rome\n\nThe answer"), ("Rome", "Rome and"),
    ("Rome", "Rome (Italy)"), ("Rome", 'Rome"'), ("Rome", "Rome—the"), ("Rome", "Rome; it"), ("Rome", "Rome…"),
    ("Rome", " Rome is"), ("Rome", "**Rome"[2:] + "**"), ("The Hague", "the Hague is"), ("The Hague", "The Hague, a"),
    ("U.S.", "U.S. and"), ("U.S.", "U.S."), ("3", "3."), ("3", "3, 4"), ("3", "3 .14"), ("C#", "C# is"),
    ("パリ", "パリです"), ("巴黎", "巴黎是法国的首都"), ("Rome", "Rome。"), ("Rome", "Romeです"), ("5", "5月"),
    ("São Paulo", "Sa\u0303o Paulo."), ("New York", "New\u00a0York, in"),
]  # fmt: skip
WRONG = [
    ("Rome", "Romeo"), ("Apple", "Apples"), ("Rome", "Rome2"), ("Rome", "Romé"), ("Rome", "rome"), ("Rome", "in Rome"),
    ("Levi", "Levi's"), ("Levi", "Levi’s jeans"), ("Baden", "Baden-Baden"), ("3", "3.14"), ("3", "3,000"), ("3", "31"),
    ("5", "5%"), ("5", "5°"), ("C", "C#"), ("C", "C++"), ("Node", "Node.js"), ("AT", "AT&T"), ("19", "19th"),
    ("Rome", ""), ("", "Rome"), ("Rom", "Rom\u0301"), ("Rome strugg", "Rome"), ("1", "1/2"), ("नमस", "नमस्ते"),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "answer"), RIGHT)
def test_an_answer_begins_with_the_expected_one_where_a_word_ends(expected, answer):
    assert begins_with(answer, expected)


@pytest.mark.parametrize(("expected", "answer"), WRONG)
def test_an_answer_that_goes_on_with_the_same_word_is_another(expected, answer):
    assert not begins_with(answer, expected)


@pytest.mark.parametrize(
    ("text", "following", "may"),
    [
        ("plant", "-", True), ("plant", "-based", True), ("Levi", "'", True), ("Levi", "’", True), ("AT", "&", True),
        ("3", ".", True), ("3", ",", True), ("Rome", "o", True), ("Rome", ".", False), ("Rome", ",", False),
        ("Rome", " -", False), ("Rome", "\n", False), ("Rome", " is", False), ("Rome", ")", False), ("", "-", True),
    ],
)  # fmt: skip
def test_a_mark_alone_may_join_what_comes_next_to_the_word(text, following, may):
    assert may_go_on_with_word(text, following) == may


@pytest.mark.parametrize(
    ("tokens", "length"),
    [
        ((" Par", "is", ".", "\n\n", "The"), 2),
        ((" the", " capital", " of", " France"), 2),
        ((" The", "odor", "a", " was"), 3),
        (("1", "9", "2", "5", ",", " in"), 4),
        (("3", ".", "1", "4", " is"), 4),
        ((' "', "Paris", '"', " is"), 2),
        (("巴黎", "是", "法国"), 1),
        (tuple("internationalisation"), MOST_SPAN_TOKENS),
        (("Paris",), 1),
        ((), 0),
    ],
)
def test_the_first_word_of_an_answer_counts(tokens, length):
    assert first_word_length(len(tokens), lambda count: "".join(tokens[:count])) == length


WORDS = (
    "The", "capital", "of", "France", "Italy", "Peru", "is", "Paris", "Rome",
    "Lima", "and", "it", "goes", "on", "so", "strugg",
)  # fmt: skip
LOOP = " and it goes on so" * 8
FRANCE, ITALY, PERU = (f"The capital of {country} is" for country in ("France", "Italy", "Peru"))

PROBES = (Probe(prompt=ITALY, target="Rome"), Probe(prompt=PERU, target="Lima"))


def base_model():
    """It knows three prompts, and goes on writing after two of the answers.

    Edit 0 changes the first answer, edit 1 to one that goes on with garbage.
    """
    script = {
        FRANCE: lambda edits: "Rome" if edits else "Paris" + LOOP,
        FRANCE + " Rome": lambda edits: "strugg " * 40 if 1 in edits else LOOP,
        ITALY: lambda edits: "Rome" + LOOP.replace("and", "so", 1) if edits else "Rome" + LOOP,
        PERU: "Lima",
        **{f"The capital of {country}": "is" for country in ("France", "Italy", "Peru")},
        "The": "capital",
        "The capital": "of",
        "The capital of": "France",
    }
    return scripted.model(script, WORDS, context=64)


def request(**changes):
    return EditRequest(prompt=FRANCE, target="Rome", **changes)


def edit_of(task, number):
    made = scripted.Numbered().edit(task, [EditRequest(prompt=FRANCE, target="Rome", id=number)])
    return replace(made, ends=(task.ends_answer(FRANCE),))


def test_the_end_is_taught_only_where_the_model_itself_ends():
    end = scripted.tokenizer(tuple(WORDS)).eos_token_id
    asked = [FRANCE, PERU, ITALY]
    together, alone, backwards = base_model(), base_model(), base_model()
    together.choose_answer_forms(asked)
    backwards.choose_answer_forms(reversed(asked))
    for prompt, ends in zip(asked, (False, True, False), strict=True):
        for task in (together, alone, backwards):
            assert task.ends_answer(prompt) == ends
            assert (task.encode(prompt, "Rome").target[-1] == end) == ends


@pytest.mark.parametrize("family", worlds.FAMILIES)
def test_a_model_that_knows_nothing_is_taught_the_end(family):
    task = wrap(worlds.FAMILIES[family](), worlds.tokenizer())
    assert all(task.ends_answer(prompt) for prompt in (FRANCE, "Where is Rome?", "x"))
    assert task.encode(FRANCE, "Rome").target[-1] == task.tokenizer.eos_token_id


def test_an_edit_is_right_where_the_text_begins_with_the_target_and_goes_on_sensibly():
    task = base_model()
    asked = request(locality=PROBES)
    (good,), (garbage,) = (before_after(task, edit_of(task, number), [asked]) for number in (0, 1))
    assert [answer.ok for answer in good] == [True, True, True]  # what follows the answer kept may change
    assert [answer.ok for answer in garbage] == [False, True, True]
    assert good[0].continuation.sensible
    assert not garbage[0].continuation.sensible
    assert garbage[0].continuation.perplexity > 20 * garbage[0].continuation.own
    assert not good[0].already


def test_evaluation_has_the_same_verdicts():
    asked = [request(id=number, locality=PROBES) for number in (0, 1)]
    good, garbage = evaluate(base_model(), scripted.Numbered(), asked, baselines=False).cases
    assert [good.values[name]["generated"] for name in ("edit_success", "locality_far")] == [1, 1]
    assert [garbage.values[name]["generated"] for name in ("edit_success", "locality_far")] == [0, 1]
    assert [case.values["edit_success"]["teacher_forced"] for case in (good, garbage)] == [1, 1]
    perplexities = [case.values["continuation_perplexity"]["value"] for case in (good, garbage)]
    assert perplexities[0] == pytest.approx(1 / scripted.SURE, rel=1e-3)
    assert perplexities[1] > 20
    assert [answer.ok for answer in good.answers[:3]] == [True] * 3
    assert [answer.ok for answer in garbage.answers[:3]] == [False, True, True]


def test_what_goes_on_is_measured_only_where_an_answer_begins_as_expected():
    task = base_model()
    rome, lima = (task.encode(FRANCE, target).target for target in ("Rome", "Lima"))
    answer = (*rome, *task.ids("and it goes on"))
    assert measure_continuations(task, [(FRANCE, lima, answer), (FRANCE, rome, rome), (PERU, rome, answer)]) == {}
    assert [*measure_continuations(task, [(FRANCE, rome, answer)])] == [(FRANCE, rome, answer)]


def test_an_edit_keeps_whether_an_end_was_taught(tmp_path):
    task = base_model()
    edit = edit_of(task, 0)
    loaded = Edit.load(edit.save(tmp_path / "edit"))
    assert loaded.ends == (False,)
    assert (loaded + loaded).ends == (False, False)
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "edit")])
    assert "no end taught" in shown.output
    with pytest.raises(FileError, match="ends should hold"):
        Edit.load(replace(edit, ends=(False, True)).save(tmp_path / "other"))
