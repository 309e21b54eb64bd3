"""Whitening of a layer's inputs: coordinates in which the directions that all inputs share no longer dominate."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class SecondMoment:
    """C = E[u uᵀ] of one layer's input, over the tokens of many batches."""

    def __init__(self, d: int, device: torch.device) -> None:
        self.total = torch.zeros(d, d, device=device)
        self.fourth = torch.zeros((), device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    @property
    def tokens(self) -> int:
        """How many vectors were seen."""
        return int(self.counts[0])

    @property
    def prompts(self) -> int:
        """How many prompts they came from."""
        return int(self.counts[1])

    @property
    def totals(self) -> tuple[Tensor, ...]:
        """All state, as sums: what processes that saw different batches add up."""
        return self.total, self.fourth, self.counts

    def update(self, u: Float[Tensor, "episode token d"], tokens: Bool[Tensor, "episode token"]) -> None:
        """Add the inputs at the given tokens."""
        rows = u[tokens].to(self.total.device)
        self.total += rows.T @ rows
        self.fourth += rows.square().sum(1).square().sum()
        self.counts += torch.tensor([rows.shape[0], u.shape[0]], device=self.counts.device)

    def whitener(self, ridge: float) -> Float[Tensor, "d d"]:
        """(C + floor · mean eigenvalue · I)^(−1/2), symmetric, scaled so that whitened inputs keep their mean square.

        The floor is ``ridge``, or more where C is known from too little: then a direction that happened not to occur
        would be blown up the first time it does. How much more is Ledoit and Wolf's shrinkage (2004): their optimal
        weight ρ of the identity, as ρ / (1 − ρ). Prompts are counted as the independent samples, not their tokens.

        Args:
            ridge: the share of the mean eigenvalue below which a direction counts as noise.
        """
        total = self.total.cpu() if self.total.device.type == "mps" else self.total  # which has no float64
        moment = total.double() / max(self.tokens, 1)
        values, vectors = torch.linalg.eigh(moment)
        values = values.clamp(min=0)
        mean = values.mean()
        if mean == 0:  # a layer whose input is always zero: there is nothing to whiten, and nothing to edit
            return torch.eye(len(values), device=self.total.device)
        roots = (values + max(ridge, self._shrinkage(values)) * mean).rsqrt()
        kept = (values * roots.square()).mean()  # mean square of a whitened input's dimension
        whitener: Tensor = (vectors * roots) @ vectors.T * (mean / kept).sqrt()
        return whitener.float().to(self.total.device)

    def _shrinkage(self, values: Float[Tensor, " d"]) -> float:
        """ρ / (1 − ρ), with ρ = E‖û ûᵀ − C‖² / n over ‖C − mean eigenvalue · I‖² (Ledoit and Wolf, section 3)."""
        size = float(values.square().sum())
        spread = (float(self.fourth) / self.tokens - size) / self.prompts
        distance = size - len(values) * float(values.mean()) ** 2
        weight = min(max(spread, 0.0) / distance, 0.999) if distance > 0 else 0.999
        return weight / (1 - weight)
