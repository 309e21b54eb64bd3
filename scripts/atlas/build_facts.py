"""Choose the facts of the atlas from the triples of ParaRel and split them by subject.

The choice is deterministic: no clock, no process-dependent hash, so the same source gives the same bytes.

    python scripts/atlas/build_facts.py --source facts.tsv
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# fmt: off
RELATIONS = (
    "P17", "P19", "P20", "P27", "P30", "P36", "P37", "P39", "P101", "P103",
    "P106", "P108", "P127", "P131", "P136", "P159", "P176", "P178", "P364", "P407",
    "P413", "P449", "P495", "P641", "P740", "P937", "P1303", "P1376", "P1412",
)
# fmt: on
"""Relations in which a subject has one object; sister cities, borders, parts and classes are left out."""

PLAIN_NAME = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '.\-])*")
MAX_SUBJECT_LENGTH = 30
MAX_OBJECT_SHARE = 0.14
"""The largest share of a relation's facts with the same object, where the relation has enough objects."""

FEW_OBJECTS = 8
"""In relations with at most this number of objects, facts are taken in turn from each object."""

PASSES = 6
"""The number of times that the choice is repeated from its result; more passes change little."""

SPLITS = (("test", 555), ("validation", 300))
"""The approximate number of facts of the test and validation splits; the rest is for training."""

SEED = 20220425


class Triple(NamedTuple):
    """One row of the source."""

    subject: str
    relation: str
    object: str


def main() -> None:
    """Choose facts from the source, split them and write them."""
    root = Path(__file__).resolve().parents[2] / "src/remend/assets/atlas"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="subject, relation, object; one triple a line")
    parser.add_argument("--excluded", type=Path, default=Path(__file__).with_name("excluded.tsv"))
    parser.add_argument("--out", type=Path, default=root / "facts.tsv")
    parser.add_argument("--size", type=int, default=3530, help="about how many facts to keep")
    parser.add_argument("--smallest", type=int, default=60, help="fewest facts of a relation")
    parser.add_argument("--largest", type=int, default=190, help="most facts of a relation")
    args = parser.parse_args()
    source = [Triple(*row) for row in read_rows(args.source)]
    facts = choose_facts(
        source, {tuple(row) for row in read_rows(args.excluded)}, args.size, args.smallest, args.largest
    )
    splits = split_subjects(facts)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["subject", "relation", "object", "split"])
        writer.writerows((*fact, splits[fact.subject]) for fact in facts)
    report(facts, splits)


def read_rows(path: Path) -> Iterator[list[str]]:
    """Yield the tab-separated rows of a file, leaving out blank lines and lines that begin with ``#``."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip() and not line.startswith("#"):
                yield line.rstrip("\n").split("\t")


def choose_facts(
    source: list[Triple], excluded: set[tuple[str, ...]], size: int, smallest: int, largest: int
) -> list[Triple]:
    """Return about ``size`` facts, each relation holding between ``smallest`` and ``largest`` where it has so many.

    A relation's quota is twice the number of its subjects that other relations know too, plus a level: the same for
    all relations, and such that the whole comes to ``size``. Whether a subject's other facts are kept depends on the
    choice itself, so the choice is made again from what the last one kept.
    """
    candidates = usable_triples(source, excluded)
    mentions = Counter(fact.subject for fact in source) + Counter(fact.object for fact in source)
    chosen = set(candidates)
    for _ in range(PASSES):
        pools = [rank(relation, candidates, chosen, mentions) for relation in RELATIONS]
        for level in range(largest + 1):
            quotas = [min(largest, max(smallest, level + 2 * shared)) for _, shared in pools]
            parts = [take_capped(pool, quota, smallest) for (pool, _), quota in zip(pools, quotas, strict=True)]
            choice = {fact for part in parts for fact in part}
            if len(choice) >= size:
                break
        chosen = choice
    return sorted(chosen, key=lambda fact: (RELATIONS.index(fact.relation), fact.subject))


def usable_triples(source: list[Triple], excluded: set[tuple[str, ...]]) -> list[Triple]:
    """Return the triples of the kept relations that pass every filter of form and are not excluded by name."""
    answers = Counter((fact.subject, fact.relation) for fact in source)
    return [
        fact
        for fact in source
        if fact.relation in RELATIONS
        and answers[fact.subject, fact.relation] == 1
        and PLAIN_NAME.fullmatch(fact.subject)
        and PLAIN_NAME.fullmatch(fact.object)
        and len(fact.subject) <= MAX_SUBJECT_LENGTH
        and not reveals_object(fact)
        and not {(fact.subject,), fact[:2], ("*", *fact[1:])} & excluded
    ]


def reveals_object(fact: Triple) -> bool:
    """Return whether the subject contains the object, or the reverse."""
    subject, object_ = fact.subject.casefold(), fact.object.casefold()
    if subject in object_ or object_ in subject:
        return True
    words = set(re.split(r"[ '.\-]+", subject))
    return re.split(r"[ '.\-]+", object_)[0] in words


def rank(
    relation: str, candidates: list[Triple], chosen: set[Triple], mentions: Counter[str]
) -> tuple[list[Triple], int]:
    """Return a relation's candidates, best known first, and how many are about subjects that other relations keep too.

    A subject counts as well known if other relations keep facts about it and if the source mentions it often; a digest
    decides ties. Where there are few objects, facts are taken in turn from each.
    """
    elsewhere = Counter(fact.subject for fact in chosen if fact.relation != relation)
    pool = sorted(
        (fact for fact in candidates if fact.relation == relation),
        key=lambda fact: (-min(elsewhere[fact.subject], 3), -min(mentions[fact.subject], 8), digest(fact.subject)),
    )
    if len({fact.object for fact in pool}) <= FEW_OBJECTS:
        turns = {
            fact: sum(earlier.object == fact.object for earlier in pool[:index]) for index, fact in enumerate(pool)
        }
        pool.sort(key=turns.__getitem__)
    return pool, sum(elsewhere[fact.subject] > 0 for fact in pool)


def digest(text: str) -> str:
    """Return a stable pseudo-random key: Python's own hash of a string changes in each process."""
    return hashlib.sha256(f"{SEED}/{text}".encode()).hexdigest()


