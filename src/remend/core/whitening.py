"""Whitening of a layer's inputs: their second moment, and the operator after which no direction dominates."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from remend.core.symmetric_operator import SymmetricOperator


class SecondMoment:
    """C = E[u uᵀ] of one layer's input, over the tokens of many batches.

    Args:
        d: the input's dimensions.
        device: the device of the sums.
        columns: the columns of the sum, for subclasses that do not sum C itself.
    """

    def __init__(self, d: int, device: torch.device, columns: int | None = None) -> None:
        # In double precision on the CPU, so that sums do not depend on how many processes took part.
        precision = torch.float64 if device.type == "cpu" else torch.float32
        self.total = torch.zeros(d, columns or d, device=device, dtype=precision)
        self.sum = torch.zeros(d, device=device)
        self.fourth = torch.zeros((), device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    @property
    def tokens(self) -> int:
        """The number of vectors seen."""
        return int(self.counts[0])

    @property
    def prompts(self) -> int:
        """The number of prompts that they came from."""
        return int(self.counts[1])

    @property
    def totals(self) -> tuple[Tensor, ...]:
        """All state, as sums that processes which saw different batches can add up."""
        return self.total, self.sum, self.fourth, self.counts

    def update(self, u: Float[Tensor, "episode token d"], tokens: Bool[Tensor, "episode token"]) -> None:
        """Add the inputs at the tokens that ``tokens`` selects."""
        rows = u[tokens].to(self.total.device)
        self._add(rows)
        self.sum += rows.sum(0)
        self.fourth += rows.square().sum(1).square().sum()
        self.counts += torch.tensor([rows.shape[0], u.shape[0]], device=self.counts.device)

    def mean(self) -> Float[Tensor, " d"]:
        """Return E[u]."""
        return self.sum / max(self.tokens, 1)

    def whitener(self, ridge: float) -> SymmetricOperator:
        """Compute (C + floor · mean eigenvalue · I)^(−1/2), scaled so that whitened inputs keep their mean square.

        Args:
            ridge: the least floor: the share of the mean eigenvalue below which a direction counts as noise.
        """
        values, vectors = self._spectrum()
        mean = values.mean()
        if mean == 0:  # a layer whose input is always zero: there is nothing to whiten, and nothing to edit
            return self._operator(torch.ones_like(values), vectors, torch.ones_like(mean))
        # With few samples the floor is higher than `ridge`: a direction that happened not to occur would otherwise be
        # blown up the first time it does.
        shrinkage = self._shrinkage(float(values.square().sum()), float(mean), len(values))
        roots = (values + max(ridge, shrinkage) * mean).rsqrt()
        whitened = (values * roots.square()).mean()  # mean square of a whitened input's dimension
        return self._operator(roots, vectors, (mean / whitened).sqrt())

    def covariance(self, ridge: float) -> Float[Tensor, "d d"]:
        """Return C with the floor that :meth:`whitener` adds to every eigenvalue, so that it has an inverse."""
        moment = self._mean()
        if float(moment.trace()) == 0:  # a layer whose input is always zero
            return torch.eye(len(moment), device=moment.device)
        mean, size = float(moment.trace()) / len(moment), float(moment.square().sum())
        floor = max(ridge, self._shrinkage(size, mean, len(moment))) * mean
        return ((moment + moment.mT) / 2 + floor * torch.eye(len(moment)).to(moment)).float()

    def _mean(self) -> Float[Tensor, "d _columns"]:
        """Compute the sum's mean over tokens, in float64."""
        total = self.total.cpu() if self.total.device.type == "mps" else self.total  # mps has no float64
        return total.double() / max(self.tokens, 1)

    def _add(self, rows: Float[Tensor, "row d"]) -> None:
        self.total += rows.T @ rows

    def _spectrum(self) -> tuple[Float[Tensor, " d"], Float[Tensor, "d _k"]]:
        """Compute all eigenvalues of C, and the eigenvectors: at least those of the eigenvalues that differ."""
        values, vectors = torch.linalg.eigh(self._mean())
        return values.clamp(min=0), vectors

    def _operator(self, roots: Float[Tensor, " d"], vectors: Float[Tensor, "d _k"], scale: Tensor) -> SymmetricOperator:
        """Return ``scale`` times the operator with the eigenvalues ``roots``."""
        whitener = (vectors * roots) @ vectors.T * scale
        return SymmetricOperator(whitener.float().to(self.total.device))

    def _shrinkage(self, size: float, mean: float, d: int) -> float:
        """Compute ρ / (1 − ρ), with ρ Ledoit and Wolf's optimal weight of the identity (2004, section 3).

        ρ = E‖û ûᵀ − C‖² / n over ‖C − mean eigenvalue · I‖², where ``size`` is ‖C‖², the sum of squared eigenvalues.
        """
        # n counts prompts, not tokens: the tokens of one prompt are not independent samples.
        spread = (float(self.fourth) / self.tokens - size) / self.prompts
        distance = size - d * mean**2
        weight = min(max(spread, 0.0) / distance, 0.999) if distance > 0 else 0.999
        return weight / (1 - weight)
