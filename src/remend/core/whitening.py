"""Whitening of a layer's inputs: coordinates in which the directions that all inputs share no longer dominate."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class SecondMoment:
    """C = E[u uᵀ] of one layer's input, over the tokens of many batches."""

    def __init__(self, d: int, device: torch.device) -> None:
        self.total = torch.zeros(d, d, device=device)
        self.count = 0

    def update(self, u: Float[Tensor, "episode token d"], tokens: Bool[Tensor, "episode token"]) -> None:
        """Add the inputs at the given tokens."""
        rows = u[tokens].to(self.total.device)
        self.total += rows.T @ rows
        self.count += rows.shape[0]

    def whitener(self, ridge: float) -> Float[Tensor, "d d"]:
        """(C + ridge · mean eigenvalue · I)^(−1/2), symmetric, scaled so that whitened inputs keep their mean square.

        Args:
            ridge: the share of the mean eigenvalue below which a direction counts as noise.
        """
        total = self.total.cpu() if self.total.device.type == "mps" else self.total  # which has no float64
        moment = total.double() / max(self.count, 1)
        values, vectors = torch.linalg.eigh(moment)
        values = values.clamp(min=0)
        mean = values.mean()
        if mean == 0:  # a layer whose input is always zero: there is nothing to whiten, and nothing to edit
            return torch.eye(len(values), device=self.total.device)
        roots = (values + ridge * mean).rsqrt()
        kept = (values * roots.square()).mean()  # mean square of a whitened input's dimension
        whitener: Tensor = (vectors * roots) @ vectors.T * (mean / kept).sqrt()
        return whitener.float().to(self.total.device)
