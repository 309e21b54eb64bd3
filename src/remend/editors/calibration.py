"""What an editor measures of its base model once, before training: statistics, whitening, units of the step sizes.

The base model is frozen, so none of it changes afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from remend.base import find_modules
from remend.core.capture import GradientFactors
from remend.core.layers import is_quantised, weight_of
from remend.core.whitening import SecondMoment
from remend.editors.mend import Mend
from remend.tasks.causal_lm import Batch, CausalLM

UNIT_BATCHES = 4
"""Batches over which the units of relative step sizes are measured."""


def calibrate(editor: Mend, task: CausalLM, batches: Sequence[Batch]) -> None:
    """Fit the editor to its base model on the training set's edit pairs, in one or two passes over ``batches``.

    First the whiteners (if the configuration asks for them), since what follows is measured in their coordinates; then
    the statistics that normalise the networks' inputs; then the units of the step sizes (if they are relative).
    """
    if editor.config.ridge:
        _fit_whiteners(editor, task, batches)
    for batch in batches:
        _observe(editor, editor.capture(task, batch))
    if editor.config.relative:
        _measure_units(editor, task, [editor.capture(task, batch) for batch in batches[:UNIT_BATCHES]])


def _observe(editor: Mend, factors: Mapping[str, GradientFactors]) -> None:
    """Merge a batch into the networks' input statistics."""
    for key, names in editor.groups.items():
        network = editor.network(key)
        for index, name in enumerate(names):
            u, delta = editor.active(factors[name], name)
            network.u_statistics.update(u, index)
            network.delta_statistics.update(delta, index)


def _fit_whiteners(editor: Mend, task: CausalLM, batches: Sequence[Batch]) -> None:
    """One whitener a matrix, from its inputs at every token of the prompts (padding is zero, and left out)."""
    moments = {name: SecondMoment(d_in, editor.device) for name, (d_in, _) in editor.shapes.items()}
    for batch in batches:
        for name, factors in editor.capture(task, batch).items():
            moments[name].update(factors.u, (factors.u != 0).any(-1))
    for index, moment in enumerate(moments.values()):
        setattr(editor, f"whitener_{index}", moment.whitener(editor.config.ridge))


@torch.no_grad()
def _measure_units(editor: Mend, task: CausalLM, observed: Sequence[Mapping[str, GradientFactors]]) -> None:
    """The unit of each α: the size of the layer's output over that of (u·ũ) δ̃, a token's answer to its own edit."""
    modules = find_modules(task.model, editor.shapes)
    for key, names in editor.groups.items():
        for index, name in enumerate(names):
            inputs = torch.cat([factors[name].u[factors[name].active] for factors in observed])
            module = modules[name]
            dtype = task.model.dtype if is_quantised(module) else weight_of(module).dtype
            output = module(inputs.to(dtype)).float()
            rows = [editor.active(factors[name], name) for factors in observed]
            u, delta = torch.cat([u for u, _ in rows]), torch.cat([delta for _, delta in rows])
            pseudo_u, pseudo_delta = editor.network(key)(u, delta, torch.full((len(u),), index, device=editor.device))
            matched = (inputs.to(editor.device) * editor.whiten(pseudo_u, name)).sum(1).abs().mean()
            answer = matched * pseudo_delta.square().mean().sqrt()
            unit = output.square().mean().sqrt().to(editor.device) / answer
            editor.unit[list(editor.shapes).index(name)] = unit if unit.isfinite() and unit > 0 else 1.0
