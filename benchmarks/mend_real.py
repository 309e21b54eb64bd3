r"""Train ``mend-subject`` on a real language model, for benchmarks/real.py to measure.

    python benchmarks/mend_real.py build/real/smollm2 --out build/real/mend-first --minutes 75 --edit-weight 0.3
    python benchmarks/mend_real.py build/real/smollm2 --out build/real/mend-smollm2 --minutes 90 \
        --start-from build/real/mend-first

The second run goes on with the networks of the first one, at half of its learning rate. A larger weight of the edit
makes more phrasings follow, and fewer other answers about the subject stay.

The requests are about the subjects of the train split of benchmarks/real_requests.py, which neither validation nor test
share. A request need not be about a fact that the model knows: any object of a relation can be its target, the
relation's other phrasings its paraphrases, and phrasings of other relations, about the same subject, what must stay.
Half of the requests are about facts that the model knows, and phrasings that it understands are drawn more often.
A fifth of all phrasings (by their hash) is left out, so that it can be told whether those generalise, too.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import remend
from real_requests import SOURCE, Fact, World, others_asked, probe
from remend.core.low_rank_hooks import frozen
from remend.editors import load_editor
from remend.editors.mend.subject import SubjectMend, SubjectMendConfig
from remend.fingerprint import ModelFingerprint
from remend.request import EditRequest, as_completion
from remend.tasks.base import Example, Task
from remend.training import Resources, TrainingConfig, train
from remend.training.loop import TrainingProgress

HELD_OUT = 5
"""One of so many phrasings is left out of training."""

ASKED = 12
"""Facts of each relation by which it is measured how often the model completes a phrasing with the true object."""

PASSAGES = 400
"""Passages of ordinary text over which keys are whitened."""

LEAST = 0.05
"""The weight of a phrasing that the model never completes so, in units of one that it always does."""

PARAPHRASES, NEAR = 2, 3
"""The most other phrasings, and the other questions, of a request."""

LEARNING_RATE = 1e-3
"""The learning rate at first; it falls to zero with the time."""


def held_out(phrasing: str) -> bool:
    """Return whether a phrasing is left out of training."""
    return int(hashlib.sha256(phrasing.encode()).hexdigest(), 16) % HELD_OUT == 0


@torch.no_grad()
def completes(task: Task, facts: Sequence[tuple[str, Fact]]) -> list[bool]:
    """Return whether the model completes each phrasing about a fact's subject with the first token of its object."""
    pairs = [task.encode(as_completion(text.format(fact.subject), " "), fact.object) for text, fact in facts]
    right = [False] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index].input))
    with frozen(task.model):
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            batch = task.collate([Example(pairs[index].input, pairs[index].target[:1]) for index in part])
            for index, same in zip(part, task.correct(task.outputs(batch), batch).tolist(), strict=True):
                right[index] = same
    return right


def phrasing_weights(task: Task, world: World, facts: Sequence[Fact]) -> dict[str, float]:
    """Return how often each phrasing should be drawn: as often as the model completes it with the true object."""
    of_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        of_relation[fact.relation].append(fact)
    asked = [
        (phrasing, fact)
        for relation, phrasings in sorted(world.phrasings.items())
        for phrasing in phrasings
        if not held_out(phrasing)
        for fact in of_relation[relation][:ASKED]
    ]
    shares: dict[str, list[bool]] = defaultdict(list)
    for (phrasing, _), right in zip(asked, completes(task, asked), strict=True):
        shares[phrasing].append(right)
    return {phrasing: LEAST + sum(right) / len(right) for phrasing, right in shares.items()}


