"""Edit requests on facts that a real language model knows, with other phrasings and near prompts of every kind.

    python benchmarks/real_requests.py build/real/smollm2

The facts are those of CounterFact and of ParaRel (T-REx), in the phrasings of both that end with the object. A fact is
used where the unedited model completes CounterFact's prompt, or a drawn phrasing, with the true object. Splits are
by subject, and every subject of the world has one: the subjects of near and of unrelated prompts too.

``paraphrases`` are the phrasings that the unedited model completes with the true object as well: to it, they mean the
same. ``unseen_paraphrases`` are all others. Written to ``build/real/requests/MODEL-SPLIT.jsonl``.

Where more requests are asked for than the model knows facts of the split, facts that it does not know follow: all of
their phrasings are ``unseen_paraphrases``, and no other questions on their subjects are near prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import remend
from remend.core.low_rank_hooks import frozen
from remend.request import EditRequest, Probe, Prompt, write_requests
from remend.tasks.base import Example, Task

SOURCE = Path(__file__).resolve().parents[2] / "shared" / "data"
SPLITS = {"train": range(6), "validation": range(6, 8), "test": range(8, 10)}
"""Tenths of all subjects, by their hash."""

PROBES = 4
"""Near and unrelated prompts of each kind."""

MOST_PER_RELATION = 0.15
"""The largest share of a split's requests that is about one relation."""

ASKED_OF: Mapping[str, Sequence[int]] = {
    "person": (19, 20, 27, 39, 101, 103, 106, 108, 136, 140, 413, 463, 641, 937, 1303, 1412),
    "territory": (30, 36, 37, 47, 138, 190, 530),
    "capital": (37, 47, 138, 190, 1376),
    "place": (17, 127, 131, 138, 276, 279, 361),
    "organisation": (127, 138, 159, 463, 740),
    "product": (127, 138, 176, 178, 361, 495),
    "work": (136, 138, 364, 407, 449, 495),
    "concept": (138, 279, 361, 1001),
}
"""The relations that can be asked of each kind of subject, by their number in Wikidata."""

OTHER_QUESTIONS, OF_EACH = 12, 3
"""Other questions on a subject that the model is asked, and phrasings of each, to find those that it has answers to."""

SURE = 0.2
"""The least probability of the first word of an answer that the model has."""

SAME_QUESTION = ({"P103", "P1412"}, {"P364", "P407"}, {"P17", "P131", "P276", "P30"}, {"P127", "P176", "P178"})
"""Relations of a subject that ask the same, or of which one follows from the other."""


@dataclass(frozen=True)
class Fact:
    """A true fact and the object that takes the place of the true one."""

    subject: str
    relation: str
    object: str
    phrasing: str
    target: str


class World:
    """The facts and phrasings of the source, by split."""

    def __init__(self, source: Path) -> None:
        self.phrasings = read_phrasings(source / "pararel" / "templates.json")
        self.objects: dict[str, dict[str, str]] = defaultdict(dict)
        self.relations: dict[str, dict[str, str]] = defaultdict(dict)
        for line in (source / "pararel" / "facts.tsv").open(encoding="utf-8"):
            subject, relation, answer = line.rstrip("\n").split("\t")
            if self.phrasings.get(relation):
                self.objects[relation].setdefault(subject, answer)
                self.relations[subject].setdefault(relation, answer)
        self.published = [
            json.loads(line)
            for name in ("train", "val")
            for line in (source / "counterfact" / f"{name}.jsonl").open(encoding="utf-8")
        ]

    def facts(self, split: str) -> list[Fact]:
        """Return the facts of a split in random order, CounterFact's with its own prompt and target first."""
        rng = random.Random(split)
        facts: dict[str, Fact] = {}
        for row in self.published:
            if split_of(row["subject"]) == split and self.phrasings.get(row["relation"]):
                facts.setdefault(
                    row["subject"],
                    Fact(row["subject"], row["relation"], row["ground_truth"], row["template"], row["target_new"]),
                )
        published = list(facts.values())
        others = []
        for relation in sorted(self.objects):
            answers = sorted(set(self.objects[relation].values()))
            for subject, answer in sorted(self.objects[relation].items()):
                if subject not in facts and split_of(subject) == split and len(answers) > 1:
                    target = rng.choice([other for other in answers if other != answer])
                    phrasing = rng.choice(self.phrasings[relation])
                    facts[subject] = Fact(subject, relation, answer, phrasing, target)
                    others.append(facts[subject])
        rng.shuffle(published)
        rng.shuffle(others)
        return [*published, *others]


