"""Symmetric operators on a layer's inputs, dense or not; and symmetric matrices in files: one half says all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SymmetricOperator:
    """A symmetric operator on vectors of d dimensions: dense, or made of what it does in k directions and outside.

    Attributes:
        inner: without a basis, the operator's matrix [d, d]. With one, its matrix in k + 1 coordinates, or the diagonal
            of that: k of the basis, and the last for all that lies outside, which is multiplied with one number.
        basis: orthonormal directions.
    """

    inner: Float[Tensor, "n n"] | Float[Tensor, " n"]
    basis: Float[Tensor, "d k"] | None = None

    def __call__(self, x: Float[Tensor, "*row d"]) -> Float[Tensor, "*row d"]:
        """What it makes of each row; with a basis in k · d operations, and never as a d × d matrix."""
        if self.basis is None:
            return x @ self.inner
        within = x @ self.basis
        if self.inner.dim() > 1:
            turned, outside = within @ self.inner[:-1, :-1], self.inner[-1, -1]
        else:
            turned, outside = within * self.inner[:-1], self.inner[-1]
        return outside * x + (turned - outside * within) @ self.basis.T

    def to(self, device: torch.device) -> SymmetricOperator:
        """The same operator on another device."""
        return SymmetricOperator(self.inner.to(device), None if self.basis is None else self.basis.to(device))

    @property
    def matrix(self) -> Float[Tensor, "n n"]:
        """``inner`` as a matrix."""
        return self.inner if self.inner.dim() > 1 else self.inner.diag()


def pack_symmetric(symmetric: Float[Tensor, "d d"]) -> Float[Tensor, " n"]:
    """One half of a symmetric matrix, with its diagonal: all there is to keep."""
    return symmetric[torch.ones_like(symmetric, dtype=torch.bool).triu()]


def unpack_symmetric(half: Tensor) -> Float[Tensor, "d d"]:
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
