"""The tokens of a batch that carry gradient: as rows for the editor networks, and as a table of episodes for edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
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
