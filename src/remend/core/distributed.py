"""``ProcessGroup``: the processes of a data-parallel run, and the sums and decisions that they share."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from remend.errors import ConfigError


class ProcessGroup:
    """This process alone, or the processes that ``accelerate launch`` or ``torchrun`` started.

    A number that decides how a run continues must be the same in every process: a sum or a maximum over all of them, or
    the number of the first one. An error in one process ends that process, and the launcher then ends the others.

    Attributes:
        device: the device of the tensors that are summed.
        rank: the number of this process, from 0. The first one prints, saves and shows progress for all.
        count: the number of processes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if not distributed.is_available():
            self.rank, self.count = 0, 1
            return
        if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._initialize()
        initialized = distributed.is_initialized()
        self.rank = distributed.get_rank() if initialized else 0
        self.count = distributed.get_world_size() if initialized else 1

    def _initialize(self) -> None:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set: start several processes "
                "with accelerate launch or torchrun, or unset WORLD_SIZE for one"
            )
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # The group is never destroyed: to initialize it again, the processes would need a new address to meet at.
        distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and saves."""
        return self.rank == 0

    def alone(self) -> ProcessGroup:
        """Return a group of this process only, for work that every process does in full."""
        group = copy.copy(self)
        group.rank, group.count = 0, 1
        return group

    def sum(self, *tensors: Tensor) -> None:
        """Sum each tensor over all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensor of every process, in order of rank."""
        if self.count == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.count)]
        distributed.all_gather(gathered, tensor.contiguous())
        return gathered

    def largest(self, value: float | bool) -> float | bool:
        """Return the largest of all processes' values, such as their clocks, or whether anything happened in any.

        It is also a barrier: no process continues before all have called it.
        """
        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return float(tensor)

    def wait(self) -> None:
        """Wait until every process has called this."""
        self.largest(0.0)

    @contextmanager
    def warn_once(self) -> Iterator[None]:
        """Silence the warnings of all processes but the first, since all would give the same ones."""
        if self.first:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
