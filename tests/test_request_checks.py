"""Requests that no edit can answer are refused before it is made, and an edit that changes nothing is told."""

import warnings

import pytest

import families
import remend
import worlds
from remend.editors.finetune import FineTune
from remend.editors.in_context import InContext
from remend.editors.loading import editor_class
from remend.editors.mend.editor import Mend
from remend.errors import RequestError
from remend.evaluation import evaluate
from remend.evaluation.before_after import before_after
from remend.request import Completion, EditRequest, TextPair
from remend.tasks import wrap
from remend.tasks.unknown_text import unknown_pieces
from test_tokenisation import task_for

PROMPT = "The capital of Peru is"


def request(prompt=PROMPT, target="Rome", **more):
    return EditRequest(prompt=prompt, target=target, **more)


@pytest.fixture
def task():
    return worlds.task(worlds.llama())


# -- conflicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [PROMPT, f" {PROMPT}", f"{PROMPT} "])
def test_two_answers_to_one_prompt_are_refused(prompt, task):
    both = [request(), request("Oslo is"), request(prompt, "Lima")]
    editor = FineTune.create(task)
    with pytest.raises(RequestError, match=r"requests 1 and 3 want different answers to .*'Rome' and 'Lima'"):
        editor.edit(task, both)
    with pytest.raises(RequestError, match="requests 1 and 3 want different answers"):
        evaluate(task, editor, both, protocol="batched", baselines=False)


@pytest.mark.parametrize("editor", ["mend", "lookup", "in-context"])
def test_each_kind_of_editor_refuses_two_answers(editor, task):
    chosen = editor_class(editor).create(task)
    with pytest.raises(RequestError, match="requests 1 and 2 want different answers"):
        chosen.edit(task, [request(), request(target="Lima")])
    chosen.edit(task, [request(), request()])
    assert len(chosen.edit_each(task, [request(), request(target="Lima")])) == 2


@pytest.mark.parametrize("target", ["Rome", " Rome ", "Rome."])
def test_the_same_answer_twice_is_no_conflict(target, task):
    both = [request(), request(target=target), request(Completion(PROMPT, " "))]
    edit = InContext.create(task).edit(task, both)
    assert [made.target for made in edit.requests] == ["Rome", target, "Rome"]


# -- unknown text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("東京 is", "'東京'"),
        ("The {Oslo} is", r"'\{' \(U\+007B\), '\}' \(U\+007D\)"),
        ("Oslo ~ is", r"'~' \(U\+007E\)"),
    ],
)
def test_a_prompt_with_unknown_characters_is_refused(kind, prompt, named):
    task = task_for("unigram, ended", kind)
    for make in (InContext.create(task).edit, InContext.create(task).edit_each):
        with pytest.raises(RequestError, match=rf"cannot write {named} of the prompt .*2 of 3 requests"):
            make(task, [request("Oslo is"), request(prompt), request(prompt)])
    with pytest.raises(RequestError, match="cannot write"):
        evaluate(task, InContext.create(task), [request(prompt)])


@pytest.mark.parametrize("habit", ["byte-level", "pieces, ▁ by the normaliser"])
def test_tokenizers_with_bytes_know_every_character(habit):
    assert task_for(habit).unknown_text("東京 {~} is") == ()


def test_a_classifier_names_unknown_words_of_both_texts():
    task = wrap(families.make("bert, binary"), worlds.word_tokenizer())
    assert task.unknown_text(TextPair("Peru has Kabul", "It is [UNK] Lyon")) == ("Kabul", "Lyon")
    assert unknown_pieces(worlds.tokenizer(), "Kabul 東京") == ()


def test_unknown_characters_of_questions_are_warned_of_once():
    task = task_for("unigram, ended")
    asked = ["東京 is", "Oslo is", "~ is"]
    with pytest.warns(UserWarning, match=r"cannot write '東京', '~' .*: 2 of the prompts") as told:
        remend.answers(task, asked, max_new_tokens=1)
    assert len(told) == 1
    editor = editor_class("lookup").create(task)
    near = [{"prompt": prompt, "target": "Rome"} for prompt in asked]
    made = EditRequest.model_validate({"prompt": PROMPT, "target": "Rome", "near": tuple(near)})
    with pytest.warns(UserWarning, match="2 of the prompts") as told:
        before_after(task, editor.edit(task, [made]), [made], 1)
    assert len(told) == 1
    with pytest.warns(UserWarning, match="2 of the requests' prompts") as told:
        evaluate(task, editor, [made], baselines=False, max_new_tokens=1)
    assert len(told) == 1


# -- nothing to change ----------------------------------------------------------------------------------------------


def test_an_edit_that_changes_nothing_is_warned_of_once(task):
    answered = request()
    worlds.teach(task, task.collate([task.encode(answered.prompt, answered.target)]))
    editor = FineTune.create(task)
    with pytest.warns(UserWarning, match="the edit changes nothing: the model answers so already .*'Rome'") as told:
        edit = editor.edit(task, [answered])
    assert edit.is_zero
    assert len(told) == 1
    others = [answered, request("Oslo is", "Lima"), answered]
    with pytest.warns(UserWarning, match="2 of 3 edits change nothing: the model answers so already") as told:
        edits = editor.edit_each(task, others)
    assert [edit.is_zero for edit in edits] == [True, False, True]
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not editor.edit(task, others).is_zero


def test_an_editor_that_learned_nothing_says_so(task):
    editor = Mend.create(task)
    editor.alpha.data.mul_(0)
    with pytest.warns(UserWarning, match="changes nothing: the editor did not learn it"):
        editor.edit(task, [request()])
