"""What an editor measures of its base model once, before training: statistics, whitening, units of the step sizes.

The base model is frozen, so none of it changes afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from remend.base import find_modules
from remend.core.layers import is_quantised, weight_of
from remend.core.statistics import RunningStatistics
from remend.core.whitening import SecondMoment
from remend.editors.mend import Mend
from remend.models.sharding import gathered
from remend.tasks.causal_lm import Pair
from remend.training.constants import Constants
from remend.training.workers import Workers

UNIT_BATCHES = 4
"""Batches over which the units of relative step sizes are measured."""


def calibrate(editor: Mend, constants: Constants, batches: Sequence[Sequence[Pair]], workers: Workers) -> None:
    """Fit the editor to its base model on the training set's edit pairs, in one or two passes over ``batches``.

    First the whiteners (if the configuration asks for them), since what follows is measured in their coordinates; then
    the statistics that normalise the networks' inputs; then the units of the step sizes (if they are relative). Several
    processes share the batches and merge what they find.
    """
    own = batches[workers.rank :: workers.count]
    if editor.config.ridge:
        _fit_whiteners(editor, constants, own, workers)
    for batch in own:
        _observe(editor, constants, batch)
    for key in editor.groups:
        for statistics in (editor.network(key).u_statistics, editor.network(key).delta_statistics):
            _merge(statistics, workers)
    if editor.config.relative:
        _measure_units(editor, constants, batches[:UNIT_BATCHES])


def _fit_whiteners(editor: Mend, constants: Constants, batches: Sequence[Sequence[Pair]], workers: Workers) -> None:
    """One whitener a matrix, from its inputs at every token of the prompts (padding is zero, and left out)."""
    moments = {name: SecondMoment(d_in, editor.device) for name, (d_in, _) in editor.shapes.items()}
    for batch in batches:
        for name, factors in constants.gradient_factors(batch).items():
            moments[name].update(factors.u, (factors.u != 0).any(-1))
    for index, moment in enumerate(moments.values()):
        workers.sum(*moment.totals)
        setattr(editor, f"whitener_{index}", moment.whitener(editor.config.ridge))


def _observe(editor: Mend, constants: Constants, batch: Sequence[Pair]) -> None:
    """Merge a batch into the networks' input statistics."""
    rows = constants.rows(batch)
    for key, names in editor.groups.items():
        network = editor.network(key)
        for index, name in enumerate(names):
            network.u_statistics.update(rows[name].u, index)
            network.delta_statistics.update(rows[name].delta, index)


def _merge(statistics: RunningStatistics, workers: Workers) -> None:
    """Make every process's statistics those of all processes."""
    found = zip(
        *(workers.gather(part) for part in (statistics.count, statistics.mean, statistics.squares)), strict=True
    )
    first, *others = ([part.clone() for part in parts] for parts in found)
    for whole, part in zip((statistics.count, statistics.mean, statistics.squares), first, strict=True):
        whole.copy_(part)
    for count, mean, squares in others:
        statistics.merge(count, mean, squares)


@torch.no_grad()
def _measure_units(editor: Mend, constants: Constants, batches: Sequence[Sequence[Pair]]) -> None:
    """The unit of each α: the size of the layer's output over that of (u·ũ) δ̃, a token's answer to its own edit."""
    modules = find_modules(constants.task.model, editor.shapes)
    observed = [constants.gradient_factors(batch) for batch in batches]
    rows = [editor.rows(factors) for factors in observed]
    for key, names in editor.groups.items():
        us = [torch.cat([own[name].u for own in rows]) for name in names]
        deltas = [torch.cat([own[name].delta for own in rows]) for name in names]
        for name, (pseudo_u, pseudo_delta) in zip(names, editor.network(key)(us, deltas), strict=True):
            inputs = torch.cat([factors[name].u[factors[name].active] for factors in observed])
            module = modules[name]
            dtype = constants.task.model.dtype if is_quantised(module) else weight_of(module).dtype
            with gathered(constants.task.model, module):
                output = module(inputs.to(dtype)).float()
            matched = (inputs.to(editor.device) * editor.whiten(pseudo_u, name)).sum(1).abs().mean()
            answer = matched * pseudo_delta.square().mean().sqrt()
            unit = output.square().mean().sqrt().to(editor.device) / answer
            editor.unit[list(editor.shapes).index(name)] = unit if unit.isfinite() and unit > 0 else 1.0
