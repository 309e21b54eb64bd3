"""``LowRank``: the one form in which a change of a weight exists, from the gradient to the saved file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from remend.errors import EditError


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change ΔW = deltaᵀ u of a weight W [d_out, d_in], kept as its factors.

    A leading ``episode`` axis holds independent changes, one for each episode: :meth:`output_change` applies each to
    the rows of its episode only. Rows of zeros add nothing, so changes of different rank are padded with them.

    Attributes:
        u: the directions of the layer's input that the change reads, [rank, d_in] or [episode, rank, d_in].
        delta: what it writes to the layer's output for each, [rank, d_out] or [episode, rank, d_out].
        gate: if not 0, the change acts only where it is asked for: instead of ΔW x = deltaᵀ (u x) the layer's output
            gets deltaᵀ relu(u x − gate) / (1 − gate), the same where u x is 1. That is no change of a weight any more.
        experts: of a weight that holds several experts' matrices (:mod:`remend.core.moe`), whose each pair is; it
            acts on that expert's rows alone.
    """

    u: Float[Tensor, "*episode rank d_in"]
    delta: Float[Tensor, "*episode rank d_out"]
    gate: float = 0.0
    experts: Int[Tensor, "*episode rank"] | None = None

    @property
    def rank(self) -> int:
        """The number of factor pairs (an upper bound of the matrix's rank)."""
        return self.u.shape[-2]

    @property
    def batched(self) -> bool:
        """Whether there is an episode axis."""
        return self.u.dim() == 3

    def dense(self, experts: int = 0) -> Float[Tensor, "*episode_expert d_out d_in"]:
        """ΔW itself. The size of the weight: for merging and for tests.

        Args:
            experts: of how many the weight holds the matrices, if of several: they have an axis of their own before
                d_out.

        Raises:
            EditError: the change is gated.
        """
        self.raise_if_gated("written into a weight")
        if self.experts is None:
            return self.delta.mT @ self.u
        own = self.experts[..., None] == torch.arange(experts, device=self.u.device)
        return torch.einsum("...re,...ro,...ri->...eoi", own.to(self.u.dtype), self.delta, self.u)

    def output_change(
        self, x: Float[Tensor, "*rows d_in"], experts: Int[Tensor, " row"] | None = None
    ) -> Float[Tensor, "*rows d_out"]:
        """ΔW x for every row of ``x``, as two thin products.

        With an episode axis, ``x`` must be ordered by episode, the same number of rows for each: its leading axes are
        split evenly among the episodes. ``experts`` says which expert's matrix each row goes through.
        """
        if not self.batched:
            return self._gated(self._own(x @ self.u.mT, experts)) @ self.delta
        rows = x.reshape(self.u.shape[0], -1, x.shape[-1])
        answers = self._gated(self._own(torch.bmm(rows, self.u.mT), experts))
        return torch.bmm(answers, self.delta).reshape(*x.shape[:-1], self.delta.shape[-1])

    def _own(
        self, answers: Float[Tensor, "*rows rank"], experts: Int[Tensor, " row"] | None
    ) -> Float[Tensor, "*rows rank"]:
        """Answers of each row to the pairs of its own expert; the others are zero."""
        if self.experts is None or experts is None:
            return answers
        whose = experts.to(answers.device).view(answers.shape[:-1])
        return answers * (whose[..., None] == self.experts[..., None, :])

    def _gated(self, answers: Float[Tensor, "*rows rank"]) -> Float[Tensor, "*rows rank"]:
        return torch.relu(answers - self.gate) / (1 - self.gate) if self.gate else answers

    def raise_if_gated(self, what: str) -> None:
        """Raise :class:`EditError` if the change is gated, so that it cannot be ``what``."""
        if self.gate:
            raise EditError(
                f"a gated edit (gate = {self.gate:g}) acts through a threshold and is no change of a weight: it cannot "
                f"be {what}. Apply it as a side branch, or make the edit with an editor whose gate is 0"
            )

    def select(self, episodes: Int[Tensor, " row"] | slice) -> LowRank:
        """The changes of some episodes."""
        experts = None if self.experts is None else self.experts[episodes]
        return replace(self, u=self.u[episodes], delta=self.delta[episodes], experts=experts)

    def single_episode(self, episode: int, rank: int) -> LowRank:
        """The change of one episode, with its first ``rank`` factor pairs: what follows is padding."""
        own = self.select(torch.tensor([episode]))
        experts = None if own.experts is None else own.experts[0, :rank]
        return replace(own, u=own.u[0, :rank], delta=own.delta[0, :rank], experts=experts)

    def scaled(self, factor: float | Float[Tensor, "episode ranks 1"]) -> LowRank:
        """``factor`` · ΔW; with an episode axis, there may be a factor for each, or for each of its factor pairs."""
        by = factor if isinstance(factor, (int, float)) else factor.to(self.delta)
        return replace(self, delta=self.delta * by)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LowRank:
        """The same change on another device, or in another dtype."""
        u, delta = (factor.to(device=device, dtype=dtype) for factor in (self.u, self.delta))
        return replace(self, u=u, delta=delta, experts=None if self.experts is None else self.experts.to(device))

    def detach(self) -> LowRank:
        """The same change without its autograd history."""
        return replace(self, u=self.u.detach(), delta=self.delta.detach())

    def norm(self) -> Float[Tensor, "*episode"]:
        """‖ΔW‖ (Frobenius), from the factors' Gram matrices: ‖deltaᵀu‖² = Σ (u uᵀ) ∘ (delta deltaᵀ)."""
        gram = (self.u @ self.u.mT) * (self.delta @ self.delta.mT)
        if self.experts is not None:
            gram = gram * (self.experts[..., :, None] == self.experts[..., None, :])
        return gram.sum((-2, -1)).clamp(min=0).sqrt()

    def recompress(self, rank: int) -> LowRank:
        """The nearest change of at most ``rank`` pairs (truncated singular value decomposition, without forming ΔW).

        Two QR factorisations leave a rank × rank core whose SVD is that of ΔW. Of experts, each one's change is
        compressed on its own.

        Raises:
            EditError: the change is gated.
        """
        self.raise_if_gated("compressed")
        if self.experts is not None:
            own = [(expert, self.experts == expert) for expert in self.experts.unique().tolist()]
            parts = [LowRank(self.u[rows], self.delta[rows]).recompress(rank) for _, rows in own]
            whose = [self.experts.new_full((part.rank,), e) for part, (e, _) in zip(parts, own, strict=True)]
            return replace(concatenate(parts), experts=torch.cat(whose)) if parts else self
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
    whose = [change.experts for change in changes if change.experts is not None]
    experts = torch.cat(whose, -1) if whose else None
    u, delta = torch.cat([c.u for c in changes], -2), torch.cat([c.delta for c in changes], -2)
    return LowRank(u, delta, _gate(changes), experts)


def stack(changes: Sequence[LowRank]) -> LowRank:
    """Several independent changes of one weight as one batched change, padded with zeros to the highest rank."""
    rank = max(change.rank for change in changes)

    def padded(factor: Tensor) -> Tensor:
        return torch.nn.functional.pad(factor, (0, 0, 0, rank - factor.shape[-2]))

    whose = [torch.nn.functional.pad(c.experts, (0, rank - c.rank)) for c in changes if c.experts is not None]
    experts = torch.stack(whose) if whose else None
    u, delta = torch.stack([padded(c.u) for c in changes]), torch.stack([padded(c.delta) for c in changes])
    return LowRank(u, delta, _gate(changes), experts)


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
