"""The atlas: the facts, phrasings and small language model that remend ships.

The facts are real and were chosen from ParaRel; the phrasings and the model are remend's own. ``SOURCE.md`` in
``remend.assets.ATLAS_FOLDER`` tells where they come from and how to build them again.
"""

from __future__ import annotations

import csv
from functools import cache

from remend.assets import ATLAS, ATLAS_FOLDER
from remend.data.facts import Fact, Facts, Relation, read_relations
from remend.errors import RequestError
from remend.request import EditRequest

TARGETS = {"train": 4, "validation": 1, "test": 1}
"""Requests for each fact of each split."""
SPLITS = tuple(TARGETS)


@cache
def facts() -> tuple[Fact, ...]:
    """Return all facts, ordered by relation and subject."""
    with (ATLAS_FOLDER / "facts.tsv").open(encoding="utf-8", newline="") as file:
        return tuple(Fact(**row) for row in csv.DictReader(file, delimiter="\t"))


@cache
def relations() -> dict[str, Relation]:
    """Return the relations by identifier."""
    return read_relations(ATLAS_FOLDER / "phrasings.json")


@cache
def requests(split: str) -> tuple[EditRequest, ...]:
    """Edit requests about the facts of one split (:meth:`remend.data.facts.Facts.requests`).

    Raises:
        RequestError: there is no such split.
    """
    return Facts(facts(), relations()).requests(checked(split), TARGETS[split])


def checked(split: str, source: str = ATLAS) -> str:
    """Return the name of a split.

    Raises:
        RequestError: there is none of this name.
    """
    if split not in SPLITS:
        known = ", ".join(f"{source}:{name}" for name in SPLITS)
        raise RequestError(f"{source} has no split {split!r}; it has {known}")
    return split
