"""Mean and variance of each input dimension over the editor's training set, updated in closed form per batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

RELATIVE_FLOOR = 1e-3
"""The least standard deviation of a dimension, as a share of the root mean square over its matrix's dimensions.

Without a floor, a dimension that never changes would be divided by almost nothing. The floor is relative, because the
deltas of one layer may be a million times smaller than the activations of another.
"""


class RunningStatistics(nn.Module):
    """Per-matrix, per-dimension mean and variance of token vectors, with all state in buffers.

    One batch of n rows and n batches of one row give the same result.
    """

    count: Int[Tensor, " matrix"]
    mean: Float[Tensor, "matrix d"]
    squares: Float[Tensor, "matrix d"]

    def __init__(self, matrices: int, d: int) -> None:
        super().__init__()
        # An integer: a float32 count stops growing at 2²⁴ tokens.
        self.register_buffer("count", torch.zeros(matrices, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(matrices, d))
        self.register_buffer("squares", torch.zeros(matrices, d))

    @torch.no_grad()
    def update(self, values: Float[Tensor, "row d"], matrix: int) -> None:
        """Merge one batch of rows into the statistics of one matrix; the caller has checked that it is finite."""
        rows = values.shape[0]
        if rows == 0:
            return
        mean = values.mean(0)
        squares = (values - mean).square().sum(0)
        self._merge(matrix, torch.tensor(rows, device=mean.device), mean, squares)

    @torch.no_grad()
    def merge(
        self, count: Int[Tensor, " matrix"], mean: Float[Tensor, "matrix d"], squares: Float[Tensor, "matrix d"]
    ) -> None:
        """Merge the statistics of another process."""
        for matrix in range(len(count)):
            if count[matrix]:
                self._merge(matrix, count[matrix], mean[matrix], squares[matrix])

    def _merge(
        self, matrix: int, rows: Int[Tensor, ""], mean: Float[Tensor, " d"], squares: Float[Tensor, " d"]
    ) -> None:
        # Chan, Golub and LeVeque's parallel formula, on squared deviations: plain sums of squares would cancel where
        # the mean is large.
        # The count is exact as an integer and rounded only where it is divided by.
        old, new = self.count[matrix].to(mean.dtype), rows.to(mean.dtype)
        shift = mean - self.mean[matrix]
        self.mean[matrix] += shift * (new / (old + new))
        self.squares[matrix] += squares + shift.square() * (old * new / (old + new))
        self.count[matrix] += rows

    def deviation(self) -> Float[Tensor, "matrix d"]:
        """Compute the standard deviation (n − 1) with :data:`RELATIVE_FLOOR`; 1 where fewer than two rows were seen."""
        variance = self.squares / (self.count[:, None] - 1).clamp(min=1)
        floor = variance.mean(1, keepdim=True) * RELATIVE_FLOOR**2
        deviation = torch.maximum(variance, floor).sqrt()
        return torch.where((self.count[:, None] < 2) | (deviation == 0), torch.ones_like(deviation), deviation)