def make_requests(task: Task, world: World, count: int, seed: int) -> list[EditRequest]:
    """Return requests about subjects of the train split."""
    rng = random.Random(seed)
    facts = [fact for fact in world.facts("train") if others_asked(fact.relation)]
    weights = phrasing_weights(task, world, facts)
    seen = {relation: [p for p in ps if p in weights] for relation, ps in world.phrasings.items()}
    facts = [fact for fact in facts if len(seen[fact.relation]) > 1]
    best = {relation: max(ps, key=lambda p: weights[p]) for relation, ps in seen.items() if ps}
    asked = [(best[fact.relation], fact) for fact in facts if weights[best[fact.relation]] > 2 * LEAST]
    known = [fact for (_, fact), right in zip(asked, completes(task, asked), strict=True) if right]
    print(f"{len(facts)} facts, of which the model knows {len(known)}", file=sys.stderr, flush=True)
    of_relation = [2 * LEAST + weights[best[fact.relation]] for fact in facts]
    drawn = rng.choices(known, k=count // 2) + rng.choices(facts, of_relation, k=count - count // 2)
    rng.shuffle(drawn)
    objects = {relation: sorted(set(of.values())) for relation, of in world.objects.items()}
    return [_request(world, fact, seen, weights, objects, rng) for fact in drawn]


def _request(
    world: World,
    fact: Fact,
    seen: Mapping[str, Sequence[str]],
    weights: Mapping[str, float],
    objects: Mapping[str, Sequence[str]],
    rng: random.Random,
) -> EditRequest:
    own, *others = _draw(seen[fact.relation], weights, PARAPHRASES + 1, rng)
    target = rng.choice([answer for answer in objects[fact.relation] if answer != fact.object])
    relations = [relation for relation in others_asked(fact.relation) if seen[relation]]
    near = []
    for relation in rng.sample(relations, min(NEAR, len(relations))):
        (phrasing,) = _draw(seen[relation], weights, 1, rng)
        # What the model says first is kept, whatever it is.
        answer = world.relations[fact.subject].get(relation, "the")
        near.append(probe(phrasing.format(fact.subject), answer, "same_subject").model_copy(update={"separator": " "}))
    return EditRequest(
        separator=" ",
        prompt=own.format(fact.subject),
        target=target,
        subject=fact.subject,
        paraphrases=tuple(phrasing.format(fact.subject) for phrasing in others),
        near=tuple(near),
    )


def _draw(phrasings: Sequence[str], weights: Mapping[str, float], count: int, rng: random.Random) -> list[str]:
    """Draw different phrasings, by their weights."""
    left, drawn = list(phrasings), []
    while left and len(drawn) < count:
        (phrasing,) = rng.choices(left, [weights[p] for p in left])
        left.remove(phrasing)
        drawn.append(phrasing)
    return drawn


def main() -> None:
    """Make the requests and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--requests", type=int, default=12_000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--layers", help="the block to edit; by default that of fit")
    parser.add_argument("--edit-weight", type=float, default=0.4, help="the weight of an edit against what should stay")
    parser.add_argument("--start-from", type=Path, metavar="EDITOR", help="go on with the networks of a trained editor")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = World(arguments.source)
    # On a CPU with bfloat16 products a step takes half the time. At these lengths the backward pass of the fused
    # kernel for attention would take a quarter of it.
    task = remend.load(str(arguments.model), dtype="bfloat16")
    task.model.set_attn_implementation("eager")
    lines = (arguments.source / "wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines()
    editor = SubjectMend.create(task, SubjectMendConfig(), layers=arguments.layers)
    rate = LEARNING_RATE
    if arguments.start_from:
        rate /= 2
        trained = load_editor(arguments.start_from)
        editor.load_state_dict(trained.state_dict())
    editor = train(
        task,
        make_requests(task, world, arguments.requests, 0),
        config=TrainingConfig(
            edit_weight=arguments.edit_weight,
            batch_size=16,
            learning_rate=rate,
            alpha_learning_rate=rate,
            near=1.0,
            decay=True,
            gradient_clip=1.0,
            validate_every=100,
            validation_size=128,
        ),
        editor=editor,
        resources=Resources(cache=3.0),
        text=[line.strip() for line in lines if len(line) > 200][:PASSAGES],
        budget_seconds=60 * arguments.minutes,
        out=arguments.out,
        resume=arguments.resume,
        on_progress=_report,
    )
    # What it learned holds for the same weights in float32.
    editor.base = ModelFingerprint.of(remend.load(str(arguments.model)).model, list(editor.shapes))
    editor.save(arguments.out)


def _report(progress: TrainingProgress) -> None:
    if progress.step % 20 == 0 or progress.validation:
        print(
            f"step {progress.step}, loss {progress.loss:.3f} {progress.validation or ''}", file=sys.stderr, flush=True
        )


if __name__ == "__main__":
    main()
