"""The leading directions of a wide layer's inputs, from one pass over them and without a d × d matrix.

The second moment C = E[u uᵀ] of a layer with d inputs has d² entries, and its decomposition takes d³ operations: for
T5-11B, whose d is 65,536, 17 GB for each matrix, and days. The product C Ω with a few random vectors Ω is a sum over
inputs as C is, and determines the leading eigenvectors of C: this is the Nyström approximation of Tropp, Yurtsever,
Udell and Cevher ("Fixed-rank approximation of a positive-semidefinite matrix from streaming data", 2017). Outside of
those, C is assumed to be a multiple of the identity, with what remains of the trace.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.symmetric_operator import SymmetricOperator
from remend.core.whitening import SecondMoment

MAX_DENSE_DIMENSIONS = 8_192
"""Up to this many inputs operators are dense: 268 MB each, and a decomposition takes minutes on a CPU."""

MAX_DIRECTIONS = 4_096
"""The number of directions for wider inputs. Fewer cost locality (``benchmarks/results/frontier.json``)."""

OVERSAMPLING = 128
"""Random vectors beyond the number of directions; without them the last directions would be inaccurate."""

TEST_MATRIX_SEED = 0
"""The seed of the random vectors: all processes of a run must use the same vectors."""


def sketch_directions(d: int) -> int | None:
    """Return the number of directions that inputs of ``d`` dimensions are sketched in; None for dense operators."""
    return min(MAX_DIRECTIONS, d - 1) if d > MAX_DENSE_DIMENSIONS else None


def sketch_width(d: int, directions: int) -> int:
    """Return the number of random vectors that so many directions need."""
    return min(d, directions + OVERSAMPLING)


def random_test_matrix(d: int, directions: int, device: torch.device) -> Float[Tensor, "d sketch"]:
    """Return Ω: random orthonormal vectors. Matrices of the same width can share them."""
    generator = torch.Generator().manual_seed(TEST_MATRIX_SEED)
    # Orthonormal, which keeps the decomposition well-conditioned.
    vectors: Tensor = torch.linalg.qr(torch.randn(d, sketch_width(d, directions), generator=generator)).Q
    return vectors.to(device)


def nystrom(
    sketch: Float[Tensor, "d sketch"], test: Float[Tensor, "d sketch"], directions: int
) -> tuple[Float[Tensor, " k"], Float[Tensor, "d k"]]:
    """Compute the largest eigenvalues of C ≥ 0, in descending order, and their eigenvectors.

    This is algorithm 3 of Tropp et al.

    Args:
        sketch: C Ω, in float64.
        test: Ω, in float64.
        directions: the number k of eigenvalues.
    """
    inner = test.mT @ sketch
    # C is shifted by a little, so that nothing is divided by what rounding left of its smallest eigenvalues. The shift
    # is the rounding that can be seen: exactly, Ωᵀ C Ω is symmetric. In tf32 that is more than in float32.
    rounding = float(torch.linalg.norm(inner - inner.mT)) / 2
    shift = max(rounding, torch.finfo(torch.float32).eps * float(torch.linalg.norm(sketch)), 1e-30)
    # The inverse root by an eigendecomposition, which cannot fail as Cholesky's can.
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    roots = vectors * (values + shift).clamp(min=shift).rsqrt()
    basis, small = torch.linalg.qr((sketch + shift * test) @ roots)
    rotation, singular, _ = torch.linalg.svd(small)
    return (singular[:directions].square() - shift).clamp(min=0), basis @ rotation[:, :directions]


class SketchedMoment(SecondMoment):
    """C = E[u uᵀ] of one wide layer's input, represented by its leading directions and its trace.

    Args:
        test: from :func:`random_test_matrix`.
        directions: the number of directions, fewer than there are inputs.
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
        remaining = float(self.trace) / max(self.tokens, 1) - float(values.sum())
        outside = values.new_full((d - self.directions,), max(remaining, 0.0) / (d - self.directions))
        return torch.cat([values, outside]), vectors

    def _operator(self, roots: Float[Tensor, " d"], vectors: Float[Tensor, "d k"], scale: Tensor) -> SymmetricOperator:
        eigenvalues = scale * roots[: self.directions + 1]  # all further ones are equal to the last
        return SymmetricOperator(*(part.float().to(self.total.device) for part in (eigenvalues, vectors)))
