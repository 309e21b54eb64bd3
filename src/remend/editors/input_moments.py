"""Second moments and whitening of the inputs of a model's matrices, over ordinary text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial

import torch
from torch import nn

from remend.core.capture import record_inputs
from remend.core.layers import dimensions
from remend.core.sketched_moment import SketchedMoment, random_test_matrix, sketch_directions
from remend.core.symmetric_operator import SymmetricOperator
from remend.core.whitening import SecondMoment
from remend.models.frozen_prefix import run_as_far_as
from remend.progress import report_progress
from remend.tasks.base import Example, Task

CALIBRATION_BATCH_SIZE = 32
"""Examples that go through the model together."""


def whiteners(
    task: Task, modules: Mapping[str, nn.Module], examples: Sequence[Example], ridge: float
) -> dict[str, SymmetricOperator]:
    """Return for each matrix the operator that whitens its inputs over the examples.

    Inputs of many dimensions are whitened in some directions only (:mod:`remend.core.sketched_moment`).
    """
    moments = second_moments(task, modules, examples, sketched=True)
    return {name: moment.whitener(ridge) for name, moment in moments.items()}


@torch.no_grad()
def second_moments(
    task: Task, modules: Mapping[str, nn.Module], examples: Sequence[Example], sketched: bool = False
) -> dict[str, SecondMoment]:
    """Return for each matrix the second moment of its inputs at every token of the examples.

    Args:
        task: the model.
        modules: the matrices, by name.
        examples: ordinary inputs, such as those of :meth:`Task.ordinary_examples`.
        sketched: whether the moments of wide inputs are measured in some directions only.
    """
    moments: dict[str, SecondMoment] = {}
    test_matrix = cache(random_test_matrix)  # matrices of one width share it

    def new_moment(name: str, device: torch.device) -> SecondMoment:
        d = dimensions(modules[name])[0]
        directions = sketch_directions(d) if sketched else None
        if directions:
            return SketchedMoment(test_matrix(d, directions, device), directions)
        return SecondMoment(d, device)

    for start in range(0, len(examples), CALIBRATION_BATCH_SIZE):
        report_progress("measuring the inputs of matrices", start, len(examples))
        batch = task.collate(examples[start : start + CALIBRATION_BATCH_SIZE])
        forward = partial(run_as_far_as, task.model, modules.values(), partial(task.outputs, batch))
        inputs = record_inputs(task.model, modules, batch.rows, forward)
        masks = task.token_masks(batch, modules, predicting=False)
        for name, recorded in inputs.items():
            if name not in moments:
                moments[name] = new_moment(name, recorded.x.device)
            mask, tokens = masks[name].to(recorded.x.device), recorded.x.shape[1]
            if recorded.experts is not None:  # each token has as many rows as experts
                mask = mask.repeat_interleave(tokens // mask.shape[1], 1)
            elif tokens != mask.shape[1]:  # another sequence than the batch's (a layer over an encoder's output)
                mask = mask.new_ones(recorded.x.shape[:2])
            moments[name].update(recorded.x, mask)
    return moments
