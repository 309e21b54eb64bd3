"""The editor network g of MEND (paper, section 3.2, Eq. 3 and appendix A): one for all matrices of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from remend.core.factored_gradients import FactoredGradients
from remend.core.matmul import matmul, padded_row_count
from remend.core.running_statistics import RunningStatistics


class LowRankResidual(nn.Module):
    """One layer of Eq. 3: z ↦ z + σ(s_ℓ ⊙ (U V z + b) + o_ℓ), with scale s_ℓ and offset o_ℓ for each edited matrix ℓ.

    U starts at zero, so the layer starts as the identity, and V Xavier-uniform (appendix A); without ``identity`` U
    does too (section 5.4). σ is a ReLU whose derivative at 0 is 1: with U = 0 every pre-activation *is* 0, and with the
    usual derivative nothing would learn.
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
        self, z: Float[Tensor, "row d"], counts: Sequence[int], ledger: FactoredGradients | None = None
    ) -> Float[Tensor, "row d"]:
        """``z`` plus its learned correction; the rows are ordered by matrix, ``counts[ℓ]`` of them for matrix ℓ.

        Rows that follow are zero, and stay so.

        With a ``ledger``, the backward pass writes the factors of U's and V's gradients there and makes no dense ones.
        """
        found: Tensor = _Residual.apply(  # type: ignore[no-untyped-call]
            z, self.down, self.up, self.bias, self.scale, self.offset, counts, ledger
        )
        return found


class _Residual(torch.autograd.Function):
    """:class:`LowRankResidual`, with the fewest passes over memory: per row its two products cost little more."""

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
        ledger: FactoredGradients | None,
    ) -> Tensor:
        dtype = torch.float32 if ledger is None else ledger.dtype
        h = matmul(z, down.mT, dtype)
        inner = matmul(h, up.mT, dtype)
        if bias is not None:
            inner += bias
        out = torch.empty_like(z)
        for matrix, rows in enumerate(_segments(counts)):
            torch.addcmul(offset[matrix], inner[rows], scale[matrix], out=out[rows])
        out[sum(counts) :] = 0
        active = out >= 0
        out.clamp_(min=0).add_(z)
        ctx.save_for_backward(z, down, up, h, inner, active, scale)
        ctx.counts, ctx.ledger, ctx.bias, ctx.dtype = counts, ledger, bias is not None, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        z, down, up, h, inner, active, scale = ctx.saved_tensors
        g_inner = gradient * active
        g_scale, g_offset = torch.zeros_like(scale), torch.zeros_like(scale)
        for matrix, rows in enumerate(_segments(ctx.counts)):
            own = g_inner[rows]
            g_offset[matrix] = own.sum(0)
            g_scale[matrix] = torch.linalg.vecdot(own, inner[rows], dim=0)
            own *= scale[matrix]
        g_bias = (g_offset * scale).sum(0) if ctx.bias else None
        g_h = matmul(g_inner, up, ctx.dtype)
        g_z = None
        if ctx.needs_input_grad[0]:
            g_z = matmul(g_h, down, ctx.dtype).add_(gradient)
        if ctx.ledger is None:
            return g_z, matmul(g_h.mT, z), matmul(g_inner.mT, h), g_bias, g_scale, g_offset, None, None
        ctx.ledger.add(down, g_h, z)
        ctx.ledger.add(up, g_inner, h)
        return g_z, None, None, g_bias, g_scale, g_offset, None, None


def _segments(counts: Sequence[int]) -> list[slice]:
    """The rows of each matrix."""
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]


class EditorNetwork(nn.Module):
    """g: (u, δ) ↦ (ũ, δ̃), token by token, for every edited matrix of one shape.

    The input is normalised to zero mean and unit variance per dimension, with statistics of the training set taken
    before training (the base model is frozen, so they never change); the output stays in normalised units, as in Eq. 3.

    Args:
        d_in: of u.
        d_out: of δ.
        matrices: how many edited matrices share the network.
        rank: the inner width; that of z where it is smaller.
        transforms: ``both``, or which of ``u`` and ``delta`` makes up z; the other one is given back as it came.
        normalize_inputs: whether the input is normalised. The statistics are taken either way.
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
        """Z = concat(norm(u), norm(δ)) of each matrix's rows, with its own statistics, one matrix after the other.

        Only one of the two where the network reads only one. Rows of zeros may follow
        (:func:`remend.core.matmul.padded_row_count`).
        """
        device, rows = self.first.down.device, sum(map(len, u))
        z = torch.empty(padded_row_count(rows, device), self.width, device=device)
        z[rows:] = 0
        # Where u is read it comes first, where δ is it comes last; what is not read is left out.
        parts = ((u, self.u_statistics, z[:, : self.d_in]), (delta, self.delta_statistics, z[:, -self.d_out :]))
        for values, statistics, room in {"both": parts, "u": parts[:1], "delta": parts[1:]}[self.transforms]:
            scale = statistics.deviation().reciprocal() if self.normalize_inputs else None
            for matrix, part in enumerate(_segments([len(own) for own in values])):
                if scale is None:
                    room[part] = values[matrix]
                else:
                    torch.sub(values[matrix], statistics.mean[matrix], out=room[part]).mul_(scale[matrix])
        return z

    def denormalize_u(self, pseudo: Float[Tensor, "row d_in"], matrix: int) -> Float[Tensor, "row d_in"]:
        """A matrix's ũ in the units of u: out of the normalised ones, if it is in them."""
        if self.transforms == "delta" or not self.normalize_inputs:
            return pseudo
        return pseudo * self.u_statistics.deviation()[matrix] + self.u_statistics.mean[matrix]

    def forward(
        self,
        u: Sequence[Float[Tensor, "_row d_in"]],
        delta: Sequence[Float[Tensor, "_row d_out"]],
        ledger: FactoredGradients | None = None,
    ) -> list[tuple[Float[Tensor, "_row d_in"], Float[Tensor, "_row d_out"]]]:
        """The pseudo-activations ũ and pseudo-deltas δ̃ of each matrix's tokens; all go through together."""
        counts = [len(own) for own in u]
        z = self.second(self.first(self.normalize(u, delta), counts, ledger), counts, ledger)
        found = z[: sum(counts)].split(counts)
        if self.transforms == "both":
            return [own.split((self.d_in, self.d_out), 1) for own in found]
        return list(zip(found, delta, strict=True) if self.transforms == "u" else zip(u, found, strict=True))
