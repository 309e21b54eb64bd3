"""MEND's editor network g (paper, section 3.2, Eq. 3 and appendix A): one network for all matrices of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from remend.core.cpu_matmul import matmul, padded_row_count
from remend.core.editor_gradients import FactoredGradients
from remend.core.running_statistics import RunningStatistics


class LowRankResidual(nn.Module):
    """One layer of Eq. 3: z ↦ z + σ(s_ℓ ⊙ (U V z + b) + o_ℓ), with scale s_ℓ and offset o_ℓ for each edited matrix ℓ.

    σ is a ReLU whose derivative at 0 is 1. U starts at zero, so the layer starts as the identity, and V Xavier-uniform
    (appendix A); without ``identity`` U starts Xavier-uniform too (section 5.4).
    """

    def __init__(self, d: int, rank: int, matrices: int, bias: bool, identity: bool = True) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, d))
        self.up = nn.Parameter(torch.zeros(d, rank))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None
        self.scale = nn.Parameter(torch.ones(matrices, d))
        self.offset = nn.Parameter(torch.zeros(matrices, d))
        nn.init.xavier_uniform_(self.down)
        if not identity:
            nn.init.xavier_uniform_(self.up)

    def forward(
        self, z: Float[Tensor, "row d"], counts: Sequence[int], factored: FactoredGradients | None = None
    ) -> Float[Tensor, "row d"]:
        """Return ``z`` plus its learned correction.

        Args:
            z: rows ordered by matrix; rows of zeros may follow, and stay zero.
            counts: the number of rows of each matrix.
            factored: if given, the backward pass adds the factors of U's and V's gradients here and computes no dense
                gradients of them.
        """
        output: Tensor = _Residual.apply(  # type: ignore[no-untyped-call]
            z, self.down, self.up, self.bias, self.scale, self.offset, counts, factored
        )
        return output


class _Residual(torch.autograd.Function):
    """:class:`LowRankResidual` with few passes over memory, which cost nearly as much as its two products."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        down: nn.Parameter,
        up: nn.Parameter,
        bias: nn.Parameter | None,
        scale: nn.Parameter,
        offset: nn.Parameter,
        counts: Sequence[int],
        factored: FactoredGradients | None,
    ) -> Tensor:
        dtype = torch.float32 if factored is None else factored.dtype
        h = matmul(z, down.mT, dtype)
        inner = matmul(h, up.mT, dtype)
        if bias is not None:
            inner += bias
        out = torch.empty_like(z)
        for matrix, rows in enumerate(_segments(counts)):
            torch.addcmul(offset[matrix], inner[rows], scale[matrix], out=out[rows])
        out[sum(counts) :] = 0  # padding: these rows belong to no matrix and are uninitialized
        # Not > 0: with U = 0 every pre-activation is exactly 0, and with a ReLU's usual derivative nothing would learn.
        active = out >= 0
        out.clamp_(min=0).add_(z)
        ctx.save_for_backward(z, down, up, h, inner, active, scale)
        ctx.counts, ctx.factored, ctx.bias, ctx.dtype = counts, factored, bias is not None, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, down, up, h, inner, active, scale = ctx.saved_tensors
        g_inner = gradient * active
        g_scale, g_offset = torch.zeros_like(scale), torch.zeros_like(scale)
        for matrix, rows in enumerate(_segments(ctx.counts)):
            part = g_inner[rows]  # a view: scaled in place below
            g_offset[matrix] = part.sum(0)
            g_scale[matrix] = torch.linalg.vecdot(part, inner[rows], dim=0)
            part *= scale[matrix]
        # The bias acts through the scale, as U V z does.
        g_bias = (g_offset * scale).sum(0) if ctx.bias else None
        g_h = matmul(g_inner, up, ctx.dtype)
        g_z = None  # the first layer's input is data: the captured factors
        if ctx.needs_input_grad[0]:
            g_z = matmul(g_h, down, ctx.dtype).add_(gradient)
        if ctx.factored is None:
            return g_z, matmul(g_h.mT, z), matmul(g_inner.mT, h), g_bias, g_scale, g_offset, None, None
        ctx.factored.add(down, g_h, z)
        ctx.factored.add(up, g_inner, h)
        return g_z, None, None, g_bias, g_scale, g_offset, None, None


