"""What rules know of relations: phrases for an answer, facts that are asked of answers, and the reverse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from remend.expansion.premise import ANSWER_TOKENS
from remend.tasks.base import Task


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
def _content() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("relations.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


@cache
def facts_about() -> Mapping[str, tuple[Hop, ...]]:
    """Return the facts that are asked of answers, by the kind of the answer."""
    return {
        kind: tuple(
            Hop(question, entry["statement"], tuple((of, fact) for of, fact in entry["examples"]))
            for question, entry in entries.items()
        )
        for kind, entries in _content()["hops"].items()
    }


@cache
def relations() -> Mapping[str, Relation]:
    """Return the relations that rules know, by the name of the question."""
    return {
        name: Relation(
            tuple(entry["nouns"]),
            tuple(hop for kind in entry["answers"] for hop in facts_about()[kind]),
            frozenset(entry.get("direct", ())),
            entry.get("inverse", ""),
            entry.get("inverse_question", ""),
        )
        for name, entry in _content()["relations"].items()
    }
