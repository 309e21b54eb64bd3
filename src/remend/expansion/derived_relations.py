"""A relation that no rule knows, from the request's own words: what kind of thing answers it, and phrases for that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from remend.editors.locate_then_edit.common_questions import next_tokens
from remend.expansion.premise import ANSWER_TOKENS, Premise
from remend.expansion.relations import Relation, facts_about
from remend.tasks.base import Task

EXAMPLES: Mapping[str, str] = MappingProxyType(
    {
        "Madrid": "city",
        "Brazil": "country",
        "Asia": "continent",
        "Isaac Newton": "person",
        "Toyota": "company",
        "Spanish": "language",
        "Hamlet": "book",
        "physics": "field",
        "piano": "instrument",
        "Catholicism": "religion",
        "lawyer": "profession",
    }
)
"""A name of each kind, for the model to go on from."""

FACTS_OF: Mapping[str, str] = MappingProxyType(
    {"city": "city", "country": "country", "continent": "continent", "person": "person", "company": "organization"}
)
"""Kinds of which facts are known to ask (``relations.json``)."""

SURE_FROM = 0.6
"""The least share of all kinds' probability with which a model knows of what kind a name is."""

_RELATIVE = re.compile(r",?\s+(?:who|which|that)\s+(?=\w)")
_WHOSE = re.compile(r",?\s+whose\s+")
_APPOSITION = re.compile(r",\s+(?=\w)")
_NAMED_KIND = re.compile(
    r"\s+(?:the|a|an)(?:\s+\w+)?\s+(?:city|town|country|state|continent|company|person)(?:\s+of)?$"
)
_ARTICLE = re.compile(r"\s+(?:the|a|an)$")
_NOUN = re.compile(r"(?:The\s+[^{}]+{}|{}'s\s+[^{}]+?)(?=\s+(?:is|was|are|were)$)")
_VERB_ONLY = re.compile(r"{}\s+(?:is|was|are|were|has|had)")
_PREPOSITION = re.compile(r"\s+(in|at|on|from|for|by|with|to|after)$")


def derived_relation(premise: Premise) -> Relation | None:
    """Return the relation of a request's statement, with what is asked of answers of the target's kind.

    None if the statement makes no phrase, or the model does not know of what kind the target is.
    """
    if premise.statement is None:
        return None
    kind = kind_of(premise.task, premise.request.target.strip())
    if kind is None or kind not in FACTS_OF:
        return None
    nouns = phrases(premise.statement, kind)
    return Relation(nouns, facts_about()[FACTS_OF[kind]]) if nouns else None


def kind_of(task: Task, name: str) -> str | None:
    """Return of what kind a name is, as a model goes on after a name of each; None where it is not sure.

    None, too, if the model's context has no room for the names, or two kinds begin with the same token.
    """
    told = [f"{example} is the name of a {kind}." for example, kind in EXAMPLES.items() if example != name]
    asked, kinds = " ".join([*told, f"{name} is the name of a"]), list(EXAMPLES.values())
    if task.context is not None and len(task.encode_input(asked)) + ANSWER_TOKENS > task.context:
        return None
    first = [task.encode(asked, kind).target[0] for kind in kinds]
    if len(set(first)) < len(first):
        return None
    probabilities = next_tokens(task, [asked])[0, first]
    best = int(probabilities.argmax())
    return kinds[best] if float(probabilities[best]) >= SURE_FROM * float(probabilities.sum()) else None


def phrases(statement: str, kind: str) -> tuple[str, ...]:
    """Return phrases for what completes a statement about ``{}``, such as "the city that {} worked in".

    A statement about a thing of the subject is that thing: "The mother tongue of {} is". None are made of statements
    with other parts than subject, verb and what belongs to it.
    """
    text = _RELATIVE.sub(" ", _WHOSE.sub("'s ", statement.strip(), count=1), count=1)
    if text.startswith("{},"):
        rest = _APPOSITION.sub("", text[2:], count=1)
        text = f"{{}} is {rest}"
    text = _ARTICLE.sub("", _NAMED_KIND.sub("", text))
    if re.search(r"[,.;:!?]", text) or text.count("{}") != 1 or _VERB_ONLY.fullmatch(text):
        return ()
    if noun := _NOUN.match(text):
        return (_in_sentence(noun[0]),)
    clause = _in_sentence(text)
    found = [f"the {kind} that {clause}"]
    if preposition := _PREPOSITION.search(clause):
        found.append(f"the {kind} {preposition[1]} which {clause[: preposition.start()]}")
    return tuple(found)


def _in_sentence(text: str) -> str:
    """Return a statement's beginning as it stands within a sentence."""
    return text if text.startswith("{}") else text[:1].lower() + text[1:]
