"""Several edits as one change of each matrix, by least squares: each acts at its keys as it does alone.

Edits that are summed (paper, section 3.1) disturb each other: an edit ΔW = Σ_i v_i ũ_iᵀ moves the output at the key of
edit j by v_j, as it should, and by Σ_i v_i (ũ_i·k_j) in addition. With a hundred edits the addition is larger than v_j.
So the moves are solved for, as MALMEN does (Tan et al., arXiv 2311.04661): with keys K [row, d_in], wanted moves
V [row, d_out] and a metric M of keys (the identity in MALMEN),

    ΔW = Vᵀ (K M Kᵀ + λ I)⁻¹ K M,

which is as low-rank as the sum. For a single key it is the edit itself, except for λ.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from remend.core.low_rank import LowRank
from remend.core.response import LINEAR, Response
from remend.core.symmetric_operator import SymmetricOperator

RIDGE = 0.05
"""λ, as a share of a key's mean response to itself."""

EIGENVALUE_FLOOR = 0.05
"""The least eigenvalue of a metric, as a share of its largest.

With a negative eigenvalue, K M Kᵀ + λ I can be singular and the solution arbitrarily large.
"""


def least_squares(
    keys: Float[Tensor, "row d_in"],
    moves: Float[Tensor, "row d_out"],
    metric: SymmetricOperator | None = None,
    ridge: float = RIDGE,
    response: Response = LINEAR,
    experts: Int[Tensor, " row"] | None = None,
) -> LowRank:
    """Compute the change that moves the output by ``moves`` at ``keys``.

    Args:
        keys: the matrix's input at each place where a move is wanted.
        moves: the wanted change of its output there.
        metric: M, by which keys respond to each other; the plain product if it is None.
        ridge: λ, as a share of a key's mean response to itself.
        response: the response of the change (:class:`LowRank`).
        experts: for a matrix of several experts, the expert of each row; rows of different experts do not respond to
            each other.
    """
    u = keys if metric is None else metric(keys)
    self_responses = (u * keys).sum(1).clamp(min=1e-12)
    # Each key's answer to its own pair is then 1, as a response expects.
    u = u / self_responses[:, None]
    responses = response(keys @ u.mT)
    if experts is not None:
        responses = responses * (experts[:, None] == experts)
    # λ I with its columns divided by `self_responses`, as those of K M Kᵀ are.
    size = self_responses.mean() / self_responses
    delta = torch.linalg.solve(responses + torch.diag(ridge * size), moves) if len(keys) else moves
    return LowRank(u, delta, response, experts)


def make_definite(metric: SymmetricOperator) -> SymmetricOperator:
    """Return the nearest metric with all eigenvalues at least :data:`EIGENVALUE_FLOOR` of the largest."""
    inner = metric.inner
    if inner.dim() == 1:
        return SymmetricOperator(inner.clamp(min=EIGENVALUE_FLOOR * float(inner.max())), metric.basis)
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    floor = EIGENVALUE_FLOOR * float(values.max())
    return SymmetricOperator((vectors * values.clamp(min=floor)) @ vectors.mT, metric.basis)
