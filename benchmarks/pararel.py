"""A second world to measure editors on: a small GPT-2 that knows facts of ParaRel, asked in CounterFact's words.

    python benchmarks/pararel.py --source PARAREL

``PARAREL`` is a folder with ``facts.tsv`` (subject, relation, object) and ``templates.json`` (the phrasings of each
relation with their counts). The model and its tokenizer are trained from nothing, on one thread in about 20 minutes;
they and the edit requests of the three splits are written to ``build/pararel``: nothing of it is part of the package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "scripts"))

from fact_trainer import train_on_facts
from statement_trainer import StatementTrainer, parser

from remend.data.facts import Fact, FactSet, Relation
from remend.request import write_requests

PHRASINGS = 5
"""How each fact is asked: in the relation's commonest phrasings; the last is kept from the training of editors."""

FEWEST, MOST = 5, 12
"""Facts with one object in a relation: enough to have neighbours, too few to be the answer to everything."""

LARGEST = 145
"""Facts of a relation."""

SHARES = {"test": 0.16, "validation": 0.1}
"""Of the subjects; the rest is for training."""

TARGETS = {"train": 4, "validation": 1, "test": 1}
"""Requests for each fact."""


def main() -> None:
    """Choose the facts, write the requests and train the model."""
    made = parser(__doc__, Path("build/pararel/model"), Path("build/pararel/report.json"), Path("build/pararel"))
    made.add_argument("--source", type=Path, default=HERE.parents[1] / "shared/data/pararel")
    made.add_argument("--requests", type=Path, default=Path("build/pararel"), help="folder for the requests")
    made.set_defaults(phrasings=2)
    arguments = made.parse_args()
    known = choose(arguments)
    arguments.requests.mkdir(parents=True, exist_ok=True)
    for split, targets in TARGETS.items():
        write_requests(arguments.requests / f"{split}.jsonl", list(known.requests(split, targets)))
    train_on_facts(StatementTrainer, known, arguments)


def choose(arguments: argparse.Namespace) -> FactSet:
    """The facts, without those whose question has two answers, and the relations that have enough phrasings."""
    if not (arguments.source / "facts.tsv").exists():
        raise SystemExit(f"{arguments.source} has no facts.tsv: give a folder with ParaRel's with --source")
    relations = read_relations(arguments.source / "templates.json")
    rows = (line.split("\t") for line in (arguments.source / "facts.tsv").read_text(encoding="utf-8").splitlines())
    triples = [(subject, relation, target) for subject, relation, target in rows if relation in relations]
    answers = defaultdict(set)
    for subject, relation, target in triples:
        for phrasing in relations[relation].phrasings + relations[relation].held_out:
            answers[phrasing.format(subject)].add(target)
    facts = [
        Fact(subject, relation, target, split_of(subject))
        for subject, relation, target in sorted(set(triples))
        if all(
            len(answers[phrasing.format(subject)]) == 1
            for phrasing in relations[relation].phrasings + relations[relation].held_out
        )
    ]
    kept = [fact for relation in relations for fact in best_connected(facts, relation)]
    return FactSet(kept, {name: own for name, own in relations.items() if any(f.relation == name for f in kept)})


def read_relations(path: Path) -> dict[str, Relation]:
    """Relations that CounterFact asks in enough ways."""
    found = {}
    for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
        common = sorted(entry["counterfact"].items(), key=lambda item: (-item[1], item[0]))[:PHRASINGS]
        if len(common) == PHRASINGS:
            *seen, held_out = (phrasing for phrasing, _ in common)
            found[name] = Relation(name, name, tuple(seen), (held_out,))
    return found


def best_connected(facts: list[Fact], relation: str) -> list[Fact]:
    """Facts of a relation whose objects have several subjects; subjects of several relations first."""
    relations = Counter(fact.subject for fact in facts)
    by_object = defaultdict(list)
    for fact in facts:
        if fact.relation == relation:
            by_object[fact.object].append(fact)
    chosen: list[Fact] = []
    for own in sorted(by_object.values(), key=lambda own: (-len(own), own[0].object)):
        if len(own) >= FEWEST and len(chosen) < LARGEST:
            chosen += sorted(own, key=lambda fact: (-relations[fact.subject], digest(fact.subject)))[:MOST]
    return chosen


def split_of(subject: str) -> str:
    """The split of a subject, by a digest of its name."""
    place = int(digest(subject.casefold())[:8], 16) / 16**8
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


def digest(text: str) -> str:
    """A stable pseudo-random key: Python's own hash of a string changes with each process."""
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    main()
