"""The losses of the paper's Eq. 4, one number for each row of a batch, in float32.

A batch's logits are large (tokens × vocabulary), so each loss computes its gradient in the forward pass, in a buffer
that it needs there anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


def row_mean(values: Float[Tensor, " token"], row: Int[Tensor, " token"], rows: int) -> Float[Tensor, " row"]:
    """Compute the mean of the values of each row; every row must have at least one."""
    totals = values.new_zeros(rows).index_add(0, row, values)
    return totals / torch.bincount(row, minlength=rows)


def target_loss(
    logits: Float[Tensor, "token vocabulary"], target: Int[Tensor, " token"], row: Int[Tensor, " token"], rows: int
) -> Float[Tensor, " row"]:
    """Compute −log p(y|x) of each row in nats, averaged over its tokens so that long targets do not weigh more."""
    losses: Tensor = _TargetLoss.apply(logits, target)  # type: ignore[no-untyped-call]
    return row_mean(losses, row, rows)


def locality_loss(
    base: Float[Tensor, "token vocabulary"],
    edited: Float[Tensor, "token vocabulary"],
    row: Int[Tensor, " token"],
    rows: int,
) -> Float[Tensor, " row"]:
    """Compute KL(p_base ‖ p_edited) of each row in nats, averaged over its tokens; differentiable in ``edited``."""
    losses: Tensor = _Divergence.apply(edited, base)  # type: ignore[no-untyped-call]
    return row_mean(losses, row, rows)


class _WithGradient(torch.autograd.Function):
    """A function of logits whose forward pass saves its gradient."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        # In place, since the buffer is large. A second backward pass cannot use it: autograd sees that it was modified
        # and raises.
        return saved.mul_(gradient[:, None]).to(ctx.dtype), None

    @staticmethod
    def save(ctx: Any, logits: Tensor, gradient: Tensor) -> None:
        ctx.dtype = logits.dtype
        ctx.save_for_backward(gradient)


class _TargetLoss(_WithGradient):
    """−log softmax(logits)[target], with gradient softmax − onehot."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        log_p = logits.float().log_softmax(-1)
        index = target[:, None]
        loss = -log_p.gather(1, index)[:, 0]
        if ctx.needs_input_grad[0]:
            gradient = log_p.exp_()
            _WithGradient.save(ctx, logits, gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1)))
        return loss


class _Divergence(_WithGradient):
    """KL(softmax(base) ‖ softmax(edited)), with gradient softmax(edited) − softmax(base)."""

    @staticmethod
    def forward(ctx: Any, edited: Tensor, base: Tensor) -> Tensor:
        log_base, log_edited = base.float().log_softmax(-1), edited.float().log_softmax(-1)
        p_base = log_base.exp()
        loss: Tensor = torch.linalg.vecdot(p_base, log_base.sub_(log_edited))
        if ctx.needs_input_grad[0]:
            _WithGradient.save(ctx, edited, log_edited.exp_().sub_(p_base))
        return loss
