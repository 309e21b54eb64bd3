"""What a model's matrices read when it is about nothing in particular: the ground that edits stand out from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial

import torch
from torch import nn

from remend.core.capture import record_inputs
from remend.core.layers import dimensions
from remend.core.operators import SymmetricOperator
from remend.core.sketching import SketchedMoment, random_test_matrix, sketch_directions
from remend.core.whitening import SecondMoment
from remend.tasks.base import Example, Task

BATCH = 32


def whiteners(
    task: Task, modules: Mapping[str, nn.Module], pairs: Sequence[Example], ridge: float
) -> dict[str, SymmetricOperator]:
    """For each matrix what whitens its inputs over some stretches; the identity where nothing reaches it.

    Inputs of many dimensions are whitened in some directions only (:mod:`remend.core.sketching`).
    """
    moments = second_moments(task, modules, pairs, sketched=True)
    return {name: moment.whitener(ridge) for name, moment in moments.items()}


@torch.no_grad()
def second_moments(
    task: Task, modules: Mapping[str, nn.Module], pairs: Sequence[Example], sketched: bool = False
) -> dict[str, SecondMoment]:
    """For each matrix the second moment of its inputs at every token of some stretches.

    Args:
        task: the model.
        modules: the matrices, by name.
        pairs: of :func:`stretches`.
        sketched: whether those of wide inputs are known in some directions only.
    """
    moments: dict[str, SecondMoment] = {}
    test_matrix = cache(random_test_matrix)  # matrices of one width share it

    def nothing(name: str, device: torch.device) -> SecondMoment:
        d = dimensions(modules[name])[0]
        directions = sketch_directions(d) if sketched else None
        if directions:
            return SketchedMoment(test_matrix(d, directions, device), directions)
        return SecondMoment(d, device)

    for start in range(0, len(pairs), BATCH):
        batch = task.collate(pairs[start : start + BATCH])
        found = record_inputs(task.model, modules, batch.rows, partial(task.outputs, batch))
        counted = task.token_masks(batch, modules, predicting=False)
        for name, seen in found.items():
            if name not in moments:
                moments[name] = nothing(name, seen.x.device)
            mask, read = counted[name].to(seen.x.device), seen.x.shape[1]
            if seen.experts is not None:  # as many rows of a token as it has experts
                mask = mask.repeat_interleave(read // mask.shape[1], 1)
            elif read != mask.shape[1]:  # another sequence than the batch's own (a layer over an encoder's output)
                mask = mask.new_ones(seen.x.shape[:2])
            moments[name].update(seen.x, mask)
    return moments
