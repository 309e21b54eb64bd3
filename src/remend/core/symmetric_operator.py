"""Symmetric operators that whiten a layer's inputs or find a key's discriminant, and the half of them that is stored.

An operator is a dense matrix or, for wide layers, a small matrix in some directions and one number for all others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SymmetricOperator:
    """A symmetric operator on vectors of d dimensions.

    It is either dense, or a symmetric matrix in k directions and a multiple of the identity in all others.

    Attributes:
        inner: without a basis, the operator's matrix [d, d]. With one, its matrix in k + 1 coordinates, or the diagonal
            of that: k for the basis, and the last for everything outside of it, which is multiplied by one number.
        basis: k orthonormal directions.
    """

    inner: Float[Tensor, "n n"] | Float[Tensor, " n"]
    basis: Float[Tensor, "d k"] | None = None

    def __call__(self, x: Float[Tensor, "*row d"]) -> Float[Tensor, "*row d"]:
        """Apply the operator to each row; with a basis this takes k · d operations and forms no d × d matrix."""
        if self.basis is None:
            return x @ self.inner
        coordinates = x @ self.basis
        if self.inner.dim() > 1:
            transformed, outside = coordinates @ self.inner[:-1, :-1], self.inner[-1, -1]
        else:
            transformed, outside = coordinates * self.inner[:-1], self.inner[-1]
        # The part outside of the basis is x − basis · coordinates; it is never formed.
        return outside * x + (transformed - outside * coordinates) @ self.basis.T

    def to(self, device: torch.device) -> SymmetricOperator:
        """Return the same operator on another device."""
        return SymmetricOperator(self.inner.to(device), None if self.basis is None else self.basis.to(device))

    @property
    def matrix(self) -> Float[Tensor, "n n"]:
        """``inner`` as a matrix."""
        return self.inner if self.inner.dim() > 1 else self.inner.diag()


def pack_symmetric(symmetric: Float[Tensor, "d d"]) -> Float[Tensor, " n"]:
    """Return the upper triangle of a symmetric matrix, its diagonal included, as a vector. This halves a file."""
    return symmetric[torch.ones_like(symmetric, dtype=torch.bool).triu()]


def unpack_symmetric(half: Tensor) -> Float[Tensor, "d d"]:
    """Return the matrix that :func:`pack_symmetric` packed; any other tensor is returned unchanged."""
    if half.dim() != 1:  # older files hold the whole matrix
        return half
    d = math.isqrt(2 * len(half))
    if d * (d + 1) // 2 != len(half):  # not the length of a triangle; load_state_dict reports the mismatch
        return half
    whole = half.new_zeros(d, d)
    whole[torch.ones(d, d, dtype=torch.bool).triu()] = half
    return whole + whole.triu(1).T
