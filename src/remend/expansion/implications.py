"""What follows from an edit: facts about its answer, the reverse question, the choice between old and new."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources

from remend.data.edit_sets import SetItem
from remend.editors.locate_then_edit.common_questions import frames, next_tokens, text_of
from remend.expansion.premise import Premise, short_answers
from remend.tasks.endings import asks

KNOWN_FROM = 0.3
"""The least probability of its first token with which the model knows a fact about the target."""


@dataclass(frozen=True)
class Relation:
    """What rules know of a relation between a subject and its answer.

    Attributes:
        noun: the answer as a phrase, with ``{}`` for the subject.
        hops: statements about such answers, with ``{}`` for the answer, by the name of what they ask.
        inverse: the statement about the answer that the subject completes, and
        inverse_question: the question; both are empty where many subjects have one answer.
    """

    noun: str
    hops: dict[str, str]
    inverse: str = ""
    inverse_question: str = ""


@cache
def relations() -> dict[str, Relation]:
    """Return the relations that rules know, by the name of the question."""
    text = resources.files(__package__).joinpath("relations.json").read_text(encoding="utf-8")
    content = json.loads(text)
    return {
        name: Relation(
            entry["noun"],
            content["hops"][entry["answer"]],
            entry.get("inverse", ""),
            entry.get("inverse_question", ""),
        )
        for name, entry in content["relations"].items()
    }


def relation_of(premise: Premise) -> Relation | None:
    """Return the relation that a request asks for, where rules know it."""
    return relations().get(premise.question or "")


def implications(premise: Premise, most: int) -> list[SetItem]:
    """Return prompts with answers that follow from a request.

    Args:
        premise: what is asked.
        most: the most prompts.
    """
    relation = relation_of(premise)
    found = list(_choices(premise))
    if relation is not None:
        found += [*_reverse(premise, relation), *_hops(premise, relation)]
    return found[:most]


def _choices(premise: Premise) -> Iterator[SetItem]:
    """Yield the choice between the old answer and the target, in both orders."""
    old, new = premise.old, premise.request.target
    if not old or old.casefold() == new.casefold():
        return
    text = text_of(premise.request)
    for first, second in ((old, new), (new, old)):
        asked = f"{text} {first} or {second}?" if asks(premise.request.prompt) else f"{first} or {second}? {text}"
        yield SetItem(
            item="implication",
            kind="choice",
            made="old and new answer named",
            prompt=premise.in_form(asked),
            target=new,
        )


def _reverse(premise: Premise, relation: Relation) -> Iterator[SetItem]:
    """Yield the reverse question, where an answer has one subject only."""
    text = relation.inverse_question if asks(premise.request.prompt) else relation.inverse
    if text:
        target = premise.request.target
        yield SetItem(
            item="implication",
            kind="reverse",
            made="the relation turned round",
            sure=0.9,
            prompt=premise.in_form(text.replace("{}", target)),
            target=premise.subject,
            subject=target,
        )


def _hops(premise: Premise, relation: Relation) -> Iterator[SetItem]:
    """Yield what the model knows of the target and not of the old answer, asked of the subject's answer by its role."""
    task, new, old = premise.task, premise.request.target, premise.old
    if not relation.hops:
        return
    about_new = [text.replace("{}", new) for text in relation.hops.values()]
    about_old = [text.replace("{}", old) if old else "" for text in relation.hops.values()]
    known = next_tokens(task, about_new).amax(1).tolist()
    answers = short_answers(task, about_new)
    before = short_answers(task, about_old) if old else [""] * len(answers)
    noun = relation.noun.replace("{}", premise.subject)
    questions = {frame.question: frame for frame in reversed(frames("questions"))}
    for (name, statement), sure, answer, was in zip(relation.hops.items(), known, answers, before, strict=True):
        if sure < KNOWN_FROM or not answer or answer.casefold() in (was.casefold(), new.casefold()):
            continue
        text = questions[name].about(noun) if asks(premise.request.prompt) else statement.replace("{}", noun)
        yield SetItem(
            item="implication",
            kind="hop",
            made=f"{name} of the answer, as the model knows it",
            sure=round(sure, 2),
            prompt=premise.in_form(text[:1].upper() + text[1:]),
            target=answer,
            answer=was or None,
        )
