"""Many edits as one: what each matrix must do at every edit's keys at once.

A sum of edits (paper, section 3.1) adds up what they do to each other: an edit ΔW = Σ_i v_i ũ_iᵀ moves the output at
the key of edit j by v_j, as it should, and by Σ_i v_i (ũ_i·k_j) besides. With a hundred edits that is more than v_j
itself. So the moves are solved for, as MALMEN does (Tan et al., arXiv 2311.04661): with keys K [row, d_in], wanted
moves V [row, d_out] and a metric M of keys (the identity in MALMEN),

    ΔW = Vᵀ (K M Kᵀ + λ I)⁻¹ K M,

which is as low-rank as the sum, and where there is only one key the edit itself, but for λ.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from remend.core.low_rank import LowRank
from remend.core.operators import SymmetricOperator

RIDGE = 0.05
"""λ, as a share of a key's mean answer to itself."""

EIGENVALUE_FLOOR = 0.05
"""The least eigenvalue of a metric, as a share of its largest: one with negative ones can be solved for anything."""


def least_squares(
    keys: Float[Tensor, "row d_in"],
    moves: Float[Tensor, "row d_out"],
    metric: SymmetricOperator | None = None,
    ridge: float = RIDGE,
    gate: float = 0.0,
    experts: Int[Tensor, " row"] | None = None,
) -> LowRank:
    """The change that moves the output at each key as wanted, in the keys' coordinates.

    Args:
        keys: what the matrix reads where each move is wanted.
        moves: by how much its output should move there.
        metric: how keys answer to each other; the plain product without it.
        ridge: λ, as a share of a key's mean answer to itself.
        gate: of the change (:class:`LowRank`).
        experts: of a matrix of several experts, whose each row is: others' do not answer to it.
    """
    u = keys if metric is None else metric(keys)
    own = (u * keys).sum(1).clamp(min=1e-12)
    u = u / own[:, None]  # each key answers to its own pair with 1, as a gate expects
    answers = keys @ u.mT
    if gate:
        answers = torch.relu(answers - gate) / (1 - gate)
    if experts is not None:
        answers = answers * (experts[:, None] == experts)
    size = own.mean() / own  # λ in units in which the system is symmetric
    delta = torch.linalg.solve(answers + torch.diag(ridge * size), moves) if len(keys) else moves
    return LowRank(u, delta, gate, experts)


def make_definite(metric: SymmetricOperator) -> SymmetricOperator:
    """The nearest metric all of whose eigenvalues are at least :data:`EIGENVALUE_FLOOR` of the largest."""
    inner = metric.inner
    if inner.dim() == 1:
        return SymmetricOperator(inner.clamp(min=EIGENVALUE_FLOOR * float(inner.max())), metric.basis)
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    floor = EIGENVALUE_FLOOR * float(values.max())
    return SymmetricOperator((vectors * values.clamp(min=floor)) @ vectors.mT, metric.basis)
