"""``LowRank``: the one form in which a change of a weight exists, from the gradient to the saved file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from remend.errors import EditError


@dataclass(frozen=True)
class LowRank:
    """A change ΔW = deltaᵀ u of a weight W [d_out, d_in], kept as its factors.

    A leading ``episode`` axis holds independent changes, one an episode, which :meth:`branch` applies to their own rows
    of a batch and never mixes. Rows of zeros add nothing, so that ragged ranks are padded with them.

    Attributes:
        u: the directions of the layer's input that the change reads, [rank, d_in] or [episode, rank, d_in].
        delta: what it writes to the layer's output for each, [rank, d_out] or [episode, rank, d_out].
        gate: if not 0, the change acts only where it is asked for: instead of ΔW x = deltaᵀ (u x) the layer's output
            gets deltaᵀ relu(u x − gate) / (1 − gate), the same where u x is 1. That is no change of a weight any more.
    """

    u: Float[Tensor, "*episode rank d_in"]
    delta: Float[Tensor, "*episode rank d_out"]
    gate: float = 0.0

    @property
    def rank(self) -> int:
        """The number of factor pairs (an upper bound of the matrix's rank)."""
        return self.u.shape[-2]

    @property
    def batched(self) -> bool:
        """Whether there is an episode axis."""
        return self.u.dim() == 3

    def dense(self) -> Float[Tensor, "*episode d_out d_in"]:
        """ΔW itself. The size of the weight: for merging and for tests.

        Raises:
            EditError: the change is gated.
        """
        self._refuse_gate("written into a weight")
        return self.delta.mT @ self.u

    def branch(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """ΔW x for every row of ``x``, as two thin products.

        With an episode axis, ``x`` must be ordered by episode, the same number of rows for each: its leading axes are
        split evenly among the episodes.
        """
        if not self.batched:
            return self._gated(x @ self.u.mT) @ self.delta
        own = x.reshape(self.u.shape[0], -1, x.shape[-1])
        answers = self._gated(torch.bmm(own, self.u.mT))
        return torch.bmm(answers, self.delta).reshape(*x.shape[:-1], self.delta.shape[-1])

    def _gated(self, answers: Float[Tensor, "*rows rank"]) -> Float[Tensor, "*rows rank"]:
        return torch.relu(answers - self.gate) / (1 - self.gate) if self.gate else answers

    def _refuse_gate(self, what: str) -> None:
        if self.gate:
            raise EditError(
                f"a gated edit (gate = {self.gate:g}) acts through a threshold and is no change of a weight: it cannot "
                f"be {what}. Apply it as a side branch, or make the edit with an editor whose gate is 0"
            )

    def select(self, episodes: Int[Tensor, " row"] | slice) -> LowRank:
        """The changes of some episodes."""
        return replace(self, u=self.u[episodes], delta=self.delta[episodes])

    def scaled(self, factor: float | Float[Tensor, "episode ranks 1"]) -> LowRank:
        """``factor`` · ΔW; with an episode axis, there may be a factor for each, or for each of its factor pairs."""
        by = factor if isinstance(factor, (int, float)) else factor.to(self.delta)
        return replace(self, delta=self.delta * by)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LowRank:
        """The same change on another device, or in another dtype."""
        return replace(self, u=self.u.to(device=device, dtype=dtype), delta=self.delta.to(device=device, dtype=dtype))

    def detach(self) -> LowRank:
        """The same change without its autograd history."""
        return replace(self, u=self.u.detach(), delta=self.delta.detach())

    def norm(self) -> Float[Tensor, "*episode"]:
        """‖ΔW‖ (Frobenius), from the factors' Gram matrices: ‖deltaᵀu‖² = Σ (u uᵀ) ∘ (delta deltaᵀ)."""
        gram = (self.u @ self.u.mT) * (self.delta @ self.delta.mT)
        return gram.sum((-2, -1)).clamp(min=0).sqrt()

    def recompress(self, rank: int) -> LowRank:
        """The nearest change of at most ``rank`` pairs (truncated singular value decomposition, without forming ΔW).

        Two QR factorisations leave a rank × rank core whose SVD is that of ΔW.

        Raises:
            EditError: the change is gated.
        """
        self._refuse_gate("compressed")
        q_u, r_u = torch.linalg.qr(self.u.mT.float())
        q_d, r_d = torch.linalg.qr(self.delta.mT.float())
        left, values, right = torch.linalg.svd(r_d @ r_u.mT, full_matrices=False)
        kept = min(rank, values.shape[-1])
        root = values[..., :kept, None].sqrt()
        u = root * (right[..., :kept, :] @ q_u.mT)
        delta = root * (left[..., :, :kept].mT @ q_d.mT)
        return LowRank(u.to(self.u.dtype), delta.to(self.delta.dtype))


def concatenate(changes: Sequence[LowRank]) -> LowRank:
    """The sum of several changes of one weight: their factor pairs, side by side."""
    return LowRank(torch.cat([c.u for c in changes], -2), torch.cat([c.delta for c in changes], -2), _gate(changes))


def stack(changes: Sequence[LowRank]) -> LowRank:
    """Several independent changes of one weight as one batched change, padded with zeros to the highest rank."""
    rank = max(change.rank for change in changes)

    def padded(factor: Tensor) -> Tensor:
        return torch.nn.functional.pad(factor, (0, 0, 0, rank - factor.shape[-2]))

    return LowRank(
        torch.stack([padded(c.u) for c in changes]), torch.stack([padded(c.delta) for c in changes]), _gate(changes)
    )


def _gate(changes: Sequence[LowRank]) -> float:
    """The gate of all these changes.

    Raises:
        EditError: they have different ones.
    """
    gates = sorted({change.gate for change in changes})
    if len(gates) > 1:
        raise EditError(
            f"changes with different gates ({', '.join(f'{gate:g}' for gate in gates)}) cannot be one: apply the edits "
            "one after the other"
        )
    return gates[0]
