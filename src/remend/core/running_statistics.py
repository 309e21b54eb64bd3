"""Mean and variance of each input dimension, over the editor's training set, in closed form per batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

RELATIVE_FLOOR = 1e-3
"""A dimension's standard deviation counts as at least this share of the root mean square over its matrix's dimensions.

A dimension that never moves would otherwise be divided by almost nothing. Relative, because the deltas of one layer
may be a million times smaller than the activations of another.
"""


class RunningStatistics(nn.Module):
    """Per-matrix, per-dimension mean and variance of token vectors, all state in buffers.

    A batch is merged with Chan, Golub and LeVeque's parallel formula, so one batch of n rows and n batches of one row
    give the same result. The count is a 64-bit integer: a float32 one stops counting at 2²⁴ tokens.
    """

    count: Int[Tensor, " matrix"]
    mean: Float[Tensor, "matrix d"]
    squares: Float[Tensor, "matrix d"]

    def __init__(self, matrices: int, d: int) -> None:
        super().__init__()
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
        """Merge the statistics that another process took."""
        for matrix in range(len(count)):
            if count[matrix]:
                self._merge(matrix, count[matrix], mean[matrix], squares[matrix])

    def _merge(
        self, matrix: int, rows: Int[Tensor, ""], mean: Float[Tensor, " d"], squares: Float[Tensor, " d"]
    ) -> None:
        # The count is exact as an integer and only rounded where it is divided by.
        seen, new = self.count[matrix].to(mean.dtype), rows.to(mean.dtype)
        shift = mean - self.mean[matrix]
        self.mean[matrix] += shift * (new / (seen + new))
        self.squares[matrix] += squares + shift.square() * (seen * new / (seen + new))
        self.count[matrix] += rows

    def deviation(self) -> Float[Tensor, "matrix d"]:
        """The standard deviation (n − 1), with :data:`RELATIVE_FLOOR`; 1 where fewer than two rows were seen."""
        variance = self.squares / (self.count[:, None] - 1).clamp(min=1)
        floor = variance.mean(1, keepdim=True) * RELATIVE_FLOOR**2
        deviation = torch.maximum(variance, floor).sqrt()
        return torch.where((self.count[:, None] < 2) | (deviation == 0), torch.ones_like(deviation), deviation)
