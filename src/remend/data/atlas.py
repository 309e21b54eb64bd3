"""The atlas: the built-in facts with their phrasings, as edit requests for the small GPT-2 that ships with remend.

The facts are real and were chosen from ParaRel; the phrasings and the model are remend's. ``SOURCE.md`` in
``remend.assets.ATLAS_FOLDER`` says where they come from and how to build them again.
"""

from __future__ import annotations

import csv
from functools import cache

from remend.assets import ATLAS_FOLDER
from remend.data.fact_requests import Fact, FactSet, Relation, read_relations
from remend.request import EditRequest

TARGETS_PER_FACT = {"train": 4, "validation": 1, "test": 1}
"""The number of requests, each with another target, for each fact of a split."""
SPLITS = tuple(TARGETS_PER_FACT)


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
def fact_set() -> FactSet:
    """Return the facts with the phrasings that a language model completes."""
    return FactSet(facts(), relations())


@cache
def requests(split: str) -> tuple[EditRequest, ...]:
    """Return edit requests about the facts of one of :data:`SPLITS`, as :meth:`FactSet.requests` makes them."""
    return fact_set().requests(split, TARGETS_PER_FACT[split])
