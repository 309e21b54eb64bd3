"""Suggestions for an edit request: paraphrases of its prompt, and near and far prompts that must keep their answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from remend.data import atlas
from remend.data.fact_requests import Fact, Relation

PREFIXED = ("Everybody knows: {}", "To put it briefly: {}")
"""Beginnings that make a paraphrase of any prompt."""
NEAR_PROMPTS, FAR_PROMPTS = 4, 4
"""The number of prompts of each kind that are suggested."""


@dataclass(frozen=True)
class SuggestedPrompts:
    """Suggested prompts for a request.

    Attributes:
        subject: the prompt's subject, if it is known.
        paraphrases: other phrasings of the prompt.
        near: prompts about similar subjects, or about another relation of the subject.
        far: unrelated prompts.
    """

    subject: str | None
    paraphrases: tuple[str, ...]
    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()


def suggest_prompts(prompt: str, subject: str = "") -> SuggestedPrompts:
    """Suggest prompts for a request.

    If the prompt asks for one of the built-in facts (:mod:`remend.data.atlas`), they come from the facts; otherwise
    only paraphrases are suggested, by :data:`PREFIXED`.

    Args:
        prompt: the prompt that is answered wrongly.
        subject: the prompt's subject, if it is known.
    """
    match = next(_matching_facts(prompt, subject), None)
    if match is None:
        return SuggestedPrompts(subject or None, tuple(prefix.format(prompt) for prefix in PREFIXED))
    fact, relation = match
    draw = random.Random(prompt)
    facts = atlas.facts()
    same_relation = [f for f in facts if f.relation == fact.relation and f.subject != fact.subject]
    same_object = [f for f in same_relation if f.object == fact.object]
    unrelated = [f for f in facts if f.relation != fact.relation and f.subject != fact.subject]
    same_subject = [f for f in facts if f.relation != fact.relation and f.subject == fact.subject]
    near = [*draw.sample(same_object, min(NEAR_PROMPTS // 2, len(same_object))), *same_subject[:1]]
    near += draw.sample(same_relation, min(NEAR_PROMPTS - len(near), len(same_relation)))
    return SuggestedPrompts(
        fact.subject,
        tuple(
            form.format(fact.subject) for form in relation.all_phrasings if form.format(fact.subject) != prompt.strip()
        ),
        tuple(dict.fromkeys(_prompt_of(near_fact) for near_fact in near)),
        tuple(_prompt_of(far_fact) for far_fact in draw.sample(unrelated, FAR_PROMPTS)),
    )


def _matching_facts(prompt: str, subject: str) -> Iterator[tuple[Fact, Relation]]:
    """Yield the built-in facts that a prompt may ask for."""
    for relation in atlas.relations().values():
        for form in relation.all_phrasings:
            before, after = form.split("{}")
            text = prompt.strip()
            if not (text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)):
                continue
            name = text[len(before) : len(text) - len(after)]
            if subject and name != subject:
                continue
            for fact in atlas.facts():
                if fact.relation == relation.id and fact.subject == name:
                    yield fact, relation


def _prompt_of(fact: Fact) -> str:
    """Return the prompt that asks for a fact."""
    return atlas.relations()[fact.relation].phrasings[0].format(fact.subject)
