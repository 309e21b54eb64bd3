"""The leading directions of a wide layer's inputs, from one pass over them and without a d × d matrix.

The second moment C = E[u uᵀ] of a layer with d inputs has d² entries, and its decomposition takes d³ operations: for
T5-11B, whose d is 65,536, 17 GB a matrix, and days. Its product C Ω with a few random vectors is a sum over inputs as C
is, and holds its leading eigenvectors: the Nyström approximation of Tropp, Yurtsever, Udell and Cevher ("Fixed-rank
approximation of a positive-semidefinite matrix from streaming data", 2017). What lies outside of them is taken to be
alike in all directions, with what the trace leaves for it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.operators import SymmetricOperator
from remend.core.whitening import SecondMoment

MAX_DENSE_DIMENSIONS = 8_192
"""Up to this many inputs operators are dense: 268 MB each, and a decomposition takes minutes on a CPU."""

MAX_DIRECTIONS = 4_096
"""Directions in which wider inputs are told apart: many, since few cost locality (line ``wide`` of the frontier)."""

OVERSAMPLING = 128
"""Random vectors beyond the directions that are wanted: the last of those would be found badly without."""

TEST_MATRIX_SEED = 0
"""Of the random vectors: each process of a run makes the same."""


def sketch_directions(d: int) -> int | None:
    """In how many directions inputs of ``d`` dimensions are told apart; None for all, with dense operators."""
    return min(MAX_DIRECTIONS, d - 1) if d > MAX_DENSE_DIMENSIONS else None


def sketch_width(d: int, directions: int) -> int:
    """How many random vectors find so many directions."""
    return min(d, directions + OVERSAMPLING)


def random_test_matrix(d: int, directions: int, device: torch.device) -> Float[Tensor, "d sketch"]:
    """Ω: random vectors, orthonormal, which keeps the decomposition well-conditioned. Matrices may share them."""
    generator = torch.Generator().manual_seed(TEST_MATRIX_SEED)
    found: Tensor = torch.linalg.qr(torch.randn(d, sketch_width(d, directions), generator=generator)).Q
    return found.to(device)


def nystrom(
    sketch: Float[Tensor, "d sketch"], test: Float[Tensor, "d sketch"], directions: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "d k"]]:
    """The largest eigenvalues of C ≥ 0, in descending order, and their eigenvectors, from C Ω and Ω (in float64).

    Algorithm 3 of Tropp et al., which shifts C by a little, so that what rounding left of its smallest eigenvalues is
    not divided by. Here by the rounding that can be seen: Ωᵀ C Ω would be symmetric without. Its inverse root is taken
    by an eigendecomposition, which cannot fail as Cholesky's can.
    """
    inner = test.mT @ sketch
    rounding = float(torch.linalg.norm(inner - inner.mT)) / 2  # in tf32 more than in float32
    shift = max(rounding, torch.finfo(torch.float32).eps * float(torch.linalg.norm(sketch)), 1e-30)
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    roots = vectors * (values + shift).clamp(min=shift).rsqrt()
    basis, small = torch.linalg.qr((sketch + shift * test) @ roots)
    turned, singular, _ = torch.linalg.svd(small)
    return (singular[:directions].square() - shift).clamp(min=0), basis @ turned[:, :directions]


class SketchedMoment(SecondMoment):
    """C = E[u uᵀ] of one wide layer's input, as far as its leading directions and its trace tell.

    Args:
        test: of :func:`random_test_matrix`.
        directions: how many are wanted, fewer than there are inputs.
    """

    def __init__(self, test: Float[Tensor, "d sketch"], directions: int) -> None:
        super().__init__(test.shape[0], test.device, test.shape[1])
        self.test = test
        self.directions = directions
        self.trace = torch.zeros((), device=test.device)

    @property
    def totals(self) -> tuple[Tensor, ...]:
        """All state, as sums."""
        return *super().totals, self.trace

    def _add(self, rows: Float[Tensor, "row d"]) -> None:
        self.total += rows.T @ (rows @ self.test)
        self.trace += rows.square().sum()

    def _spectrum(self) -> tuple[Float[Tensor, " d"], Float[Tensor, "d k"]]:
        sketch = self._mean()
        values, vectors = nystrom(sketch, self.test.to(sketch), self.directions)
        d = len(vectors)
        left = float(self.trace) / max(self.tokens, 1) - float(values.sum())
        outside = values.new_full((d - self.directions,), max(left, 0.0) / (d - self.directions))
        return torch.cat([values, outside]), vectors

    def _operator(self, roots: Float[Tensor, " d"], vectors: Float[Tensor, "d k"], scale: Tensor) -> SymmetricOperator:
        eigenvalues = scale * roots[: self.directions + 1]  # all further ones are equal
        return SymmetricOperator(*(part.float().to(self.total.device) for part in (eigenvalues, vectors)))
