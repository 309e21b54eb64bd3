"""Symmetric matrices in files: one half says everything."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def packed(symmetric: Float[Tensor, "d d"]) -> Float[Tensor, " n"]:
    """One half of a symmetric matrix, with its diagonal: all there is to keep."""
    return symmetric[torch.ones_like(symmetric, dtype=torch.bool).triu()]


def unpacked(half: Tensor) -> Float[Tensor, "d d"]:
    """The matrix again (one that was stored whole stays as it is)."""
    if half.dim() != 1:
        return half
    d = math.isqrt(2 * len(half))
    whole = half.new_zeros(d, d)
    try:
        whole[torch.ones(d, d, dtype=torch.bool).triu()] = half
    except RuntimeError:  # no matrix has so many
        return half
    return whole + whole.triu(1).T
