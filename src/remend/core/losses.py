"""The losses of the paper's Eq. 4, one number for each row of a batch, in float32."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def row_mean(values: Float[Tensor, " token"], row: Int[Tensor, " token"], rows: int) -> Float[Tensor, " row"]:
    """The mean of the values that belong to each row; every row must own at least one."""
    totals = values.new_zeros(rows).index_add(0, row, values)
    return totals / torch.bincount(row, minlength=rows)


def target_loss(
    logits: Float[Tensor, "token vocabulary"], target: Int[Tensor, " token"], row: Int[Tensor, " token"], rows: int
) -> Float[Tensor, " row"]:
    """−log p(y|x) of each row, per target token (so that long targets do not outweigh short ones), in nats."""
    return row_mean(functional.cross_entropy(logits.float(), target, reduction="none"), row, rows)


def locality_loss(
    base: Float[Tensor, "token vocabulary"],
    edited: Float[Tensor, "token vocabulary"],
    row: Int[Tensor, " token"],
    rows: int,
) -> Float[Tensor, " row"]:
    """KL(p_base ‖ p_edited) of each row, averaged over its tokens, in nats."""
    log_base, log_edited = base.float().log_softmax(-1), edited.float().log_softmax(-1)
    divergence = (log_base.exp() * (log_base - log_edited)).sum(-1)
    return row_mean(divergence, row, rows)