def _segments(counts: Sequence[int]) -> list[slice]:
    """Return the rows of each matrix as slices."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]


class EditorNetwork(nn.Module):
    """g: (u, δ) ↦ (ũ, δ̃), token by token, for every edited matrix of one shape.

    The input is normalized to zero mean and unit variance per dimension, with statistics of the training set taken
    before training (the base model is frozen, so they never change). The output stays in normalized units, as in Eq. 3.

    Args:
        d_in: the dimension of u.
        d_out: the dimension of δ.
        matrices: the number of edited matrices that share the network.
        rank: the inner width; reduced to the width of z where that is smaller.
        transforms: ``both``, or which of ``u`` and ``delta`` makes up z; the other one is returned unchanged.
        normalize_inputs: whether the input is normalized. The statistics are taken either way.
        identity: whether the network starts as the identity.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        matrices: int,
        rank: int,
        transforms: str = "both",
        normalize_inputs: bool = True,
        identity: bool = True,
    ) -> None:
        super().__init__()
        self.d_in, self.d_out, self.matrices = d_in, d_out, matrices
        self.transforms, self.normalize_inputs = transforms, normalize_inputs
        self.width = {"both": d_in + d_out, "u": d_in, "delta": d_out}[transforms]
        rank = min(rank, self.width)
        self.u_statistics = RunningStatistics(matrices, d_in)
        self.delta_statistics = RunningStatistics(matrices, d_out)
        self.first = LowRankResidual(self.width, rank, matrices, bias=True, identity=identity)
        self.second = LowRankResidual(self.width, rank, matrices, bias=False, identity=identity)

    @torch.no_grad()
    def normalize(
        self, u: Sequence[Float[Tensor, "_row d_in"]], delta: Sequence[Float[Tensor, "_row d_out"]]
    ) -> Float[Tensor, "row d"]:
        """Return z = concat(norm(u), norm(δ)), one matrix after the other, each with its own statistics.

        Where the network transforms only one of u and δ, z is that one. Rows of zeros may follow
        (:func:`remend.core.cpu_matmul.padded_row_count`).
        """
        device, rows = self.first.down.device, sum(map(len, u))
        # Written in place, part by part: concatenating would copy all rows once more.
        z = torch.empty(padded_row_count(rows, device), self.width, device=device)
        z[rows:] = 0
        # Where u is read it comes first, where δ is it comes last; what is not read is left out.
        parts = ((u, self.u_statistics, z[:, : self.d_in]), (delta, self.delta_statistics, z[:, -self.d_out :]))
        for values, statistics, target in {"both": parts, "u": parts[:1], "delta": parts[1:]}[self.transforms]:
            scale = statistics.deviation().reciprocal() if self.normalize_inputs else None
            for matrix, part in enumerate(_segments(list(map(len, values)))):
                if scale is None:
                    target[part] = values[matrix]
                else:
                    torch.sub(values[matrix], statistics.mean[matrix], out=target[part]).mul_(scale[matrix])
        return z

    def denormalize_u(self, pseudo: Float[Tensor, "row d_in"], matrix: int) -> Float[Tensor, "row d_in"]:
        """Return a matrix's ũ in the units of u; unchanged if the network does not normalize u."""
        if self.transforms == "delta" or not self.normalize_inputs:
            return pseudo
        return pseudo * self.u_statistics.deviation()[matrix] + self.u_statistics.mean[matrix]

    def forward(
        self,
        u: Sequence[Float[Tensor, "_row d_in"]],
        delta: Sequence[Float[Tensor, "_row d_out"]],
        factored: FactoredGradients | None = None,
    ) -> list[tuple[Float[Tensor, "_row d_in"], Float[Tensor, "_row d_out"]]]:
        """Compute the pseudo-activations ũ and pseudo-deltas δ̃ of each matrix's tokens, of all matrices together."""
        counts = [len(part) for part in u]
        z = self.second(self.first(self.normalize(u, delta), counts, factored), counts, factored)
        parts = z[: sum(counts)].split(counts)
        if self.transforms == "both":
            return [part.split((self.d_in, self.d_out), 1) for part in parts]
        return list(zip(parts, delta, strict=True) if self.transforms == "u" else zip(u, parts, strict=True))
