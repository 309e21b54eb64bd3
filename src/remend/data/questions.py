"""The atlas's facts as questions, for an encoder-decoder that answers them.

A T5 that ships with remend (``remend.load("questions")``) knows them all, in all phrasings.
"""

from __future__ import annotations

from functools import cache

from remend.assets import QUESTIONS, QUESTIONS_FOLDER
from remend.data import atlas
from remend.data.facts import Facts, read_relations
from remend.request import EditRequest


@cache
def known() -> Facts:
    """Return the facts with the questions that ask for them."""
    return Facts(atlas.facts(), read_relations(QUESTIONS_FOLDER / "phrasings.json"))


@cache
def requests(split: str) -> tuple[EditRequest, ...]:
    """Edit requests about the facts of one split (:meth:`remend.data.facts.Facts.requests`).

    Raises:
        RequestError: there is no such split.
    """
    return known().requests(atlas.checked(split, QUESTIONS), atlas.TARGETS[split])
