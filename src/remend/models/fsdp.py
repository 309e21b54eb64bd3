"""Shard a frozen base model over several processes with torch's ``fully_shard`` (FSDP2).

The weights of a block are gathered when it runs. They are frozen, so no gradient is ever reduced or scattered.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from remend.core.layers import is_plain_float, parameter_owner
from remend.errors import ModelError
from remend.models.blocks import find_blocks
from remend.models.loading import choose_device


def fsdp_requested() -> bool:
    """Return whether the launcher asks for FSDP (``accelerate launch --use_fsdp``) in more than one process."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")


def process_device() -> torch.device:
    """Return the device that holds this process's part of a sharded model.

    Raises:
        ModelError: the device cannot be used here.
    """
    return choose_device("auto")


def is_sharded(model: nn.Module) -> bool:
    """Return whether the model is sharded: then all processes must take part in every forward pass."""
    return isinstance(model, FSDPModule)


def shard_model(model: nn.Module, device: torch.device) -> None:
    """Shard the model's weights over all processes, for good; each keeps its part on ``device``.

    Blocks are moved one after the other, so a model on the CPU may be larger than one device's memory. A model without
    a list of blocks is sharded as a whole.

    Raises:
        ModelError: it is quantized or offloaded.
    """
    for name, parameter in model.named_parameters():
        if not is_plain_float(parameter) or not parameter.is_floating_point() or parameter.is_meta:
            raise ModelError(
                f"{name} is quantised or offloaded, and such a model cannot be shared among processes: load it in "
                "bfloat16 (on the CPU, if one GPU cannot hold it), or do without --use_fsdp"
            )
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for name, block in find_blocks(model):
        if name:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def unsharded(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Gather the weights of one module of the model within the context; all processes must enter it.

    Then ``module`` can be called by itself: torch gathers weights only in the forward pass of a sharded module.
    """
    holder = parameter_owner(module)
    sharded = [part for part in model.modules() if isinstance(part, FSDPModule) and holder in part.modules()]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()
