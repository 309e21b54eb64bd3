"""The processes of a data-parallel run: one alone, or those that ``accelerate launch`` or ``torchrun`` started."""

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
    """Which process this is, and what all of them find together.

    Whatever a run decides by must be the same number in every process: a sum or the largest of all processes' numbers,
    or what the first one says. An error in one process ends that process, and the launcher then ends the others.

    Attributes:
        device: where tensors are that are summed.
        rank: this process's number, from 0; the first one speaks, saves and shows progress for all.
        count: how many there are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if not distributed.is_available():
            self.rank, self.count = 0, 1
            return
        if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._join()
        joined = distributed.is_initialized()
        self.rank = distributed.get_rank() if joined else 0
        self.count = distributed.get_world_size() if joined else 1

    def _join(self) -> None:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set: start several processes "
                "with accelerate launch or torchrun, or unset WORLD_SIZE for one"
            )
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # It is never left: to join anew, the processes would meet at addresses that are stale.
        distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def alone(self) -> ProcessGroup:
        """This process as if it were the only one: for what each does in whole."""
        one = copy.copy(self)
        one.rank, one.count = 0, 1
        return one

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

    def largest(self, value: float | bool) -> float | bool:
        """The largest of all processes' values: of their clocks, or of whether something happened to any of them.

        Nobody goes on before everybody has come here.
        """
        if self.count == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(box, distributed.ReduceOp.MAX)
        return float(box)

    def wait(self) -> None:
        """Go on when every process has come here."""
        self.largest(0.0)

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Within the block, only the first process warns: the others have the same to say."""
        if self.first:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
