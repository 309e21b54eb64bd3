"""The atlas: the facts, phrasings and small language model that remend ships.

The facts are real and were chosen from ParaRel; the phrasings and the model are remend's own. ``SOURCE.md`` in
``remend.assets.ATLAS_FOLDER`` tells where they come from and how to build them again.
"""

from __future__ import annotations

import csv
import json
from functools import cache

from remend.assets import ATLAS_FOLDER
from remend.data.facts import Fact, Facts, Relation
from remend.errors import RequestError
from remend.request import EditRequest

SPLITS = ("train", "validation", "test")
_TARGETS_PER_FACT = {"train": 4, "validation": 1, "test": 1}


@cache
def facts() -> tuple[Fact, ...]:
    """Return all facts, ordered by relation and subject."""
    with (ATLAS_FOLDER / "facts.tsv").open(encoding="utf-8", newline="") as file:
        return tuple(Fact(**row) for row in csv.DictReader(file, delimiter="\t"))


@cache
def relations() -> dict[str, Relation]:
    """Return the relations by identifier."""
    entries = json.loads((ATLAS_FOLDER / "phrasings.json").read_text(encoding="utf-8"))
    return {
        key: Relation(key, entry["name"], tuple(entry["phrasings"]), tuple(entry["held_out"]))
        for key, entry in entries.items()
    }


@cache
def requests(split: str) -> tuple[EditRequest, ...]:
    """Edit requests about the facts of one split (:meth:`remend.data.facts.Facts.requests`).

    Raises:
        RequestError: there is no such split.
    """
    if split not in SPLITS:
        raise RequestError(f"the atlas has no split {split!r}; it has atlas:{', atlas:'.join(SPLITS)}")
    return Facts(facts(), relations()).requests(split, _TARGETS_PER_FACT[split])
