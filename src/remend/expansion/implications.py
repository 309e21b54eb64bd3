"""What follows from an edit: other names, facts about its answer, the reverse question, the choice of old and new."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import islice

from remend.data.edit_sets import ALIAS, SetItem
from remend.editors.locate_then_edit.common_questions import frames, next_tokens, statements_of, text_of
from remend.expansion.aliases import with_alias
from remend.expansion.premise import ANSWER_TOKENS, Premise, short_answers
from remend.tasks.base import Task
from remend.tasks.endings import asks

KNOWN_FROM = 0.5
"""The least probability of its first token, after examples, with which the model knows a fact about the target."""

PROMPTS_OF_HOP, MOST_ALIASES = 2, 2
"""Prompts that ask one fact about the target, of the subject by a phrase, and other names of the subject."""


@dataclass(frozen=True)
class Hop:
    """A fact about answers of one kind.

    Attributes:
        question: what it asks, in a word or two.
        statement: the statement that it completes, with ``{}`` for the answer that it is about.
        examples: well-known answers with it. A small model that knows a fact says it after some of the same kind.
    """

    question: str
    statement: str
    examples: tuple[tuple[str, str], ...]

    def after_examples(self, name: str, task: Task | None = None) -> str:
        """Return the statement about a name after those about the examples, without the name's own.

        Of a task, after as many of them as its context has room for.
        """
        told = [f"{self.statement.replace('{}', of)} {fact}." for of, fact in self.examples if of != name]
        asked = self.statement.replace("{}", name)
        while told and task is not None and task.context is not None:
            if len(task.encode_input(" ".join([*told, asked]))) + ANSWER_TOKENS <= task.context:
                break
            told.pop()
        return " ".join([*told, asked])


@dataclass(frozen=True)
class Relation:
    """What rules know of a relation between a subject and its answer.

    Attributes:
        nouns: the answer as phrases, with ``{}`` for the subject.
        hops: facts about such answers.
        direct: what of them holds of the subject itself: where a country is, there is what lies in it.
        inverse: the statement about the answer that the subject completes, and
        inverse_question: the question; both are empty where many subjects have one answer.
    """

    nouns: tuple[str, ...]
    hops: tuple[Hop, ...]
    direct: frozenset[str] = frozenset()
    inverse: str = ""
    inverse_question: str = ""


@cache
def relations() -> dict[str, Relation]:
    """Return the relations that rules know, by the name of the question."""
    text = resources.files(__package__).joinpath("relations.json").read_text(encoding="utf-8")
    content = json.loads(text)
    hops = {
        kind: tuple(
            Hop(question, entry["statement"], tuple((of, fact) for of, fact in entry["examples"]))
            for question, entry in entries.items()
        )
        for kind, entries in content["hops"].items()
    }
    return {
        name: Relation(
            tuple(entry["nouns"]),
            tuple(hop for kind in entry["answers"] for hop in hops[kind]),
            frozenset(entry.get("direct", ())),
            entry.get("inverse", ""),
            entry.get("inverse_question", ""),
        )
        for name, entry in content["relations"].items()
    }


def relation_of(premise: Premise) -> Relation | None:
    """Return the relation that a request asks for, where rules know it."""
    return relations().get(premise.question or "")


def moved_questions(premise: Premise) -> frozenset[str]:
    """Return the common questions about a request's subject that an edit may change: its own, and what follows."""
    relation = relation_of(premise)
    return premise.near if relation is None else premise.near | relation.direct


def implications(premise: Premise, most: int) -> list[SetItem]:
    """Return prompts with answers that follow from a request.

    Args:
        premise: what is asked.
        most: the most prompts.
    """
    relation = relation_of(premise)
    found = [*_aliases(premise), *_choices(premise)]
    if relation is not None:
        found += [*_hops(premise, relation), *_reverse(premise, relation)]
    return found[:most]


def _aliases(premise: Premise) -> Iterator[SetItem]:
    """Yield the request's prompt about other names of its subject."""
    for text, alias in islice(with_alias(text_of(premise.request), premise.subject), MOST_ALIASES):
        yield SetItem(
            item="implication",
            kind=ALIAS,
            made="another way to write the name",
            sure=0.9,
            prompt=premise.in_form(text),
            target=premise.request.target,
            subject=alias,
        )


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
    about_new = [hop.after_examples(new, task) for hop in relation.hops]
    known = next_tokens(task, about_new).amax(1).tolist()
    answers = short_answers(task, about_new)
    before = (
        short_answers(task, [hop.after_examples(old, task) for hop in relation.hops]) if old else [""] * len(answers)
    )
    for hop, sure, answer, was in zip(relation.hops, known, answers, before, strict=True):
        if sure < KNOWN_FROM or not answer or answer.casefold() in (was.casefold(), new.casefold()):
            continue
        for text in _asked(premise, relation, hop):
            yield SetItem(
                item="implication",
                kind="hop",
                made=f"{hop.question} of the answer, as the model knows it",
                sure=round(sure, 2),
                prompt=premise.in_form(text[:1].upper() + text[1:]),
                target=answer,
                answer=was or None,
            )


def _asked(premise: Premise, relation: Relation, hop: Hop) -> list[str]:
    """Return how a fact about the target is asked of the subject: by phrases, each in another form."""
    names = [noun.replace("{}", premise.subject) for noun in relation.nouns]
    if hop.question in relation.direct:
        names.insert(1, premise.subject)
    if asks(premise.request.prompt):
        forms = [frame.template for frame in frames("questions") if frame.question == hop.question]
    else:
        forms = [hop.statement, *(text for text in statements_of(hop.question) if text != hop.statement)]
    return [forms[i % len(forms)].replace("{}", name) for i, name in enumerate(names[:PROMPTS_OF_HOP])]
