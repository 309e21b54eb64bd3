"""The losses of the paper's Eq. 4, one number for each row of a batch, in float32.

Vocabularies are large, so each loss makes its gradient in the forward pass, in the buffer it has at hand anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def row_mean(values: Float[Tensor, " token"], row: Int[Tensor, " token"], rows: int) -> Float[Tensor, " row"]:
    """The mean of the values that belong to each row; every row must own at least one."""
    totals = values.new_zeros(rows).index_add(0, row, values)
    return totals / torch.bincount(row, minlength=rows)


def target_loss(
    logits: Float[Tensor, "token vocabulary"], target: Int[Tensor, " token"], row: Int[Tensor, " token"], rows: int
) -> Float[Tensor, " row"]:
    """−log p(y|x) of each row, per target token (so that long targets do not outweigh short ones), in nats."""
    losses: Tensor = _TargetLoss.apply(logits, target)  # type: ignore[no-untyped-call]
    return row_mean(losses, row, rows)


def locality_loss(
    base: Float[Tensor, "token vocabulary"],
    edited: Float[Tensor, "token vocabulary"],
    row: Int[Tensor, " token"],
    rows: int,
) -> Float[Tensor, " row"]:
    """KL(p_base ‖ p_edited) of each row, averaged over its tokens, in nats; differentiable in ``edited`` alone."""
    losses: Tensor = _Divergence.apply(edited, base)  # type: ignore[no-untyped-call]
    return row_mean(losses, row, rows)


class _WithGradient(torch.autograd.Function):
    """A function of logits whose gradient was kept by its forward pass."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return kept.mul_(gradient[:, None]).to(ctx.dtype), None  # asked twice, autograd would refuse

    @staticmethod
    def keep(ctx: Any, logits: Tensor, gradient: Tensor) -> None:
        ctx.dtype = logits.dtype
        ctx.save_for_backward(gradient)


class _TargetLoss(_WithGradient):
    """−log softmax(logits)[target], with gradient softmax − onehot."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        log_p = logits.float().log_softmax(-1)
        own = target[:, None]
        loss = -log_p.gather(1, own)[:, 0]
        if ctx.needs_input_grad[0]:
            gradient = log_p.exp_()
            _WithGradient.keep(ctx, logits, gradient.scatter_add_(1, own, gradient.new_full(own.shape, -1)))
        return loss


class _Divergence(_WithGradient):
    """KL(softmax(base) ‖ softmax(edited)), with gradient softmax(edited) − softmax(base)."""

    @staticmethod
    def forward(ctx: Any, edited: Tensor, base: Tensor) -> Tensor:
        log_base, log_edited = base.float().log_softmax(-1), edited.float().log_softmax(-1)
        p_base = log_base.exp()
        loss: Tensor = torch.linalg.vecdot(p_base, log_base.sub_(log_edited))
        if ctx.needs_input_grad[0]:
            _WithGradient.keep(ctx, edited, log_edited.exp_().sub_(p_base))
        return loss
