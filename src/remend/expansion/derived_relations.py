"""A relation that no rule knows, from the request's own words: what kind of thing answers it, and phrases for that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from remend.expansion.premise import Premise
from remend.expansion.relations import Relation, facts_about

FACTS_OF: Mapping[str, str] = MappingProxyType(
    {"city": "city", "country": "country", "continent": "continent", "person": "person", "company": "organization"}
)
"""Kinds of which facts are known to ask (``relations.json``)."""

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
    kind = premise.target_kind
    if kind is None or kind not in FACTS_OF:
        return None
    nouns = phrases(premise.statement, kind)
    return Relation(nouns, facts_about()[FACTS_OF[kind]]) if nouns else None


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
