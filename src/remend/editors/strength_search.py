"""Searches the strength that each edit needs for its own prompt to be answered with the target.

The model is surer of some answers than of others. So one step size is too small for one request and larger than needed
for another, where it changes neighbours. What an edit needs can be measured without any other prompt: the scale s at
which the first token of its target just becomes the model's first choice. A paraphrase responds less to the edit than
the prompt, and needs more than s. A neighbour responds still less, and stays the same up to a multiple of s. The
strength is the geometric mean of the one that training gave (1) and such a multiple: where they differ, both err, in
opposite directions. ``benchmarks/frontier.py`` measures editors with and without this.

The edit's effect at later tokens of the target is not scaled: a neighbour's answer changes at its first token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.losses import row_mean
from remend.core.low_rank import LowRank, layer_names
from remend.core.low_rank_hooks import changes_applied, frozen
from remend.fingerprint import find_modules
from remend.models.frozen_prefix import FrozenPrefix
from remend.tasks.base import Batch, Task

LARGEST_SCALE = 8.0
"""The largest scale that is tried: an edit without effect at this scale does not take effect by being stronger."""

REFINEMENTS = 2
"""The number of steps that narrow the interval around s: enough to know the strength within a quarter.

False position approaches s from above, so the remaining error makes edits stronger; by a tenth on the atlas.
"""

SMALLEST_EXPONENT, LARGEST_EXPONENT = -8.0, 3.0
"""Where targets are numbers, scales between 2⁻⁸ and 2³ are tried: a larger one would move past the target."""


class UneditedPass:
    """The unedited model's pass over a batch of edit pairs, whose states are reused by passes of the edited model.

    Args:
        task: the model.
        batch: the edit pairs.
        edited: the names of the matrices that edits change.
        all_targets: whether an edit takes effect when the model predicts all of its targets, or the first one.
    """

    def __init__(self, task: Task, batch: Batch, edited: Iterable[str], all_targets: bool = False) -> None:
        self.task, self.batch, self.all_targets = task, batch, all_targets
        self.prefix = FrozenPrefix(task.model, edited)
        self.states: Tensor | None = None
        self.outputs: Tensor | None = None

    def loss(self) -> Float[Tensor, " episode"]:
        """Run the model, store its outputs and the input of the lowest edited block, and return the pairs' losses."""
        batch = self.batch
        return self.task.distribution.loss(self._run(), batch.target, batch.row, batch.rows)

    def squared_error(self) -> Float[Tensor, " episode"]:
        """Run the model as :meth:`loss` does; return (prediction − target)² / 2, averaged over each pair's targets.

        For targets that are numbers. Unlike that of −log p, its gradient does not depend on the predicted spread, so
        that all dimensions reach their targets at about the same scale.
        """
        batch = self.batch
        errors = self.task.distribution.mode(self._run()) - batch.target
        return row_mean(errors.square() / 2, batch.row, batch.rows)

    def _run(self) -> Float[Tensor, "target output"]:
        """Run the model, store its outputs and the input of the lowest edited block, and return the outputs."""
        with self.prefix.record_input() as recorded:
            outputs = self.task.outputs(self.batch)
        self.outputs, self.states = outputs.detach().float(), recorded.get("states")
        return outputs

    @torch.no_grad()
    def margins(self, changes: Mapping[str, LowRank]) -> Float[Tensor, " episode"]:
        """Run the edited model and return by how much each target is predicted (:meth:`Distribution.margin`)."""
        modules = find_modules(self.task.model, layer_names(changes))
        with self.prefix.resume_from(self.states), changes_applied(modules, changes):
            return self.margins_of(self.task.outputs(self.batch).float())

    def margins_of(self, outputs: Float[Tensor, "target output"]) -> Float[Tensor, " episode"]:
        """Return the margins of given outputs: of each first target, or the smallest one of all targets."""
        row, target = self.batch.row.to(outputs.device), self.batch.target.to(outputs.device)
        margins = self.task.distribution.margin(outputs, target)
        if not self.all_targets:
            first = torch.ones_like(row, dtype=torch.bool)
            first[1:] = row[1:] != row[:-1]
            margins, row = margins[first], row[first]
        smallest = margins.new_full((self.batch.rows,), torch.inf).scatter_reduce(0, row, margins, "amin")
        return smallest.to(self.batch.row.device)

    @torch.no_grad()
    def verify(self) -> None:
        """Run the whole model from now on if resuming at the lowest edited block gives other outputs."""
        if self.states is None:
            return
        assert self.outputs is not None
        if not self.prefix.check_resume(self.states, lambda: self.task.outputs(self.batch), self.outputs):
            self.states = None


