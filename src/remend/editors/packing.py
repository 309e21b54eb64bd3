"""The tokens of a batch that carry gradient: as rows for the editor networks, and as a table of episodes for edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from remend.core.capture import GradientFactors


@dataclass(frozen=True, eq=False)
class PackedFactors:
    """One matrix's tokens that carry gradient, of all episodes of a batch, one episode after the other.

    Attributes:
        u: the matrix's inputs there, whitened if the editor whitens.
        delta: the loss's gradient with respect to its outputs.
        counts: how many of the rows belong to each episode.
        experts: of a matrix of several experts, whose each row is.
    """

    u: Float[Tensor, "row d_in"]
    delta: Float[Tensor, "row d_out"]
    counts: tuple[int, ...]
    experts: Int[Tensor, " row"] | None = None

    def sizes(self) -> Float[Tensor, " episode"]:
        """How large each episode's gradient is here: the norm of all its deltas."""
        found = self.delta.new_zeros(len(self.counts)).index_add_(0, self._owners(), self.delta.square().sum(1))
        return found.sqrt()

    def limited(self, largest: Float[Tensor, ""]) -> PackedFactors:
        """The same with the deltas of episodes that are larger than ``largest`` scaled down to it."""
        factor = (largest / self.sizes()).clamp(max=1)
        return replace(self, delta=self.delta * factor[self._owners(), None])

    def _owners(self) -> Int[Tensor, " row"]:
        counts = torch.tensor(self.counts, device=self.delta.device)
        return torch.arange(len(counts), device=self.delta.device).repeat_interleave(counts)


def active_rows(factors: Mapping[str, GradientFactors], device: torch.device) -> dict[str, PackedFactors]:
    """The tokens of each matrix that carry gradient, moved to ``device``; otherwise as they were captured."""
    found = {}
    for name, factor in factors.items():
        u, delta = factor.u[factor.active].to(device), factor.delta[factor.active].to(device)
        experts = None if factor.experts is None else factor.experts[factor.active].to(device)
        found[name] = PackedFactors(u, delta, tuple(factor.active.sum(1).tolist()), experts)
    return found


class Table:
    """Puts the vectors of a batch's tokens into one zero-filled [episode, rank, d] table, packed to the front."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.episodes = len(counts)
        self.rank = max(*counts, 1)
        slots = [episode * self.rank + place for episode, count in enumerate(counts) for place in range(count)]
        self.slot = torch.tensor(slots, dtype=torch.long, device=device)

    def __call__(self, rows: Shaped[Tensor, "row d"]) -> Shaped[Tensor, "episode rank d"]:
        """The table of one vector for each token."""
        table = rows.new_zeros(self.episodes * self.rank, rows.shape[-1])
        return table.index_copy(0, self.slot, rows).view(self.episodes, self.rank, -1)
