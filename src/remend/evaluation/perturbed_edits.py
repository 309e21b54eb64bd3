"""``PERTURBATIONS``: edits with inexact numbers: what is left of them after noise, or without some of their weights.

An edit that a little noise undoes has not been learned well: it would not survive quantisation, further training or
pruning, and the old answer could be had back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from remend.edit import Edit

SHARE = 0.1
"""The standard deviation of the noise as a share of each number, and the share of the numbers that are left out."""


def with_noise(edit: Edit, seed: int) -> Edit:
    """Return an edit whose factors have noise: each number times 1 + :data:`SHARE` · N(0, 1)."""
    return _perturbed(edit, seed, lambda factor, normal: factor * (1 + SHARE * normal))


def with_mask(edit: Edit, seed: int) -> Edit:
    """Return an edit of whose factors a share of :data:`SHARE` of the numbers, drawn at random, is set to zero."""
    least = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(SHARE)))
    return _perturbed(edit, seed, lambda factor, normal: factor * (normal > least))


def _perturbed(edit: Edit, seed: int, perturb: Callable[[Tensor, Tensor], Tensor]) -> Edit:
    generator = torch.Generator().manual_seed(seed)

    def of_factor(factor: Tensor) -> Tensor:
        normal = torch.randn(factor.shape, generator=generator)
        return perturb(factor, normal.to(factor)).to(factor)

    changes = {
        name: replace(change, u=of_factor(change.u), delta=of_factor(change.delta))
        for name, change in edit.changes.items()
    }
    return replace(edit, changes=changes, taken=None)


PERTURBATIONS: Mapping[str, Callable[[Edit, int], Edit]] = {
    f"noise_{SHARE:.0%}": with_noise,
    f"mask_{SHARE:.0%}": with_mask,
}
"""What perturbs an edit, by its name in reports."""
