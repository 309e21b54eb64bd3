"""When two texts are the same answer: a table of cases, and that every command judges by it."""

import pytest

import worlds
from remend.edit import Edit
from remend.evaluation import evaluate
from remend.evaluation.before_after import before_after
from remend.fingerprint import ModelFingerprint
from remend.request import EditRequest, Probe
from remend.tasks import wrap
from remend.tasks.base import Example
from remend.tasks.same_text import same_text

SAME = [
    ("Paris", "Paris"),
    (" Paris\n", "Paris"),
    ("Paris.", "Paris"),
    ("Paris .", "Paris"),
    ("巴黎。", "巴黎"),
    ("पेरिस।", "पेरिस"),
    ("باريس۔", "باريس"),
    ("the Netherlands", "Netherlands"),
    ("The Eiffel Tower.", "Eiffel Tower"),
    ("an apple", "apple"),
    ("U.S.", "U.S"),
    ("10\u202f000", "10 000"),
    ("Zu\u0308rich", "Zürich"),
    ("\u1112\u1161\u11ab", "한"),
    (".", "."),
    ("the", "the"),
]
DIFFERENT = [
    ("C", "C#"),
    ("C", "C++"),
    ("C++", "C"),
    ("5", "-5"),
    ("5", "−5"),
    ("10", "10%"),
    ("10", "10 %"),
    ("1 2", "1/2"),
    ("12", "1/2"),
    ("1,000", "1.000"),
    ("1,000", "1000"),
    ("3.14", "314"),
    (".NET", "NET"),
    ("U.S.", "US"),
    ("US", "US?"),
    ("Paris!", "Paris"),
    ("?", "!"),
    ("x²", "x2"),
    ("½", "1/2"),
    ("H₂O", "H2O"),
    ('"C"', "C"),
    ("(a)", "a"),
    ("$5", "€5"),
    ("a-b", "a+b"),
    ("A minor", "minor"),
    ("Vitamin A", "Vitamin"),
    ("Lord of the Rings", "Lord of Rings"),
    ("And so on...", "And so on"),
    ("résumé", "resume"),
    ("ё", "е"),
    ("ب", "پ"),
    ("か", "が"),
    ("カ", "か"),
    ("東京", "东京"),
    ("us", "US"),
    ("polish", "Polish"),
    ("a\nb", "a b"),
    ("Paris, France", "Paris"),
    ("", "Paris"),
]


@pytest.mark.parametrize(("text", "other"), SAME)
def test_what_no_reader_counts_makes_no_difference(text, other):
    assert same_text(text, other)
    assert same_text(other, text)


@pytest.mark.parametrize(("text", "other"), DIFFERENT)
def test_what_carries_meaning_makes_a_difference(text, other):
    assert not same_text(text, other)
    assert not same_text(other, text)


def test_case_counts_unless_it_is_left_out():
    assert same_text("straße", "STRASSE", ignore_case=True)
    assert not same_text("C", "c#", ignore_case=True)


class Teacher:
    """Makes no edit: what counts is what the model, which was taught something, answers."""

    def edit(self, task, requests):
        return self.edit_each(task, requests)[0]

    def edit_each(self, task, requests):
        return [Edit({}, self.base, (request,)) for request in requests]


@pytest.mark.parametrize(
    ("said", "wanted", "same"), [("C", "C#", False), ("5", "-5", False), ("10", "10%", False), ("Rome.", "Rome", True)]
)
def test_evaluation_and_the_answers_of_an_edit_agree(said, wanted, same):
    task = wrap(worlds.llama(), worlds.tokenizer())
    prompt = "The capital of Peru is"
    worlds.teach(task, task.collate([task.encode(prompt, said)]))
    request = EditRequest(prompt=prompt, target=wanted)
    editor = Teacher()
    editor.base = ModelFingerprint.of(task.model, {})
    ((row,),) = before_after(task, editor.edit(task, [request]), [request])
    report = evaluate(task, editor, [request], baselines=False)
    assert (row.after, row.ok) == (said, same)
    assert report.metrics()["reliability"]["generated"].mean == float(same)
    assert report.runs[0].cases[0].answers[0].ok is same


def test_an_answer_that_was_cut_off_is_not_the_whole_answer():
    task = wrap(worlds.llama(), worlds.tokenizer())
    target = task.encode("The capital of Peru is", "Rome").target
    assert task.same_answer(target, target)
    assert not task.same_answer(target[:-1], target)
    assert task.same_answer(target[:-1], target[:-1])


@pytest.mark.parametrize("wanted", ["Rome", "Lima"])
def test_an_empty_answer_is_never_kept(wanted):
    task = wrap(worlds.llama(), worlds.tokenizer())
    silent, empty = "The capital of Peru is", (task.processor.eos_token_id,)
    worlds.teach(task, task.collate([Example(task.encode_input(silent), empty)]))
    assert task.predict([silent]) == [empty]
    assert not task.same_answer(empty, empty)
    probe = Probe(prompt=silent, target=wanted)
    request = EditRequest(prompt="The capital of France is", target="Paris", locality=(probe,), near=(probe,))
    editor = Teacher()
    editor.base = ModelFingerprint.of(task.model, {})
    (rows,) = before_after(task, editor.edit(task, [request]), [request])
    assert [(row.kind, row.after, row.ok) for row in rows[1:]] == [("near", "", False), ("far", "", False)]
    report = evaluate(task, editor, [request], baselines=False)
    for metric in ("locality far", "locality near"):
        scores = report.metrics()[metric.replace(" ", "_")]
        assert all(scores[mode].mean == 0.0 for mode in ("generated", "contains", "token_f1")), metric
    answers = report.runs[0].cases[0].answers
    assert [row.ok for row in answers if row.kind in ("near", "far")] == [False, False]
