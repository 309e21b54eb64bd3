"""The built-in facts as questions, for an encoder-decoder that answers them.

The T5 of ``remend.load("questions")`` knows the answers to all of them, in all phrasings.
"""

from __future__ import annotations

from functools import cache

from remend.assets import QUESTIONS_FOLDER
from remend.data import atlas
from remend.data.fact_requests import FactSet, read_relations
from remend.request import EditRequest


@cache
def fact_set() -> FactSet:
    """Return the facts with the questions that ask for them."""
    return FactSet(atlas.facts(), read_relations(QUESTIONS_FOLDER / "phrasings.json"))


@cache
def requests(split: str) -> tuple[EditRequest, ...]:
    """Return edit requests about the facts of one of the atlas's splits (:meth:`.FactSet.requests`)."""
    return fact_set().requests(split, atlas.TARGETS_PER_FACT[split])
