"""``add_probes``: what requests are scored by, made by rules: what follows from an edit, and what must stay near it.

The same rules as those of a set (:mod:`remend.expansion.whole_set`) make them, of what the unedited model knows. What a
request gives to its editor is left out: it would be scored though the editor was told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from remend.data.edit_sets import SetItem
from remend.editors import make_or_load
from remend.editors.locate_then_edit.fit import Fit
from remend.errors import ModelError, RequestError
from remend.expansion.implications import implications, relation_of
from remend.expansion.neighbours import denials, neighbours
from remend.expansion.premise import Premise
from remend.progress import report_progress
from remend.request import EditRequest, Probe, Prompt
from remend.tasks.base import Task
from remend.tasks.endings import asks

MOST_NEAR, MOST_IMPLICATIONS = 12, 12
"""Probes of one request."""

KINDS = {
    "same relation": "same_relation",
    "same relation, same answer": "same_answer",
    "same subject": "same_subject",
    "same subject, same answer": "same_subject",
    "about the target": "about_the_target",
    "about the target, same answer": "about_the_target",
}
"""The kinds of near prompts whose answers are known, as they are called in reports."""


def add_probes(task: Task, requests: Sequence[EditRequest], seed: int = 0) -> list[EditRequest]:
    """Return requests with more to be scored by, as far as rules and the unedited model know it.

    ``portability`` gets the choice between old and new answer, whether the new and the old fact are true (yes or no),
    the reverse question, and facts about the new answer, asked of the subject by a phrase; ``outdated`` the reverse of
    the old fact, and what followed from it; ``negated`` the statement denied; ``near`` the same of well-known others,
    other questions about the subject, and questions about the target.

    Args:
        task: the unedited model, a decoder.
        requests: the requests. Those of which rules know nothing stay as they are.
        seed: of what the model is measured on.

    Raises:
        ModelError: the model is no decoder.
    """
    if not task.causal:
        raise ModelError("probes are made by how a decoder completes statements, and this model is none")
    editor = make_or_load(Fit.info.name, task, (), seed)  # for what it asked the model, which is kept on disk
    assert isinstance(editor, Fit)
    assert editor.questions is not None
    found = []
    for number, request in enumerate(requests):
        report_progress("making probes", number, len(requests))
        try:
            premise = Premise.of(task, request, editor.questions)
        except RequestError:  # no text, or it does not name its subject: there is nothing to make probes of
            found.append(request)
            continue
        found.append(_with_probes(premise, request))
    return found


def _with_probes(premise: Premise, request: EditRequest) -> EditRequest:
    given = {
        *(request.prompt, *request.given_paraphrases, *request.given_near),
        *(probe.prompt for probe in request.given_portability),
    }
    scored = {*given, *request.paraphrases, *request.unseen_paraphrases, *request.formats}

    def new(probes: Iterator[Probe], own: Sequence[Probe]) -> tuple[Probe, ...]:
        asked = scored | {probe.prompt for probe in own}
        return (*own, *{probe.prompt: probe for probe in probes if probe.prompt not in asked}.values())

    follows = implications(premise, MOST_IMPLICATIONS)
    negated = [item.prompt for item in denials(premise)]
    return request.model_copy(
        update={
            "portability": new(_follows(premise, follows), request.portability),
            "outdated": new(_outdated(premise, follows), request.outdated),
            "near": new(_near(premise), request.near),
            "negated": tuple(dict.fromkeys([*request.negated, *(p for p in negated if p not in scored)])),
        }
    )


def _probe(prompt: Prompt, target: str, kind: str) -> Probe:
    return Probe.model_validate({"prompt": prompt, "target": target, "kind": kind})


def _follows(premise: Premise, follows: Sequence[SetItem]) -> Iterator[Probe]:
    """Yield what follows from the edit, and whether the new fact is true, and the old one."""
    for item in follows:
        assert item.target is not None
        yield _probe(item.prompt, item.target, item.kind)
    yield from _yes_or_no(premise)


def _yes_or_no(premise: Premise) -> Iterator[Probe]:
    """Yield whether the new fact is true, and the old one."""
    if premise.statement is None:
        return
    statement = premise.statement.replace("{}", premise.subject)
    if statement.startswith(("The ", "In ", "On ", "At ", "By ", "A ")):
        statement = statement[:1].lower() + statement[1:]
    for answer, truth in ((premise.request.target, "Yes"), (premise.old, "No")):
        if not answer or (truth == "No" and answer.casefold() == premise.request.target.casefold()):
            continue
        question = f"Is it true that {statement} {answer}? Answer yes or no."
        if not asks(premise.request.prompt):
            question = f"Question: {question}\nAnswer:"
        yield _probe(premise.in_form(question), truth, "yes_no")


def _outdated(premise: Premise, follows: Sequence[SetItem]) -> Iterator[Probe]:
    """Yield what the old fact answered: what followed from it, and its reverse."""
    relation = relation_of(premise)
    if relation is None or not premise.old or premise.old.casefold() == premise.request.target.casefold():
        return
    for item in follows:
        if item.kind == "hop" and item.answer:
            yield _probe(item.prompt, item.answer, "hop")
    text = relation.inverse_question if asks(premise.request.prompt) else relation.inverse
    if text:
        yield _probe(premise.in_form(text.replace("{}", premise.old)), premise.subject, "reverse")


def _near(premise: Premise) -> Iterator[Probe]:
    """Yield what must stay, with the answers of the unedited model."""
    for item in neighbours(premise, MOST_NEAR):
        if item.kind in KINDS and item.answer:
            yield _probe(item.prompt, item.answer, KINDS[item.kind])
