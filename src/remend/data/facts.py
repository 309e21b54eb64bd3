"""Requests about facts: from triples in several phrasings, with every kind of neighbour that an edit can disturb."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remend.request import EditRequest, Probe

FAR, NEAR = 4, 2
"""How many probes a request has: far ones, and near ones of each kind."""


@dataclass(frozen=True)
class Fact:
    """One thing a model knows.

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
        phrasings: prompts with ``{}`` for the subject, which the object answers or follows after one space.
        held_out: further prompts, which the model knows too, kept from the training of editors.
    """

    id: str
    name: str
    phrasings: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def every(self) -> tuple[str, ...]:
        """All phrasings."""
        return self.phrasings + self.held_out


def read_relations(path: Path) -> dict[str, Relation]:
    """Read relations by identifier from a JSON file."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: Relation(key, entry["name"], tuple(entry["phrasings"]), tuple(entry["held_out"]))
        for key, entry in entries.items()
    }


class Facts:
    """A set of facts with their relations.

    Args:
        facts: the facts of all splits.
        relations: by identifier.
    """

    def __init__(self, facts: Sequence[Fact], relations: Mapping[str, Relation]) -> None:
        self.facts = tuple(facts)
        self.relations = dict(relations)
        self.objects = {
            relation: tuple(sorted({fact.object for fact in facts if fact.relation == relation}))
            for relation in relations
        }

    def requests(self, split: str, targets: int) -> tuple[EditRequest, ...]:
        """Edit requests about the facts of one split, the same at every call; ``targets`` of them for each fact.

        Each asks for another object of the same relation, in one of the seen phrasings; the others are its paraphrases
        and the held-out ones its unseen paraphrases. ``locality`` holds facts of another relation and subject; ``near``
        the same phrasing for other subjects with the same true object (of kind ``same_object``; ``same_relation`` where
        the split has none) and other facts about the same subject (``same_subject``). All are of the same split.
        """
        members = [fact for fact in self.facts if fact.split == split]
        return tuple(self._request(fact, members, number) for fact in members for number in range(targets))

    def _request(self, fact: Fact, members: Sequence[Fact], number: int) -> EditRequest:
        draw = random.Random(f"{fact.relation} {fact.subject} {number}")
        phrasings, target = self._asked(fact, number, draw)
        unseen = [phrasing for phrasing in self.relations[fact.relation].held_out if phrasing not in phrasings]
        details: dict[str, Any] = {"relation": fact.relation, "ground_truth": fact.object}
        return EditRequest(
            prompt=phrasings[0].format(fact.subject),
            target=target,
            subject=fact.subject,
            id=f"{fact.relation} {fact.subject} {number}",
            paraphrases=tuple(phrasing.format(fact.subject) for phrasing in phrasings[1:]),
            unseen_paraphrases=tuple(phrasing.format(fact.subject) for phrasing in unseen),
            locality=tuple(_probe(f, self._any_phrasing(f, draw), "far") for f in draw.sample(far(fact, members), FAR)),
            near=self._near(fact, members, phrasings[0], draw),
            **details,
        )

    def _asked(self, fact: Fact, number: int, draw: random.Random) -> tuple[list[str], str]:
        """The phrasings of one of a fact's requests, that of the prompt first, and the target."""
        phrasings = self.relations[fact.relation].phrasings
        shuffled = draw.sample(phrasings, len(phrasings))
        return shuffled, draw.choice([o for o in self.objects[fact.relation] if o != fact.object])

    def _near(self, fact: Fact, members: Sequence[Fact], phrasing: str, draw: random.Random) -> tuple[Probe, ...]:
        """The neighbours an edit leaks to most easily."""
        others = same_relation(fact, members)
        same = [f for f in others if f.object == fact.object]
        kind, pool = ("same_object", same) if same else ("same_relation", others)
        probes = [_probe(f, phrasing, kind) for f in some(pool, draw)]
        own = some(same_subject(fact, members), draw)
        return (*probes, *(_probe(f, self._any_phrasing(f, draw), "same_subject") for f in own))

    def _any_phrasing(self, fact: Fact, draw: random.Random) -> str:
        return draw.choice(self.relations[fact.relation].phrasings)


def far(fact: Fact, members: Sequence[Fact]) -> list[Fact]:
    """The facts of another relation and subject."""
    return [f for f in members if f.relation != fact.relation and f.subject != fact.subject]


def same_relation(fact: Fact, members: Sequence[Fact]) -> list[Fact]:
    """The facts of the same relation about other subjects."""
    return [f for f in members if f.relation == fact.relation and f.subject != fact.subject]


def same_subject(fact: Fact, members: Sequence[Fact]) -> list[Fact]:
    """The other facts about the same subject."""
    return [f for f in members if f.subject == fact.subject and f.relation != fact.relation]


def some(pool: Sequence[Fact], draw: random.Random) -> list[Fact]:
    """As many facts of a pool as a request has near probes of a kind, if there are so many."""
    return draw.sample(pool, min(NEAR, len(pool)))


def _probe(fact: Fact, phrasing: str, kind: str) -> Probe:
    details: dict[str, Any] = {"kind": kind}
    return Probe(prompt=phrasing.format(fact.subject), target=fact.object, **details)