def others_asked(relation: str) -> list[str]:
    """Return the relations that are asked of the same kind of subject, and are another question."""
    alike = {relation}.union(*(group for group in SAME_QUESTION if relation in group))
    kinds = [[f"P{number}" for number in asked] for asked in ASKED_OF.values()]
    return sorted({other for asked in kinds if relation in asked for other in asked} - alike)


def split_of(subject: str) -> str:
    """Return the split of a subject."""
    tenth = int(hashlib.sha256(subject.strip().casefold().encode()).hexdigest(), 16) % 10
    return next(split for split, tenths in SPLITS.items() if tenth in tenths)


def read_phrasings(path: Path) -> dict[str, list[str]]:
    """Return the phrasings of each relation that end with the object, with ``{}`` for the subject."""
    phrasings = {}
    for relation, of_source in json.loads(path.read_text(encoding="utf-8")).items():
        found = list(of_source["counterfact"])
        for pattern in of_source["pararel"]:
            beginning = re.sub(r"\s*\[Y\]\s*\.?\s*$", "", pattern)
            if beginning != pattern and "[Y]" not in beginning and "[X]" in beginning:
                text = beginning.replace("[X]", "{}").strip()
                found.append(text[0].upper() + text[1:])
        phrasings[relation] = list(dict.fromkeys(found))
    return phrasings


