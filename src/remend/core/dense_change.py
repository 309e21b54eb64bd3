"""Dense changes of a matrix, trainable entry by entry, in the form of :class:`~remend.core.low_rank.LowRank`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.low_rank import LowRank


class DenseChange:
    """Independent changes of all entries of one matrix, one for each episode; zero at first.

    ΔW = deltaᵀ u with the identity as the factor of the smaller side, so that every function of low-rank changes works
    for these too and no entry is stored twice.

    Args:
        shape: (d_in, d_out) of the matrix.
        episodes: the number of changes.
        device: the device of the entries.
    """

    def __init__(self, shape: tuple[int, int], episodes: int, device: torch.device) -> None:
        d_in, d_out = shape
        self.narrows = d_in > d_out
        self.identity = torch.eye(min(shape), device=device)
        self.values = torch.zeros(episodes, min(shape), max(shape), device=device, requires_grad=True)

    def select(self, episodes: list[int]) -> LowRank:
        """Return the changes of some episodes, differentiable in :attr:`values`."""
        values: Float[Tensor, "episode small large"] = self.values[episodes]
        identity = self.identity.expand(len(episodes), -1, -1)
        return LowRank(values, identity) if self.narrows else LowRank(identity, values)

    def single_episode(self, episode: int) -> LowRank:
        """Return a copy of one episode's change, without the episode axis."""
        values = self.values.detach()[episode].clone()
        return LowRank(values, self.identity.clone()) if self.narrows else LowRank(self.identity.clone(), values)
