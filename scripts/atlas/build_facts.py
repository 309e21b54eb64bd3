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
"""Relations in which a subject has one sensible object; sister cities, borders, parts and classes are left out."""

PLAIN = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '.\-])*")
LONGEST_SUBJECT = 30
SHARE = 0.14
"""The largest part of a relation that one object may take, where the relation has objects enough."""

FEW = 8
"""With at most so many objects, a relation takes its facts object by object rather than by fame alone."""

PASSES = 6
"""How often the choice is made again from its own outcome; more passes change little."""

SPLITS = (("test", 555), ("validation", 300))
"""About how many facts the splits for measuring hold; the rest is for training."""

SEED = 20220425


class Triple(NamedTuple):
    """One row of the source."""

    subject: str
    relation: str
    object: str


def main() -> None:
    """Read the source, choose, split and write."""
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
    facts = choose(source, {tuple(row) for row in read_rows(args.excluded)}, args.size, args.smallest, args.largest)
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


def choose(
    source: list[Triple], excluded: set[tuple[str, ...]], size: int, smallest: int, largest: int
) -> list[Triple]:
    """Return about ``size`` facts, each relation holding between ``smallest`` and ``largest`` where it has so many.

    A relation's quota is twice the number of its subjects that other relations know too, plus a level: the same for
    all relations, and such that the whole comes to ``size``. Whether a subject's other facts are kept depends on the
    choice itself, so the choice is made again from what the last one kept.
    """
    candidates = usable(source, excluded)
    mentions = Counter(fact.subject for fact in source) + Counter(fact.object for fact in source)
    kept = set(candidates)
    for _ in range(PASSES):
        pools = [rank(relation, candidates, kept, mentions) for relation in RELATIONS]
        for level in range(largest + 1):
            quotas = [min(largest, max(smallest, level + 2 * shared)) for _, shared in pools]
            parts = [capped(pool, quota, smallest) for (pool, _), quota in zip(pools, quotas, strict=True)]
            chosen = {fact for part in parts for fact in part}
            if len(chosen) >= size:
                break
        kept = chosen
    return sorted(kept, key=lambda fact: (RELATIONS.index(fact.relation), fact.subject))


def usable(source: list[Triple], excluded: set[tuple[str, ...]]) -> list[Triple]:
    """Return the triples of the kept relations that pass every filter of form and are not excluded by name."""
    answers = Counter((fact.subject, fact.relation) for fact in source)
    return [
        fact
        for fact in source
        if fact.relation in RELATIONS
        and answers[fact.subject, fact.relation] == 1
        and PLAIN.fullmatch(fact.subject)
        and PLAIN.fullmatch(fact.object)
        and len(fact.subject) <= LONGEST_SUBJECT
        and not leaks(fact)
        and not {(fact.subject,), fact[:2], ("*", *fact[1:])} & excluded
    ]


def leaks(fact: Triple) -> bool:
    """Return whether the subject gives the object away (or the reverse)."""
    subject, object_ = fact.subject.casefold(), fact.object.casefold()
    if subject in object_ or object_ in subject:
        return True
    words = set(re.split(r"[ '.\-]+", subject))
    return re.split(r"[ '.\-]+", object_)[0] in words


def rank(
    relation: str, candidates: list[Triple], kept: set[Triple], mentions: Counter[str]
) -> tuple[list[Triple], int]:
    """Return a relation's candidates, best known first, and how many are about subjects kept elsewhere too.

    How many facts about the subject other relations keep, and how often the source mentions it, stand for how well
    known it is; a digest settles what is left undecided. Where there are few objects, each has its turn.
    """
    elsewhere = Counter(fact.subject for fact in kept if fact.relation != relation)
    pool = sorted(
        (fact for fact in candidates if fact.relation == relation),
        key=lambda fact: (-min(elsewhere[fact.subject], 3), -min(mentions[fact.subject], 8), digest(fact.subject)),
    )
    if len({fact.object for fact in pool}) <= FEW:
        turns = {fact: sum(other.object == fact.object for other in pool[:at]) for at, fact in enumerate(pool)}
        pool.sort(key=turns.__getitem__)
    return pool, sum(elsewhere[fact.subject] > 0 for fact in pool)


def digest(text: str) -> str:
    """Return a stable pseudo-random key: Python's own hash of a string changes with each process."""
    return hashlib.sha256(f"{SEED}/{text}".encode()).hexdigest()


def capped(pool: list[Triple], size: int, smallest: int) -> list[Triple]:
    """Take the first facts of a pool, about ``size`` of them, such that no object takes more than its share.

    A relation with too few facts outside its commonest objects first shrinks; once it is down to ``smallest``, its
    commonest objects are allowed a larger share.
    """
    share = max(SHARE, 1.3 / len({fact.object for fact in pool}))
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

    A subject is filed under the smallest of its relations, and each file is dealt out on its own, so that every
    relation has facts in each split.
    """
    sizes = Counter(fact.relation for fact in facts)
    by_subject = defaultdict(list)
    for fact in facts:
        by_subject[fact.subject].append(fact.relation)
    files = defaultdict(list)
    for subject, relations in sorted(by_subject.items()):
        files[min(relations, key=lambda relation: (sizes[relation], relation))].append(subject)
    splits: dict[str, str] = {}
    for relation, subjects in sorted(files.items()):
        random.Random(f"{SEED}/{relation}").shuffle(subjects)
        splits.update(deal(subjects, by_subject, len(facts)))
    return splits


def deal(subjects: list[str], by_subject: dict[str, list[str]], total: int) -> Iterable[tuple[str, str]]:
    """Yield each subject with its split, filling each split to its share of the facts of these subjects."""
    count = sum(len(by_subject[subject]) for subject in subjects)
    bounds, bound = [], 0.0
    for name, wanted in SPLITS:
        bound += count * wanted / total
        bounds.append((name, bound))
    seen = 0
    for subject in subjects:
        yield subject, next((name for name, bound in bounds if seen + 0.5 < bound), "train")
        seen += len(by_subject[subject])


def report(facts: list[Triple], splits: dict[str, str]) -> None:
    """Print what was chosen, one line a relation and one for the whole."""
    for relation in RELATIONS:
        own = [fact for fact in facts if fact.relation == relation]
        top = Counter(fact.object for fact in own).most_common(3)
        counts = Counter(splits[fact.subject] for fact in own)
        print(
            f"{relation:6} {len(own):4} {len({f.object for f in own}):4} objects  {dict(sorted(counts.items()))}  {top}"
        )
    subjects = Counter(fact.subject for fact in facts)
    several = sum(count for count in subjects.values() if count > 1)
    print(f"{len(facts)} facts, {len(subjects)} subjects, {several / len(facts):.1%} about subjects with several facts")
    print(dict(Counter(splits[fact.subject] for fact in facts)))


if __name__ == "__main__":
    main()
