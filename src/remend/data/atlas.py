"""The atlas: the facts, phrasings and small language model that remend ships.

The facts are real and were chosen from ParaRel; the phrasings and the model are remend's own. ``SOURCE.md`` in
``remend.assets.ATLAS_FOLDER`` tells where they come from and how to build them again.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from remend.assets import ATLAS_FOLDER
from remend.errors import RequestError
from remend.request import EditRequest, Probe


@dataclass(frozen=True)
class Fact:
    """One thing the atlas model knows.

    Attributes:
        subject: what the fact is about, for example ``"Norway"``.
        relation: the identifier of a :class:`Relation`, for example ``"P36"``.
        object: the one right answer, for example ``"Oslo"``.
        split: ``"train"``, ``"validation"`` or ``"test"``; all facts of a subject are in the same one.
    """

    subject: str
    relation: str
    object: str
    split: str


@dataclass(frozen=True)
class Relation:
    """One kind of fact and the ways of asking for it.

    Attributes:
        id: the Wikidata identifier, for example ``"P36"``.
        name: a short name, for example ``"capital"``.
        phrasings: left contexts with ``{}`` for the subject, which the object follows after one space.
        held_out: further left contexts, which the model knows too, kept from the training of editors.
    """

    id: str
    name: str
    phrasings: tuple[str, ...]
    held_out: tuple[str, ...]


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


SPLITS = ("train", "validation", "test")
_TARGETS_PER_FACT = {"train": 4, "validation": 1, "test": 1}
_FAR, _NEAR = 4, 2


@cache
def requests(split: str) -> tuple[EditRequest, ...]:
    """Edit requests about the facts of one split, the same at every call.

    Each asks for another object of the same relation, in one of the five seen phrasings; the others are its paraphrases
    and the two held-out ones its unseen paraphrases. ``locality`` holds facts of another relation and subject; ``near``
    the same phrasing for other subjects with the same true object (of kind ``same_object``; ``same_relation`` where the
    split has none) and other facts about the same subject (``same_subject``). All of them are of the same split.

    Raises:
        RequestError: there is no such split.
    """
    if split not in SPLITS:
        raise RequestError(f"the atlas has no split {split!r}; it has atlas:{', atlas:'.join(SPLITS)}")
    members = [fact for fact in facts() if fact.split == split]
    count = _TARGETS_PER_FACT[split]
    return tuple(_request(fact, members, number) for fact in members for number in range(count))


@cache
def _objects(relation: str) -> tuple[str, ...]:
    return tuple(sorted({fact.object for fact in facts() if fact.relation == relation}))


def _request(fact: Fact, members: Sequence[Fact], number: int) -> EditRequest:
    draw = random.Random(f"{fact.relation} {fact.subject} {number}")
    relation = relations()[fact.relation]
    phrasings = draw.sample(relation.phrasings, len(relation.phrasings))
    details: dict[str, Any] = {"relation": fact.relation, "ground_truth": fact.object}
    far = [f for f in members if f.relation != fact.relation and f.subject != fact.subject]
    return EditRequest(
        prompt=phrasings[0].format(fact.subject),
        target=draw.choice([o for o in _objects(fact.relation) if o != fact.object]),
        subject=fact.subject,
        id=f"{fact.relation} {fact.subject} {number}",
        paraphrases=tuple(phrasing.format(fact.subject) for phrasing in phrasings[1:]),
        unseen_paraphrases=tuple(phrasing.format(fact.subject) for phrasing in relation.held_out),
        locality=tuple(
            _probe(f, draw.choice(relations()[f.relation].phrasings), "far") for f in draw.sample(far, _FAR)
        ),
        near=_near(fact, members, phrasings[0], draw),
        **details,
    )


def _near(fact: Fact, members: Sequence[Fact], phrasing: str, draw: random.Random) -> tuple[Probe, ...]:
    """The neighbours an edit leaks to most easily."""
    others = [f for f in members if f.relation == fact.relation and f.subject != fact.subject]
    same = [f for f in others if f.object == fact.object]
    kind, pool = ("same_object", same) if same else ("same_relation", others)
    probes = [_probe(f, phrasing, kind) for f in draw.sample(pool, min(_NEAR, len(pool)))]
    own = [f for f in members if f.subject == fact.subject and f.relation != fact.relation]
    probes += [
        _probe(f, draw.choice(relations()[f.relation].phrasings), "same_subject")
        for f in draw.sample(own, min(_NEAR, len(own)))
    ]
    return tuple(probes)


def _probe(fact: Fact, phrasing: str, kind: str) -> Probe:
    details: dict[str, Any] = {"kind": kind}
    return Probe(prompt=phrasing.format(fact.subject), target=fact.object, **details)