@torch.no_grad()
def smallest_effective_scales(
    unedited: UneditedPass, changes: Mapping[str, LowRank], settle: float = 1.0
) -> Float[Tensor, " episode"]:
    """Return for each edit pair the scale s of its change at which the model just predicts the target.

    The scale is found by false position on :meth:`UneditedPass.margins`. Edits without effect up to
    :data:`LARGEST_SCALE` get the scale with the largest margin. Where the model predicts the target without an edit,
    the scale is 0 if the edit would undo this (editors are trained to change answers), and otherwise the one for which
    :func:`scale_to_strength` leaves the edit as it is.

    Where targets are numbers, which a larger scale moves past, it is the scale at which the prediction is nearest to
    the target, to a twentieth of itself; 0 where the model predicts it already.

    Args:
        unedited: the pass in which the edits' gradients were taken, with one pair for each episode of ``changes``.
        changes: the batched changes of the edits.
        settle: the factor of the scales in :func:`scale_to_strength`.
    """
    with frozen(unedited.task.model):
        if not unedited.task.distribution.discrete:
            return _search_nearest(unedited, changes)
        return _search(unedited, changes, settle)


def _search_nearest(unedited: UneditedPass, changes: Mapping[str, LowRank]) -> Float[Tensor, " episode"]:
    """Return the scales with the largest margins: first in steps of a half of log₂, then ever finer around the best."""
    assert unedited.outputs is not None, "loss() comes first"
    unedited.verify()

    def margins(exponent: Float[Tensor, " episode"]) -> Float[Tensor, " episode"]:
        scale = (2**exponent)[:, None, None]
        return unedited.margins({name: change.scaled(scale) for name, change in changes.items()})

    before = unedited.margins_of(unedited.outputs)
    best = torch.full_like(before, SMALLEST_EXPONENT)
    largest = margins(best)
    steps = int(2 * (LARGEST_EXPONENT - SMALLEST_EXPONENT))
    trials = [torch.full_like(before, SMALLEST_EXPONENT + step / 2) for step in range(1, steps + 1)]
    for step in (0.25, 0.125, 0.0625, 0.0):
        for exponent in trials:
            margin = margins(exponent)
            best, largest = torch.where(margin > largest, exponent, best), torch.maximum(margin, largest)
        trials = [best - step, best + step]
    return torch.where(before > 0, torch.zeros_like(best), 2**best)


def _search(unedited: UneditedPass, changes: Mapping[str, LowRank], settle: float) -> Float[Tensor, " episode"]:
    assert unedited.outputs is not None, "loss() comes first"
    unedited.verify()

    def margins(scale: Float[Tensor, " episode"]) -> Float[Tensor, " episode"]:
        return unedited.margins({name: change.scaled(scale[:, None, None]) for name, change in changes.items()})

    below = unedited.margins_of(unedited.outputs)
    predicted = below > 0
    low, high = torch.zeros_like(below), torch.ones_like(below)
    above = margins(high)
    scale_if_predicted = torch.where(above > 0, torch.full_like(above, 1 / settle), torch.zeros_like(above))
    best_scale, best_margin = high.clone(), above.clone()
    # Double the upper end of each interval until the edit takes effect there.
    while bool((without_effect := (above <= 0) & (high < LARGEST_SCALE)).any()):
        low, below = torch.where(without_effect, high, low), torch.where(without_effect, above, below)
        high = torch.where(without_effect, 2 * high, high)
        above = torch.where(without_effect, margins(high), above)
        better = above > best_margin
        best_scale, best_margin = torch.where(better, high, best_scale), torch.where(better, above, best_margin)
    bracketed = (above > 0) & ~predicted
    for _ in range(REFINEMENTS):
        middle = _zero_crossing(low, high, below, above)
        at_middle = margins(torch.where(bracketed, middle, high))
        effective = at_middle > 0
        high, above = (
            torch.where(bracketed & effective, new, old) for new, old in ((middle, high), (at_middle, above))
        )
        low, below = (torch.where(bracketed & ~effective, new, old) for new, old in ((middle, low), (at_middle, below)))
    scale = torch.where(bracketed, _zero_crossing(low, high, below, above), best_scale)
    return torch.where(predicted, scale_if_predicted, scale)


def scale_to_strength(
    unedited: UneditedPass, changes: Mapping[str, LowRank], settle: float, tokens: Mapping[str, Sequence[int]]
) -> dict[str, LowRank]:
    """Return the changes with the part that acts at the first token of the target scaled by √(settle · s).

    Args:
        unedited: the pass in which the edits' gradients were taken.
        changes: the batched changes of the edits.
        settle: the factor of s.
        tokens: the number of factor pairs of each episode in each change. If there is one for each token of the target
            (for matrices of experts: a multiple of that), the first is scaled; otherwise (all tokens take part) all
            are.
    """
    scales = smallest_effective_scales(unedited, changes, settle)
    if unedited.task.distribution.discrete:  # otherwise a larger scale would move the prediction past the target
        scales = (settle * scales).sqrt()
    lengths = torch.bincount(unedited.batch.row).tolist()
    scaled = {}
    for name, change in changes.items():
        factor = scales[:, None, None].expand(-1, change.rank, 1).clone()
        for episode, (count, length) in enumerate(zip(tokens[name], lengths, strict=True)):
            slots = 1 if change.experts is None else count // length
            if count and count == slots * length:
                factor[episode, slots:] = 1
        scaled[name] = change.scaled(factor)
    return scaled


def _zero_crossing(low: Tensor, high: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """Return the scale at which a straight line through both margins is zero."""
    return low + (high - low) * (-below / (above - below).clamp(min=1e-6)).clamp(0, 1)
