"""Edit requests with compositions: what follows from an edit by a second fact, which no request tells.

    python benchmarks/real_compositions.py build/real/smollm2

"Danielle Darrieux is a citizen of" → Italy, and the capital of the country of which she is a citizen is Rome: two
facts of ParaRel (T-REx) in a row. A composition is used where the unedited model answers it rightly for the true
object, and knows the second fact of the new one: what is left is whether the edit is followed. Where an answer has one
subject only, the reverse question is asked as well. Splits are those of ``real_requests.py``. Written to
``build/real/requests/MODEL-compositions-SPLIT.jsonl``, the compositions as ``portability``.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from real_requests import Fact, World, answers_with, make_request, write_splits
from remend.request import EditRequest, Probe
from remend.tasks.base import Task

NOUNS: Mapping[str, Sequence[str]] = {
    "P17": ("the country that {} belongs to", "the country where {} is found"),
    "P19": ("the city where {} was born", "the city of birth of {}"),
    "P20": ("the city where {} died", "the city of death of {}"),
    "P27": ("the country that {} is a citizen of", "the home country of {}"),
    "P36": ("the capital city of {}", "the city that is the capital of {}"),
    "P131": ("the area where {} is found", "the region that {} belongs to"),
    "P159": ("the city where {} is headquartered", "the city of the headquarters of {}"),
    "P176": ("the company that produces {}", "the company that makes {}"),
    "P178": ("the company that created {}", "the company that wrote {}"),
    "P276": ("the place where {} is found", "the location of {}"),
    "P495": ("the country where {} was created", "the country that {} comes from"),
    "P740": ("the city where {} started", "the city that {} comes from"),
    "P937": ("the city where {} used to work", "the city of the workplace of {}"),
}
"""The object of a fact as phrases, by relation. None stands in the sets of :mod:`remend.expansion`."""

HOPS: Mapping[str, Sequence[str]] = {
    "P30": ("{} is located in the continent of", "{} is part of the continent of"),
    "P36": ("The capital of {} is", "The capital city of {} is"),
    "P37": ("The official language of {} is", "The language that people speak in {} is"),
    "P159": ("The headquarters of {} are in", "{} is headquartered in"),
    "P1376": ("{} is the capital of", "{} is the capital city of"),
}
"""What is asked of that object."""

REVERSE: Mapping[str, Sequence[str]] = {
    "P36": ("{} is the capital of", "{} is the capital city of"),
    "P1376": ("The capital of {} is", "The capital city of {} is"),
}
"""Statements about the object that the subject completes, where an object has one subject."""

MOST_COMPOSITIONS, TARGETS_TRIED, MOST_OF_CHAIN = 6, 8, 0.2
"""Compositions of one request, new objects that are tried, and the largest share of a pair of relations."""


@dataclass(frozen=True)
class Chain:
    """A composition: what is asked of the object of a fact, by a phrase for it.

    Attributes:
        hop: the relation that is asked of the object.
        noun, statement: the phrase for the object, with ``{}`` for the subject, and the statement about it.
    """

    hop: str
    noun: str
    statement: str

    def about(self, subject: str) -> str:
        """Return the prompt about a subject."""
        text = self.statement.replace("{}", self.noun.replace("{}", subject))
        return text[:1].upper() + text[1:]


def chains(relation: str) -> list[Chain]:
    """Return the compositions that begin with a relation."""
    return [
        Chain(hop, noun, statement)
        for hop, statements in HOPS.items()
        for noun in NOUNS.get(relation, ())
        for statement in statements
    ]


def compositions(task: Task, world: World, split: str, count: int) -> list[EditRequest]:
    """Return requests on facts that the model knows, of which it answers compositions rightly."""
    requests: list[EditRequest] = []
    of_chain: Counter[tuple[str, str]] = Counter()
    facts = [
        fact
        for fact in world.facts(split)
        if any(fact.object in world.objects[chain.hop] for chain in chains(fact.relation))
    ]
    for start in range(0, len(facts), 128):
        chunk = facts[start : start + 128]
        known = answers_with(task, [f.phrasing.format(f.subject) for f in chunk], [f.object for f in chunk])
        for fact, knows in zip(chunk, known, strict=True):
            if not knows or len(requests) >= count:
                continue
            full = {hop for hop in HOPS if of_chain[fact.relation, hop] >= MOST_OF_CHAIN * count}
            if (request := _composed(task, world, split, fact, full)) is not None:
                of_chain.update({(fact.relation, probe.model_extra["kind"]) for probe in request.portability})
                requests.append(_without_number(request))
        print(f"{len(requests)} of {count} after {start + 128} facts", file=sys.stderr, flush=True)
        if len(requests) >= count:
            break
    return requests


def _composed(task: Task, world: World, split: str, fact: Fact, full: set[str]) -> EditRequest | None:
    """Return the request of a fact with compositions of which the model answers those of the true object, if any."""
    rng = random.Random(f"{split} {fact.subject} {fact.relation} composed")
    asked = [chain for chain in chains(fact.relation) if chain.hop not in full]
    asked = [chain for chain in asked if fact.object in world.objects[chain.hop]]
    if not asked:
        return None
    true = [world.objects[chain.hop][fact.object] for chain in asked]
    right = answers_with(task, [chain.about(fact.subject) for chain in asked], true)
    asked = [chain for chain, is_right in zip(asked, right, strict=True) if is_right]
    if not asked:
        return None
    others = sorted(set(world.objects[fact.relation].values()) - {fact.object})
    others = [other for other in others if any(other in world.objects[chain.hop] for chain in asked)]
    for target in rng.sample(others, min(TARGETS_TRIED, len(others))):
        if follows := _known_of(task, world, fact, target, asked):
            chosen = rng.sample(follows, min(MOST_COMPOSITIONS, len(follows)))
            changed = Fact(fact.subject, fact.relation, fact.object, fact.phrasing, target)
            request = make_request(task, world, split, changed)
            return request.model_copy(update={"portability": tuple(chosen + _reversed(fact, target))})
    return None


def _known_of(task: Task, world: World, fact: Fact, target: str, asked: Sequence[Chain]) -> list[Probe]:
    """Return the compositions that have another answer with a new object, and one that the model knows of it."""
    new = [(chain, world.objects[chain.hop].get(target)) for chain in asked]
    moved = [(c, o) for c, o in new if o and o not in (world.objects[c.hop][fact.object], target)]
    if not moved:
        return []
    knows = answers_with(task, [c.statement.replace("{}", target) for c, _ in moved], [o for _, o in moved])
    return [
        Probe.model_validate({"prompt": chain.about(fact.subject), "target": answer, "kind": chain.hop})
        for (chain, answer), known in zip(moved, knows, strict=True)
        if known
    ]


def _reversed(fact: Fact, target: str) -> list[Probe]:
    return [
        Probe.model_validate({"prompt": text.replace("{}", target), "target": fact.subject, "kind": "reverse"})
        for text in REVERSE.get(fact.relation, ())
    ]


def _without_number(request: EditRequest) -> EditRequest:
    """Return a request whose compositions are of one kind; what each asks stands in its prompt."""
    kinds = ["reverse" if probe.kind == "reverse" else "composition" for probe in request.portability]
    probes = [p.model_copy(update={"kind": kind}) for p, kind in zip(request.portability, kinds, strict=True)]
    return request.model_copy(update={"portability": tuple(probes)})


if __name__ == "__main__":
    write_splits(__doc__, "-compositions", 40, lambda task, source: partial(compositions, task, World(source)))