def answers_with(task: Task, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Return whether the model goes on from each prompt with its answer, as a whole word."""
    # One token tells of most that they are wrong, at an eighth of the cost.
    first = [task.decode(ids).strip() for ids in task.predict(list(prompts), max_new_tokens=1)]
    likely = [i for i, text in enumerate(first) if answers[i].startswith(text) or text.startswith(answers[i])]
    right = [False] * len(prompts)
    given = task.predict([prompts[i] for i in likely], max_new_tokens=8) if likely else []
    for index, ids in zip(likely, given, strict=True):
        right[index] = begins_with(task.decode(ids), answers[index])
    return right


def begins_with(text: str, answer: str) -> bool:
    """Tell whether a text begins with an answer, as a whole word."""
    return re.match(rf"{re.escape(answer)}(?!\w)", text) is not None


def build(task: Task, world: World, split: str, count: int) -> list[EditRequest]:
    """Return requests on facts that the model knows; on others, once these are used up."""
    requests: list[EditRequest] = []
    of_relation: Counter[str] = Counter()
    facts = world.facts(split)
    for start in range(0, len(facts), 256):
        chunk = [f for f in facts[start : start + 256] if of_relation[f.relation] < MOST_PER_RELATION * count]
        known = answers_with(task, [f.phrasing.format(f.subject) for f in chunk], [f.object for f in chunk])
        for fact, knows in zip(chunk, known, strict=True):
            if knows and of_relation[fact.relation] < MOST_PER_RELATION * count and len(requests) < count:
                of_relation[fact.relation] += 1
                requests.append(make_request(task, world, split, fact))
        print(f"{len(requests)} of {count} after {start + 256} facts", file=sys.stderr, flush=True)
        if len(requests) >= count:
            return requests
    return [*requests, *unknown(world, split, count - len(requests), requests)]


def unknown(world: World, split: str, count: int, known: Sequence[EditRequest]) -> list[EditRequest]:
    """Return requests on facts of which the model need not know anything, on other subjects than those it knows."""
    subjects = {request.subject for request in known}
    facts = [fact for fact in world.facts(split) if fact.subject not in subjects]
    return [make_request(None, world, split, fact) for fact in facts[:count]]


def make_request(task: Task | None, world: World, split: str, fact: Fact) -> EditRequest:
    """Return the request of a fact with its probes; without a model, of one that it does not know."""
    rng = random.Random(f"{split} {fact.subject} {fact.relation}")
    others = [phrasing.format(fact.subject) for phrasing in world.phrasings[fact.relation] if phrasing != fact.phrasing]
    same = answers_with(task, others, [fact.object] * len(others)) if others and task else [False] * len(others)
    subjects = {s: o for s, o in world.objects[fact.relation].items() if split_of(s) == split and s != fact.subject}
    near: list[Probe] = []
    for kind, chosen in (
        ("same_object", sorted(s for s, o in subjects.items() if o == fact.object)),
        ("same_relation", sorted(s for s, o in subjects.items() if o not in (fact.object, fact.target))),
    ):
        for subject in rng.sample(chosen, min(PROBES, len(chosen))):
            near.append(probe(fact.phrasing.format(subject), subjects[subject], kind))
    near += known_otherwise(task, world, fact, rng) if task else []
    far: list[Probe] = []
    relations = [r for r in sorted(world.objects) if r != fact.relation]
    while len(far) < PROBES:
        relation = rng.choice(relations)
        candidates = sorted(s for s in world.objects[relation] if split_of(s) == split and s != fact.subject)
        if candidates:
            subject = rng.choice(candidates)
            phrasing = rng.choice(world.phrasings[relation])
            far.append(Probe(prompt=phrasing.format(subject), target=world.objects[relation][subject]))
    return EditRequest(
        prompt=fact.phrasing.format(fact.subject),
        target=fact.target,
        subject=fact.subject,
        id=f"{fact.relation} {fact.subject}",
        paraphrases=tuple(p for p, s in zip(others, same, strict=True) if s),
        unseen_paraphrases=tuple(p for p, s in zip(others, same, strict=True) if not s),
        near=tuple(near),
        locality=tuple(far),
    )


def known_otherwise(task: Task, world: World, fact: Fact, rng: random.Random) -> list[Probe]:
    """Return other questions on the subject of a fact to which the model has an answer.

    It has one where it goes on with an object of that relation, as a whole word, and the first word of it has a
    probability of :data:`SURE` or more: any change of the model changes the first word of other texts. An answer that
    names the fact's object is left out: it may follow from the fact.
    """
    asked = [other for other in others_asked(fact.relation) if world.phrasings[other]]
    chosen = {
        phrasing.format(fact.subject): other
        for other in rng.sample(asked, min(OTHER_QUESTIONS, len(asked)))
        for phrasing in rng.sample(world.phrasings[other], min(OF_EACH, len(world.phrasings[other])))
    }
    best: dict[str, tuple[float, Probe]] = {}
    for prompt, (answer, sure) in own_answers(task, list(chosen)).items():
        other = chosen[prompt]
        named = next((o for o in sorted(set(world.objects[other].values())) if begins_with(answer, o)), None)
        follows = fact.object.casefold() in answer.casefold()
        if named and sure >= SURE and not follows and sure > best.get(other, (0.0,))[0]:
            best[other] = sure, probe(prompt, world.relations[fact.subject].get(other, named), "same_subject")
    return [found for _, found in sorted(best.values(), key=lambda item: -item[0])][:PROBES]


def own_answers(task: Task, prompts: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Return the model's answer to each prompt and the probability of its first word; only where it is sure."""
    if not prompts:
        return {}
    inputs = [Example(tuple(task.encode_input(prompt)), (0,)) for prompt in prompts]
    with torch.no_grad(), frozen(task.model):
        first = task.outputs(task.collate(inputs)).float().softmax(-1).max(-1).values
    likely = [prompt for prompt, p in zip(prompts, first.tolist(), strict=True) if p >= SURE]
    if not likely:
        return {}
    given = task.predict(likely, max_new_tokens=8)
    words = [task.answer_span(prompt, ids) for prompt, ids in zip(likely, given, strict=True)]
    total = task.log_probabilities(
        [Example(tuple(task.encode_input(prompt)), word) for prompt, word in zip(likely, words, strict=True)]
    )
    return {
        prompt: (task.decode(ids), math.exp(sum(log_p)))
        for prompt, ids, log_p in zip(likely, given, total, strict=True)
    }


def probe(prompt: Prompt, answer: str, kind: str) -> Probe:
    """Return a near probe of a kind."""
    return Probe.model_validate({"prompt": prompt, "target": answer, "kind": kind})


def write_splits(
    description: str | None,
    kind: str,
    count: int,
    builder: Callable[[Task, Path], Callable[[str, int], list[EditRequest]]],
) -> None:
    """Write the requests of one or more splits, as the command line asks.

    Args:
        description: of the command.
        kind: what the files are called after the model, before the split.
        count: the default number of requests of a split.
        builder: given a model and the folder of sources, returns what makes so many requests of a split.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--split", action="append", choices=SPLITS)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--out", type=Path, default=Path("build/real/requests"))
    arguments = parser.parse_args()
    make = builder(remend.load(str(arguments.model)), arguments.source)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split in arguments.split or ["validation", "test"]:
        write_requests(arguments.out / f"{arguments.model.name}{kind}-{split}.jsonl", make(split, arguments.count))


if __name__ == "__main__":
    write_splits(__doc__, "", 200, lambda task, source: partial(build, task, World(source)))
