"""The processes of a data-parallel run: one alone, or those that ``accelerate launch`` (or torchrun) started."""

from __future__ import annotations

import os

import torch
from torch import Tensor, distributed

from remend.errors import ConfigError


class Workers:
    """Which process this is, and sums over all of them.

    Attributes:
        rank: this process's number, from 0; the first one speaks, saves and shows progress for all.
        count: how many there are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = 0
        if self.count > 1:
            try:
                from accelerate import PartialState
            except ImportError:
                raise ConfigError("training in several processes needs Accelerate: pip install 'remend[big]'") from None
            self.rank = PartialState(cpu=device.type == "cpu").process_index

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def sum(self, *tensors: Tensor) -> None:
        """Add up each tensor over all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A tensor as every process has it, in order of rank."""
        if self.count == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.count)]
        distributed.all_gather(found, tensor.contiguous())
        return found

    def agree(self, value: float | bool) -> float | bool:
        """The first process's value, for what depends on its clock."""
        if self.count == 1:
            return value
        box = torch.tensor(value, dtype=torch.float32, device=self.device)
        distributed.broadcast(box, src=0)
        return float(box)
