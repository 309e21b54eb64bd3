"""Pack gradient factors: only the tokens at which the gradient is not zero, one episode's rows after the other's.

The editor networks read them so. For the edit of each episode they are padded with zeros to one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from remend.core.capture import GradientFactors


@dataclass(frozen=True, eq=False)
class PackedFactors:
    """The gradient factors of one matrix at the tokens that carry gradient, of one episode after the other.

    Attributes:
        u: the matrix's inputs, whitened if the editor whitens.
        delta: the loss's gradients with respect to its outputs.
        counts: the number of rows of each episode.
        experts: for a matrix of several experts, the expert of each row.
    """

    u: Float[Tensor, "row d_in"]
    delta: Float[Tensor, "row d_out"]
    counts: tuple[int, ...]
    experts: Int[Tensor, " row"] | None = None

    def delta_norms(self) -> Float[Tensor, " episode"]:
        """Compute the norm of all deltas of each episode: the size of its gradient here."""
        squares = self.delta.square().sum(1)
        return self.delta.new_zeros(len(self.counts)).index_add_(0, self._episode_of_row(), squares).sqrt()

    def clipped(self, largest: Float[Tensor, ""]) -> PackedFactors:
        """Return the factors with the deltas of each episode scaled down to the norm ``largest`` where it is larger."""
        factor = (largest / self.delta_norms()).clamp(max=1)
        return replace(self, delta=self.delta * factor[self._episode_of_row(), None])

    def _episode_of_row(self) -> Int[Tensor, " row"]:
        counts = torch.tensor(self.counts, device=self.delta.device)
        return torch.arange(len(counts), device=self.delta.device).repeat_interleave(counts)


def pack_active(factors: Mapping[str, GradientFactors], device: torch.device) -> dict[str, PackedFactors]:
    """Return the factors of each matrix at the tokens that carry gradient, moved to ``device``."""
    packed = {}
    for name, factor in factors.items():
        u, delta = factor.u[factor.active].to(device), factor.delta[factor.active].to(device)
        experts = None if factor.experts is None else factor.experts[factor.active].to(device)
        packed[name] = PackedFactors(u, delta, tuple(factor.active.sum(1).tolist()), experts)
    return packed


class EpisodePadding:
    """Pads packed rows with zeros into [episode, rank, d], where the rank is that of the largest episode.

    Args:
        counts: the number of rows of each episode.
        device: the device of the rows.
    """

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.episodes = len(counts)
        self.rank = max(*counts, 1)
        slots = [episode * self.rank + index for episode, count in enumerate(counts) for index in range(count)]
        self.slots = torch.tensor(slots, dtype=torch.long, device=device)

    def __call__(self, rows: Shaped[Tensor, "row d"]) -> Shaped[Tensor, "episode rank d"]:
        """Return the rows of each episode, followed by zeros; differentiable."""
        padded = rows.new_zeros(self.episodes * self.rank, rows.shape[-1])
        return padded.index_copy(0, self.slots, rows).view(self.episodes, self.rank, -1)
