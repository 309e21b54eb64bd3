"""The built-in facts as claims that are true or false, for a classifier that tells which.

The BERT of ``remend.load("claims")`` classifies all of them rightly, in all phrasings.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from remend.assets import CLAIMS_FOLDER
from remend.data import atlas
from remend.data.fact_requests import (
    FAR_PROBES,
    Fact,
    FactSet,
    OtherFacts,
    Relation,
    read_relations,
    sample_near_facts,
)
from remend.request import EditRequest, Probe

LABELS = ("false", "true")
"""The classifier's labels, in the order of its outputs."""

_REGIONS = ("P17", "P27", "P131", "P495", "P1376")
"""The relations whose objects are countries, states and the like, in which the places of other relations lie."""

_COMPATIBLE_OBJECTS = (
    ("Constantinople", "Istanbul"),
    ("London", "Westminster"),
    ("London", "Greenwich"),
    ("London", "Camden"),
    ("football", "soccer"),
    ("pitcher", "closer"),
    ("Croatian", "Serbian"),
    ("mathematics", "algebra"),
    ("mathematics", "geometry"),
    ("medicine", "anatomy"),
    ("medicine", "physiology"),
    ("biology", "anatomy"),
    ("biology", "physiology"),
)
"""Pairs of objects that may both be true though no fact links them: two names of a thing, or a part and its whole."""


@dataclass(frozen=True)
class Claim:
    """The claim that a fact has a certain object.

    Attributes:
        fact: the fact.
        object: the claimed object; the claim is true if it is the fact's object.
    """

    fact: Fact
    object: str

    @property
    def label(self) -> str:
        """``"true"`` or ``"false"``."""
        return LABELS[self.object == self.fact.object]

    def text(self, phrasing: str) -> str:
        """Return the claim in a phrasing with ``{subject}`` and ``{object}``."""
        return phrasing.format(subject=self.fact.subject, object=self.object)


class ClaimSet(FactSet):
    """Facts with the true and false claims about them.

    Args:
        facts: the facts of all splits.
        relations: by identifier; their phrasings have ``{subject}`` and ``{object}``.
    """

    def __init__(self, facts: Sequence[Fact], relations: dict[str, Relation]) -> None:
        super().__init__(facts, relations)
        linked = {frozenset((fact.subject, fact.object)) for fact in facts}
        linked |= {frozenset(pair) for pair in _COMPATIBLE_OBJECTS}
        regions = {fact.object for fact in facts if fact.relation in _REGIONS}
        self._false_objects = {
            fact: frozenset(
                claimed
                for claimed in self.objects[fact.relation]
                if claimed != fact.object
                # Who died in Paris died in France, too: a region and a place may both be true.
                and (claimed in regions) == (fact.object in regions)
                and linked.isdisjoint((frozenset((claimed, fact.subject)), frozenset((claimed, fact.object))))
            )
            for fact in facts
        }
        by_relation = {name: [fact.object for fact in facts if fact.relation == name] for name in relations}
        # With repetitions: an object that many facts have is claimed falsely as often. Drawn evenly, most claims about
        # a common object would be true, and a classifier could tell them by the object alone.
        self._weighted_false_objects = {
            fact: [claimed for claimed in by_relation[fact.relation] if claimed in self._false_objects[fact]]
            for fact in facts
        }

    def false_objects(self, fact: Fact) -> frozenset[str]:
        """Return the objects with which a claim about a fact is surely false.

        None is linked to the subject or to the true object by any fact (who died in Stockholm died in Sweden, and who
        grew up with French can write it), or is a region where the true object is a place that may lie in it.
        """
        return self._false_objects[fact]

    def draw_false_claim(self, fact: Fact, rng: random.Random) -> Claim:
        """Return a false claim about a fact, with an object drawn as often as facts have it."""
        return Claim(fact, rng.choice(self._weighted_false_objects[fact]))

    def draw_claim(self, fact: Fact, rng: random.Random) -> Claim:
        """Return a claim about a fact, as often true as false."""
        return Claim(fact, fact.object) if rng.random() < 0.5 else self.draw_false_claim(fact, rng)

    def _request(self, fact: Fact, others: OtherFacts, number: int) -> EditRequest:
        # The order of the draws decides what is drawn, as in FactSet.
        rng = random.Random(f"{fact.relation} {fact.subject} {number}")
        relation = self.relations[fact.relation]
        phrasings = rng.sample(relation.phrasings, len(relation.phrasings))
        claim = self.draw_claim(fact, rng)
        far = rng.sample(others.unrelated, FAR_PROBES)
        details: dict[str, Any] = {"relation": fact.relation, "ground_truth": claim.label}
        return EditRequest(
            prompt=claim.text(phrasings[0]),
            target=LABELS[claim.label == LABELS[0]],  # the other label
            subject=fact.subject,
            id=f"{fact.relation} {fact.subject} {number}",
            paraphrases=tuple(claim.text(phrasing) for phrasing in phrasings[1:]),
            unseen_paraphrases=tuple(claim.text(phrasing) for phrasing in relation.held_out),
            locality=tuple(self._draw_probe(other, rng, "far") for other in far),
            near=self._near_claims(claim, others, phrasings[0], rng),
            **details,
        )

    def _near_claims(self, claim: Claim, others: OtherFacts, phrasing: str, rng: random.Random) -> tuple[Probe, ...]:
        """Return probes of the claims to which an edit leaks most easily, as :func:`requests` lists them."""
        is_true = claim.object == claim.fact.object
        # Facts about which a claim with the same object has the same label.
        same_object = [
            fact
            for fact in others.same_relation
            if (fact.object == claim.object if is_true else claim.object in self._false_objects[fact])
        ]
        probes = [
            _probe(Claim(fact, claim.object), phrasing, "same_object") for fact in sample_near_facts(same_object, rng)
        ]
        if not same_object:
            probes = [
                _probe(self.draw_claim(fact, rng), phrasing, "same_relation")
                for fact in sample_near_facts(others.same_relation, rng)
            ]
        # Sorted, since the order of a set of strings differs between processes.
        if other_objects := sorted(self._false_objects[claim.fact] - {claim.object}):
            probes.append(_probe(Claim(claim.fact, rng.choice(other_objects)), phrasing, "another_object"))
        same_subject = sample_near_facts(others.same_subject, rng)
        return (*probes, *(self._draw_probe(fact, rng, "same_subject") for fact in same_subject))

    def _draw_probe(self, fact: Fact, rng: random.Random, kind: str) -> Probe:
        return _probe(self.draw_claim(fact, rng), self._draw_phrasing(fact, rng), kind)


def _probe(claim: Claim, phrasing: str, kind: str) -> Probe:
    details: dict[str, Any] = {"kind": kind}
    return Probe(prompt=claim.text(phrasing), target=claim.label, **details)


@cache
def claim_set() -> ClaimSet:
    """Return the facts with the phrasings that claim them."""
    return ClaimSet(atlas.facts(), read_relations(CLAIMS_FOLDER / "phrasings.json"))


@cache
def requests(split: str) -> tuple[EditRequest, ...]:
    """Return edit requests about the facts of one split: each flips the label of a claim, half of them of true claims.

    The probes are claims with their true labels. ``locality`` holds claims about facts of another relation and subject;
    ``near`` the same phrasing for other subjects with the same object and label (of kind ``same_object``;
    ``same_relation`` where the split has none) and for the same subject with another wrong object
    (``another_object``), and claims about other facts of the same subject (``same_subject``).
    """
    return claim_set().requests(split, atlas.TARGETS_PER_FACT[split])
