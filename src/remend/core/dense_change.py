"""A whole matrix's change as a pair of factors, one of them the identity: dense changes in the form of all others."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.low_rank import LowRank


class DenseChange:
    """Independent changes of one matrix in all of its entries, one for each episode; zero at first.

    ΔW = deltaᵀ u with the identity as the factor of the smaller side, so that nothing is stored twice and whatever
    works with low-rank changes works with these.

    Args:
        shape: (d_in, d_out) of the matrix.
        episodes: how many there are.
        device: where they are kept.
    """

    def __init__(self, shape: tuple[int, int], episodes: int, device: torch.device) -> None:
        d_in, d_out = shape
        self.narrows = d_in > d_out
        self.identity = torch.eye(min(shape), device=device)
        self.values = torch.zeros(episodes, min(shape), max(shape), device=device, requires_grad=True)

    def select(self, episodes: list[int]) -> LowRank:
        """The changes of some episodes, differentiable in :attr:`values`."""
        own: Float[Tensor, "episode small large"] = self.values[episodes]
        identity = self.identity.expand(len(episodes), -1, -1)
        return LowRank(own, identity) if self.narrows else LowRank(identity, own)

    def single_episode(self, episode: int) -> LowRank:
        """The change of one episode, by itself."""
        own = self.values.detach()[episode].clone()
        return LowRank(own, self.identity.clone()) if self.narrows else LowRank(self.identity.clone(), own)
