"""Edit requests from triples of subject, relation and object, with probes of the facts that an edit can disturb."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from remend.request import EditRequest, Probe

FAR_PROBES = 4
"""The number of far probes of a request."""
NEAR_PROBES = 2
"""The largest number of near probes of each kind."""


@dataclass(frozen=True)
class Fact:
    """A triple of subject, relation and object that a model knows.

    Attributes:
        subject: the subject, for example ``"Norway"``.
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
    """A kind of fact, with the prompts that ask for it.

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
    def all_phrasings(self) -> tuple[str, ...]:
        """The phrasings and those that are held out."""
        return self.phrasings + self.held_out


def read_relations(path: Path) -> dict[str, Relation]:
    """Return the relations of a JSON file by identifier."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: Relation(key, entry["name"], tuple(entry["phrasings"]), tuple(entry["held_out"]))
        for key, entry in entries.items()
    }


@dataclass(frozen=True)
class OtherFacts:
    """The facts of a split that the probes of a fact's requests may ask for.

    Attributes:
        unrelated: those of another relation and subject.
        same_relation: those of the same relation about other subjects.
        same_subject: those of other relations about the same subject.
    """

    unrelated: Sequence[Fact]
    same_relation: Sequence[Fact]
    same_subject: Sequence[Fact]


class FactSet:
    """A set of facts with their relations, from which edit requests are drawn.

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
        """Return edit requests about the facts of one split, the same at every call; ``targets`` of them for each fact.

        Each asks for another object of the same relation, in one of the seen phrasings; the others are its paraphrases
        and the held-out ones its unseen paraphrases. ``locality`` holds facts of another relation and subject; ``near``
        the same phrasing for other subjects with the same true object (of kind ``same_object``; ``same_relation`` where
        the split has none) and other facts about the same subject (``same_subject``). All are of the same split.
        """
        return tuple(
            self._request(fact, others, number)
            for fact, others in _with_others([fact for fact in self.facts if fact.split == split])
            for number in range(targets)
        )

    def _request(self, fact: Fact, others: OtherFacts, number: int) -> EditRequest:
        # Seeded with the fact, so that a request does not change when others are added. The order of the draws below
        # decides what is drawn: the built-in requests, and all figures measured on them, depend on it.
        rng = random.Random(f"{fact.relation} {fact.subject} {number}")
        phrasings, target = self._draw_phrasings_and_target(fact, number, rng)
        unseen = [phrasing for phrasing in self.relations[fact.relation].held_out if phrasing not in phrasings]
        far = rng.sample(others.unrelated, FAR_PROBES)
        details: dict[str, Any] = {"relation": fact.relation, "ground_truth": fact.object}
        return EditRequest(
            prompt=phrasings[0].format(fact.subject),
            target=target,
            subject=fact.subject,
            id=f"{fact.relation} {fact.subject} {number}",
            paraphrases=tuple(phrasing.format(fact.subject) for phrasing in phrasings[1:]),
            unseen_paraphrases=tuple(phrasing.format(fact.subject) for phrasing in unseen),
            locality=tuple(_probe(other, self._draw_phrasing(other, rng), "far") for other in far),
            near=self._near_probes(fact, others, phrasings[0], rng),
            **details,
        )

    def _draw_phrasings_and_target(self, fact: Fact, number: int, rng: random.Random) -> tuple[list[str], str]:
        """Return the phrasings of one of a fact's requests, that of the prompt first, and the target."""
        phrasings = self.relations[fact.relation].phrasings
        shuffled = rng.sample(phrasings, len(phrasings))
        return shuffled, rng.choice([object_ for object_ in self.objects[fact.relation] if object_ != fact.object])

    def _near_probes(self, fact: Fact, others: OtherFacts, phrasing: str, rng: random.Random) -> tuple[Probe, ...]:
        """Return probes of the facts to which an edit leaks most easily."""
        same_object = [other for other in others.same_relation if other.object == fact.object]
        kind, pool = ("same_object", same_object) if same_object else ("same_relation", others.same_relation)
        probes = [_probe(other, phrasing, kind) for other in sample_near_facts(pool, rng)]
        same_subject = sample_near_facts(others.same_subject, rng)
        return (
            *probes,
            *(_probe(other, self._draw_phrasing(other, rng), "same_subject") for other in same_subject),
        )

    def _draw_phrasing(self, fact: Fact, rng: random.Random) -> str:
        return rng.choice(self.relations[fact.relation].phrasings)


def _with_others(facts: Sequence[Fact]) -> Iterator[tuple[Fact, OtherFacts]]:
    """Yield each fact with the others that its probes may ask for, in their order.

    For each, only the facts of its relation and of its subject are looked at: a set holds thousands.
    """
    of_relation, of_subject = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for place, fact in enumerate(facts):
        of_relation[fact.relation].append(place)
        of_subject[fact.subject].append(place)
    for fact in facts:
        relation, subject = of_relation[fact.relation], of_subject[fact.subject]
        is_unrelated = bytearray(b"\1") * len(facts)
        for place in (*relation, *subject):
            is_unrelated[place] = False
        yield (
            fact,
            OtherFacts(
                unrelated=list(compress(facts, is_unrelated)),
                same_relation=[facts[place] for place in relation if facts[place].subject != fact.subject],
                same_subject=[facts[place] for place in subject if facts[place].relation != fact.relation],
            ),
        )


def sample_near_facts(pool: Sequence[Fact], rng: random.Random) -> list[Fact]:
    """Return up to :data:`NEAR_PROBES` facts of a pool, drawn at random."""
    return rng.sample(pool, min(NEAR_PROBES, len(pool)))


def _probe(fact: Fact, phrasing: str, kind: str) -> Probe:
    details: dict[str, Any] = {"kind": kind}
    return Probe(prompt=phrasing.format(fact.subject), target=fact.object, **details)