def take_capped(pool: list[Triple], size: int, smallest: int) -> list[Triple]:
    """Take the first facts of a pool, about ``size`` of them, such that no object takes more than its share.

    A relation with too few facts outside its commonest objects first shrinks; once it is down to ``smallest``, its
    commonest objects are allowed a larger share.
    """
    share = max(MAX_OBJECT_SHARE, 1.3 / len({fact.object for fact in pool}))
    size = min(size, len(pool))
    while True:
        taken: list[Triple] = []
        uses = Counter[str]()
        for fact in pool:
            if uses[fact.object] < share * size and len(taken) < size:
                taken.append(fact)
                uses[fact.object] += 1
        if len(taken) >= 0.97 * size:
            return taken
        if size > smallest:
            size -= 1
        else:
            share += 0.01


def split_subjects(facts: list[Triple]) -> dict[str, str]:
    """Return the split of each subject.

    Subjects are grouped by the smallest of their relations, and each group is split for itself, so that every relation
    has facts in each split.
    """
    sizes = Counter(fact.relation for fact in facts)
    by_subject = defaultdict(list)
    for fact in facts:
        by_subject[fact.subject].append(fact.relation)
    groups = defaultdict(list)
    for subject, relations in sorted(by_subject.items()):
        groups[min(relations, key=lambda relation: (sizes[relation], relation))].append(subject)
    splits: dict[str, str] = {}
    for relation, subjects in sorted(groups.items()):
        random.Random(f"{SEED}/{relation}").shuffle(subjects)
        splits.update(assign_splits(subjects, by_subject, len(facts)))
    return splits


def assign_splits(subjects: list[str], by_subject: dict[str, list[str]], total: int) -> Iterable[tuple[str, str]]:
    """Yield each subject with its split, filling each split to its share of the facts of these subjects."""
    count = sum(len(by_subject[subject]) for subject in subjects)
    bounds, bound = [], 0.0
    for name, size in SPLITS:
        bound += count * size / total
        bounds.append((name, bound))
    position = 0
    for subject in subjects:
        yield subject, next((name for name, bound in bounds if position + 0.5 < bound), "train")
        position += len(by_subject[subject])


def report(facts: list[Triple], splits: dict[str, str]) -> None:
    """Print what was chosen, one line a relation and one for the whole."""
    for relation in RELATIONS:
        members = [fact for fact in facts if fact.relation == relation]
        top = Counter(fact.object for fact in members).most_common(3)
        counts = Counter(splits[fact.subject] for fact in members)
        print(
            f"{relation:6} {len(members):4} {len({fact.object for fact in members}):4} objects  "
            f"{dict(sorted(counts.items()))}  {top}"
        )
    subjects = Counter(fact.subject for fact in facts)
    several = sum(count for count in subjects.values() if count > 1)
    print(f"{len(facts)} facts, {len(subjects)} subjects, {several / len(facts):.1%} about subjects with several facts")
    print(dict(Counter(splits[fact.subject] for fact in facts)))


if __name__ == "__main__":
    main()
