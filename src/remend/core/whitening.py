"""Whitening of a layer's inputs: coordinates in which the directions that all inputs share no longer dominate."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from remend.core.operators import SymmetricOperator


class SecondMoment:
    """C = E[u uᵀ] of one layer's input, over the tokens of many batches.

    Args:
        d: the input's dimensions.
        device: where sums are kept.
        columns: of what is summed, where that is not C itself.
    """

    def __init__(self, d: int, device: torch.device, columns: int | None = None) -> None:
        self.total = torch.zeros(d, columns or d, device=device)
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
        self._add(rows)
        self.fourth += rows.square().sum(1).square().sum()
        self.counts += torch.tensor([rows.shape[0], u.shape[0]], device=self.counts.device)

    def whitener(self, ridge: float) -> SymmetricOperator:
        """(C + floor · mean eigenvalue · I)^(−1/2), scaled so that whitened inputs keep their mean square.

        The floor is ``ridge``, or more where C is known from too little: then a direction that happened not to occur
        would be blown up the first time it does. How much more is Ledoit and Wolf's shrinkage (2004): their optimal
        weight ρ of the identity, as ρ / (1 − ρ). Prompts are counted as the independent samples, not their tokens.

        Args:
            ridge: the share of the mean eigenvalue below which a direction counts as noise.
        """
        values, vectors = self._spectrum()
        mean = values.mean()
        if mean == 0:  # a layer whose input is always zero: there is nothing to whiten, and nothing to edit
            return self._operator(torch.ones_like(values), vectors, torch.ones_like(mean))
        shrinkage = self._shrinkage(float(values.square().sum()), float(mean), len(values))
        roots = (values + max(ridge, shrinkage) * mean).rsqrt()
        kept = (values * roots.square()).mean()  # mean square of a whitened input's dimension
        return self._operator(roots, vectors, (mean / kept).sqrt())

    def covariance(self, ridge: float) -> Float[Tensor, "d d"]:
        """C with the floor that :meth:`whitener` adds to every eigenvalue, so that it has an inverse."""
        found = self._mean()
        if float(found.trace()) == 0:  # a layer whose input is always zero
            return torch.eye(len(found), device=found.device)
        mean, size = float(found.trace()) / len(found), float(found.square().sum())
        floor = max(ridge, self._shrinkage(size, mean, len(found))) * mean
        return ((found + found.mT) / 2 + floor * torch.eye(len(found)).to(found)).float()

    def _mean(self) -> Float[Tensor, "d _columns"]:
        """The sum's mean over tokens, in float64."""
        total = self.total.cpu() if self.total.device.type == "mps" else self.total  # which has no float64
        return total.double() / max(self.tokens, 1)

    def _add(self, rows: Float[Tensor, "row d"]) -> None:
        self.total += rows.T @ rows

    def _spectrum(self) -> tuple[Float[Tensor, " d"], Float[Tensor, "d _k"]]:
        """All eigenvalues of C; eigenvectors, of those at least that differ."""
        values, vectors = torch.linalg.eigh(self._mean())
        return values.clamp(min=0), vectors

    def _operator(self, roots: Float[Tensor, " d"], vectors: Float[Tensor, "d _k"], scale: Tensor) -> SymmetricOperator:
        """``scale`` times what has the eigenvalues ``roots``."""
        whitener = (vectors * roots) @ vectors.T * scale
        return SymmetricOperator(whitener.float().to(self.total.device))

    def _shrinkage(self, size: float, mean: float, d: int) -> float:
        """ρ / (1 − ρ), with ρ = E‖û ûᵀ − C‖² / n over ‖C − mean eigenvalue · I‖² (Ledoit and Wolf, section 3).

        ``size`` is ‖C‖², the sum of the squared eigenvalues.
        """
        spread = (float(self.fourth) / self.tokens - size) / self.prompts
        distance = size - d * mean**2
        weight = min(max(spread, 0.0) / distance, 0.999) if distance > 0 else 0.999
        return weight / (1 - weight)
