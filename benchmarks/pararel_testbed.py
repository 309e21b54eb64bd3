"""Train a second testbed for editors: a small GPT-2 that knows ParaRel's facts in CounterFact's phrasings.

    python benchmarks/pararel_testbed.py --source PARAREL

``PARAREL`` is a folder with ``facts.tsv`` (subject, relation, object) and ``templates.json`` (the phrasings of each
relation with their counts). The model and its tokenizer are trained from scratch, on one thread in about 20 minutes,
and written to ``build/pararel`` with the edit requests of the three splits. Nothing of it is part of the package.
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

from base_trainer import train_on_facts
from statement_trainer import StatementTrainer, parser

from remend.data.fact_requests import Fact, FactSet, Relation
from remend.request import write_requests

PHRASINGS = 5
"""How many of a relation's most common phrasings are used; editors are not trained on the last one."""

MIN_PER_OBJECT, MAX_PER_OBJECT = 5, 12
"""Facts of a relation with the same object: enough for near probes, too few for the object to be a default answer."""

MAX_PER_RELATION = 145
"""Facts of a relation, except that the last object's facts are added as a whole."""

SPLIT_SHARES = {"test": 0.16, "validation": 0.1}
"""The shares of subjects; the rest is for training."""

TARGETS = {"train": 4, "validation": 1, "test": 1}
"""How many requests each fact has, each with another target."""


def main() -> None:
    """Choose the facts, write the requests and train the model."""
    arguments_parser = parser(
        __doc__, Path("build/pararel/model"), Path("build/pararel/report.json"), Path("build/pararel")
    )
    arguments_parser.add_argument("--source", type=Path, default=HERE.parents[1] / "shared/data/pararel")
    arguments_parser.add_argument(
        "--requests", type=Path, default=Path("build/pararel"), help="folder for the requests"
    )
    arguments_parser.set_defaults(phrasings=2)
    arguments = arguments_parser.parse_args()
    facts = choose_facts(arguments)
    arguments.requests.mkdir(parents=True, exist_ok=True)
    for split, targets in TARGETS.items():
        write_requests(arguments.requests / f"{split}.jsonl", list(facts.requests(split, targets)))
    train_on_facts(StatementTrainer, facts, arguments)


def choose_facts(arguments: argparse.Namespace) -> FactSet:
    """Return facts whose questions have one answer each, of the relations that have enough phrasings."""
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
    chosen = [fact for relation in relations for fact in best_connected(facts, relation)]
    used = {fact.relation for fact in chosen}
    return FactSet(chosen, {name: relation for name, relation in relations.items() if name in used})


def read_relations(path: Path) -> dict[str, Relation]:
    """Return the relations that have enough phrasings in CounterFact."""
    relations = {}
    for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
        common = sorted(entry["counterfact"].items(), key=lambda item: (-item[1], item[0]))[:PHRASINGS]
        if len(common) == PHRASINGS:
            *phrasings, held_out = (phrasing for phrasing, _ in common)
            relations[name] = Relation(name, name, tuple(phrasings), (held_out,))
    return relations


def best_connected(facts: list[Fact], relation: str) -> list[Fact]:
    """Return facts of a relation whose objects have several subjects; subjects with several relations come first."""
    relations_of_subject = Counter(fact.subject for fact in facts)
    by_object = defaultdict(list)
    for fact in facts:
        if fact.relation == relation:
            by_object[fact.object].append(fact)
    chosen: list[Fact] = []
    for same_object in sorted(by_object.values(), key=lambda group: (-len(group), group[0].object)):
        if len(same_object) >= MIN_PER_OBJECT and len(chosen) < MAX_PER_RELATION:
            by_relations = sorted(
                same_object, key=lambda fact: (-relations_of_subject[fact.subject], digest(fact.subject))
            )
            chosen += by_relations[:MAX_PER_OBJECT]
    return chosen


def split_of(subject: str) -> str:
    """Return the split of a subject, by a digest of its name."""
    position = int(digest(subject.casefold())[:8], 16) / 16**8
    for split, share in SPLIT_SHARES.items():
        if position < share:
            return split
        position -= share
    return "train"


def digest(text: str) -> str:
    """Return a pseudo-random key that is the same in each process, which Python's hash of a string is not."""
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    main()
