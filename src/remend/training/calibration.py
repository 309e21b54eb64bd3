"""What an editor measures of its base model once, before training: statistics, whitening, units of the step sizes.

The base model is frozen, so none of it changes afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from remend.base import find_modules
from remend.core.layers import is_quantised, weight_of
from remend.core.statistics import RunningStatistics
from remend.core.whitening import SecondMoment
from remend.editors.mend import Mend, TokenRows
from remend.models.sharding import gathered
from remend.tasks.causal_lm import Pair
from remend.training.constants import Constants
from remend.training.workers import Workers

UNIT_BATCHES = 4
"""Batches over which the units of relative step sizes are measured."""


def calibrate(editor: Mend, constants: Constants, batches: Sequence[Sequence[Pair]], workers: Workers) -> None:
    """Fit the editor to its base model on the training set's edit pairs.

    In one pass over ``batches``; with whitening in a second one over those that the store of gradient factors has no
    room for.

    First the whiteners (if the configuration asks for them), since what follows is measured in their coordinates; then
    the statistics that normalise the networks' inputs; then the units of the step sizes (if they are relative). Several
    processes share the batches and merge what they find.
    """
    own = batches[workers.rank :: workers.count]
    seen = _fit_whiteners(editor, constants, own, workers) if editor.config.ridge else {}
    for number, batch in enumerate(own):
        raw = seen.pop(number, None) or editor.active_rows(constants.gradient_factors(batch))
        rows = editor.whitened(raw)
        constants.keep_rows(batch, rows)
        _observe(editor, rows)
    for key in editor.groups:
        for statistics in (editor.network(key).u_statistics, editor.network(key).delta_statistics):
            _merge(statistics, workers)
    if editor.config.relative:
        _measure_units(editor, constants, batches[:UNIT_BATCHES])


def warm(editor: Mend, constants: Constants, batches: Sequence[Sequence[Pair]], workers: Workers) -> None:
    """Fill the stores as :func:`calibrate` did, with an editor that is fitted already: with the same bits."""
    own = batches[workers.rank :: workers.count]
    for batch in own if editor.config.ridge else ():
        constants.prefix_states(batch)
    for batch in own:
        constants.keep_rows(batch, editor.rows(constants.gradient_factors(batch)))
    for batch in batches[:UNIT_BATCHES] if editor.config.relative else ():
        constants.prefix_states(batch)


def _fit_whiteners(
    editor: Mend, constants: Constants, batches: Sequence[Sequence[Pair]], workers: Workers
) -> dict[int, dict[str, TokenRows]]:
    """One whitener a matrix, from its inputs at every token of the prompts (padding is zero, and left out).

    Returns:
        The active rows of the first batches, by number: of so many as the store of gradient factors has room for.
    """
    moments = {name: SecondMoment(d_in, editor.device) for name, (d_in, _) in editor.shapes.items()}
    seen: dict[int, dict[str, TokenRows]] = {}
    room = constants.factors.budget
    for number, batch in enumerate(batches):
        observed = constants.gradient_factors(batch)
        for name, factors in observed.items():
            moments[name].update(factors.u, (factors.u != 0).any(-1))
        rows = editor.active_rows(observed)
        room -= sum(4 * values.numel() for own in rows.values() for values in (own.u, own.delta))
        if room >= 0:
            seen[number] = rows
    for index, moment in enumerate(moments.values()):
        workers.sum(*moment.totals)
        setattr(editor, f"whitener_{index}", moment.whitener(editor.config.ridge))
    return seen


def _observe(editor: Mend, rows: Mapping[str, TokenRows]) -> None:
    """Merge a batch into the networks' input statistics."""
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
