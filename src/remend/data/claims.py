"""The atlas's facts as claims that are true or false, for a classifier that tells which.

A BERT that ships with remend (``remend.assets.CLAIMS_FOLDER``) knows them all, in all phrasings.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from remend.assets import CLAIMS, CLAIMS_FOLDER
from remend.data import atlas
from remend.data.facts import FAR, Fact, Facts, Relation, far, read_relations, same_relation, same_subject, some
from remend.request import EditRequest, Probe

LABELS = ("false", "true")
"""The classifier's labels, in the order of its outputs."""

_REGIONS = ("P17", "P27", "P131", "P495", "P1376")
"""The relations whose objects are countries, states and the like: what contains the places of other relations."""

_ALIKE = (
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
"""Objects that may both be right, though no fact links them: names of one thing, and parts of another."""


@dataclass(frozen=True)
class Claim:
    """That a fact's object is so and so.

    Attributes:
        fact: what the claim is about.
        object: what it says; the claim is true if it is the fact's own.
    """

    fact: Fact
    object: str

    @property
    def label(self) -> str:
        """``"true"`` or ``"false"``."""
        return LABELS[self.object == self.fact.object]

    def text(self, phrasing: str) -> str:
        """The claim in a phrasing with ``{subject}`` and ``{object}``."""
        return phrasing.format(subject=self.fact.subject, object=self.object)


class Claims(Facts):
    """Facts, and what can be claimed about them.

    Args:
        facts: the facts of all splits.
        relations: by identifier; their phrasings have ``{subject}`` and ``{object}``.
    """

    def __init__(self, facts: Sequence[Fact], relations: dict[str, Relation]) -> None:
        super().__init__(facts, relations)
        linked = {frozenset((fact.subject, fact.object)) for fact in facts} | {frozenset(pair) for pair in _ALIKE}
        regions = {fact.object for fact in facts if fact.relation in _REGIONS}
        self._false = {
            fact: frozenset(
                claimed
                for claimed in self.objects[fact.relation]
                if claimed != fact.object
                and (claimed in regions) == (fact.object in regions)
                and linked.isdisjoint((frozenset((claimed, fact.subject)), frozenset((claimed, fact.object))))
            )
            for fact in facts
        }
        by_relation = {name: [fact.object for fact in facts if fact.relation == name] for name in relations}
        self._weighted = {
            fact: [claimed for claimed in by_relation[fact.relation] if claimed in self._false[fact]] for fact in facts
        }

    def false_objects(self, fact: Fact) -> frozenset[str]:
        """The objects with which a claim about a fact is surely false.

        None is linked to the subject or to the true object by any fact (who died in Stockholm died in Sweden, and who
        grew up with French can write it), or is a region where the true object is a place that may lie in it.
        """
        return self._false[fact]

    def false(self, fact: Fact, draw: random.Random) -> Claim:
        """A false claim about a fact, whose object is drawn as often as facts have it.

        Else most claims about a common object would be true, and could be told by it alone.
        """
        return Claim(fact, draw.choice(self._weighted[fact]))

    def drawn(self, fact: Fact, draw: random.Random) -> Claim:
        """A claim about a fact, as often true as false."""
        return Claim(fact, fact.object) if draw.random() < 0.5 else self.false(fact, draw)

    def _request(self, fact: Fact, members: Sequence[Fact], number: int) -> EditRequest:
        draw = random.Random(f"{fact.relation} {fact.subject} {number}")
        relation = self.relations[fact.relation]
        phrasings = draw.sample(relation.phrasings, len(relation.phrasings))
        claim = self.drawn(fact, draw)
        details: dict[str, Any] = {"relation": fact.relation, "ground_truth": claim.label}
        return EditRequest(
            prompt=claim.text(phrasings[0]),
            target=LABELS[claim.label == LABELS[0]],
            subject=fact.subject,
            id=f"{fact.relation} {fact.subject} {number}",
            paraphrases=tuple(claim.text(phrasing) for phrasing in phrasings[1:]),
            unseen_paraphrases=tuple(claim.text(phrasing) for phrasing in relation.held_out),
            locality=tuple(self._about(f, draw, "far") for f in draw.sample(far(fact, members), FAR)),
            near=self._near_claims(claim, members, phrasings[0], draw),
            **details,
        )

    def _near_claims(
        self, claim: Claim, members: Sequence[Fact], phrasing: str, draw: random.Random
    ) -> tuple[Probe, ...]:
        """The neighbours an edit leaks to most easily, as :meth:`requests` lists them."""
        others = same_relation(claim.fact, members)
        true = claim.object == claim.fact.object
        alike = [f for f in others if (f.object == claim.object if true else claim.object in self._false[f])]
        probes = [_probe(Claim(f, claim.object), phrasing, "same_object") for f in some(alike, draw)]
        if not alike:
            probes = [_probe(self.drawn(f, draw), phrasing, "same_relation") for f in some(others, draw)]
        if another := sorted(self._false[claim.fact] - {claim.object}):
            probes.append(_probe(Claim(claim.fact, draw.choice(another)), phrasing, "another_object"))
        own = some(same_subject(claim.fact, members), draw)
        return (*probes, *(self._about(f, draw, "same_subject") for f in own))

    def _about(self, fact: Fact, draw: random.Random, kind: str) -> Probe:
        return _probe(self.drawn(fact, draw), self._any_phrasing(fact, draw), kind)


def _probe(claim: Claim, phrasing: str, kind: str) -> Probe:
    details: dict[str, Any] = {"kind": kind}
    return Probe(prompt=claim.text(phrasing), target=claim.label, **details)


@cache
def known() -> Claims:
    """Return the facts with the phrasings that claim them."""
    return Claims(atlas.facts(), read_relations(CLAIMS_FOLDER / "phrasings.json"))


@cache
def requests(split: str) -> tuple[EditRequest, ...]:
    """Edit requests about the facts of one split: each flips the label of a claim, as many true ones as false ones.

    The probes are claims with their own labels. ``locality`` holds claims about facts of another relation and subject;
    ``near`` the same phrasing for other subjects with the same object and label (of kind ``same_object``;
    ``same_relation`` where the split has none) and for the same subject with another wrong object
    (``another_object``), and claims about other facts of the same subject (``same_subject``).

    Raises:
        RequestError: there is no such split.
    """
    return known().requests(atlas.checked(split, CLAIMS), atlas.TARGETS[split])
