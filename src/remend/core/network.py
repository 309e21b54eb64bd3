"""The editor network g of MEND (paper, section 3.2, Eq. 3 and appendix A): one for all matrices of one shape."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from remend.core.statistics import RunningStatistics


class LowRankResidual(nn.Module):
    """One layer of Eq. 3: z ↦ z + σ(s_ℓ ⊙ (U V z + b) + o_ℓ), with scale s_ℓ and offset o_ℓ for each edited matrix ℓ.

    U starts at zero, so the layer starts as the identity, and V Xavier-uniform (appendix A). σ is a ReLU whose
    derivative at 0 is 1: with U = 0 every pre-activation *is* 0, and with the usual derivative nothing would learn.
    """

    def __init__(self, d: int, rank: int, matrices: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, d))
        self.up = nn.Parameter(torch.zeros(d, rank))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None
        self.scale = nn.Parameter(torch.ones(matrices, d))
        self.offset = nn.Parameter(torch.zeros(matrices, d))
        nn.init.xavier_uniform_(self.down)

    def forward(self, z: Float[Tensor, "row d"], matrix: Int[Tensor, " row"]) -> Float[Tensor, "row d"]:
        """``z`` plus its learned correction; ``matrix[i]`` tells which matrix's scale and offset row i takes."""
        inner = functional.linear(functional.linear(z, self.down), self.up, self.bias)
        pre = functional.embedding(matrix, self.scale) * inner + functional.embedding(matrix, self.offset)
        return z + pre.clamp(min=0)  # clamp: its derivative at the bound is 1


class EditorNetwork(nn.Module):
    """g: (u, δ) ↦ (ũ, δ̃), token by token, for every edited matrix of one shape.

    The input is normalised to zero mean and unit variance per dimension, with statistics of the training set taken
    before training (the base model is frozen, so they never change); the output stays in normalised units, as in Eq. 3.
    """

    def __init__(self, d_in: int, d_out: int, matrices: int, rank: int) -> None:
        super().__init__()
        d = d_in + d_out
        rank = min(rank, d)
        self.d_in, self.d_out, self.matrices = d_in, d_out, matrices
        self.u_statistics = RunningStatistics(matrices, d_in)
        self.delta_statistics = RunningStatistics(matrices, d_out)
        self.first = LowRankResidual(d, rank, matrices, bias=True)
        self.second = LowRankResidual(d, rank, matrices, bias=False)

    def normalise(
        self, u: Float[Tensor, "row d_in"], delta: Float[Tensor, "row d_out"], matrix: Int[Tensor, " row"]
    ) -> Float[Tensor, "row d"]:
        """Z = concat(norm(u), norm(δ)), each row with the statistics of its own matrix."""
        parts = []
        for values, statistics in ((u, self.u_statistics), (delta, self.delta_statistics)):
            parts.append((values - statistics.mean[matrix]) / statistics.deviation()[matrix])
        return torch.cat(parts, 1)

    def forward(
        self, u: Float[Tensor, "row d_in"], delta: Float[Tensor, "row d_out"], matrix: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, "row d_in"], Float[Tensor, "row d_out"]]:
        """The pseudo-activations ũ and pseudo-deltas δ̃ of ``row`` tokens, of any of this network's matrices."""
        z = self.second(self.first(self.normalise(u, delta, matrix), matrix), matrix)
        return z[:, : self.d_in], z[:, self.d_in :]
