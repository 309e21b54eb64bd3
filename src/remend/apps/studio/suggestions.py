"""What to look at beside a prompt: other phrasings of it, and prompts near and far that must stay."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from remend.data import atlas
from remend.data.facts import Fact, Relation

ASIDE = ("Everybody knows: {}", "To put it briefly: {}")
"""Beginnings after which any text may be asked again."""
NEAR, FAR = 4, 4
"""Prompts of each kind that are suggested."""


@dataclass(frozen=True)
class Suggested:
    """Prompts to look at.

    Attributes:
        subject: what the prompt seems to be about, if that is known.
        paraphrases: other ways to ask the same.
        near: what is close and must stay.
        far: what has nothing to do with it.
    """

    subject: str | None
    paraphrases: tuple[str, ...]
    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()


def suggest(prompt: str, subject: str = "") -> Suggested:
    """Prompts to look at beside one: of the built-in facts where it asks for one of them, else the same with an aside.

    Args:
        prompt: what is answered wrongly.
        subject: what it is about, if that is told.
    """
    asked = next(_readings(prompt, subject), None)
    if asked is None:
        return Suggested(subject or None, tuple(aside.format(prompt) for aside in ASIDE))
    fact, relation = asked
    draw = random.Random(prompt)
    others = [one for one in atlas.facts() if one.relation == fact.relation and one.subject != fact.subject]
    alike = [one for one in others if one.object == fact.object]
    elsewhere = [one for one in atlas.facts() if one.relation != fact.relation and one.subject != fact.subject]
    same = [one for one in atlas.facts() if one.relation != fact.relation and one.subject == fact.subject]
    near = [*draw.sample(alike, min(NEAR // 2, len(alike))), *same[:1]]
    near += draw.sample(others, min(NEAR - len(near), len(others)))
    return Suggested(
        fact.subject,
        tuple(
            form.format(fact.subject) for form in relation.all_phrasings if form.format(fact.subject) != prompt.strip()
        ),
        tuple(dict.fromkeys(_ask(one) for one in near)),
        tuple(_ask(one) for one in draw.sample(elsewhere, FAR)),
    )


def _readings(prompt: str, subject: str) -> Iterator[tuple[Fact, Relation]]:
    """The built-in facts that a prompt may ask for."""
    for relation in atlas.relations().values():
        for form in relation.all_phrasings:
            before, after = form.split("{}")
            text = prompt.strip()
            if not (text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)):
                continue
            named = text[len(before) : len(text) - len(after)]
            if subject and named != subject:
                continue
            for fact in atlas.facts():
                if fact.relation == relation.id and fact.subject == named:
                    yield fact, relation


def _ask(fact: Fact) -> str:
    return atlas.relations()[fact.relation].phrasings[0].format(fact.subject)
