"""A frozen base model whose weights lie in parts with several processes, gathered block by block when they are needed.

It is torch's ``fully_shard`` (FSDP2). No gradient of a weight ever exists here, so nothing is scattered back.
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


def fsdp_requested() -> bool:
    """Whether the launcher asks for it (``accelerate launch --use_fsdp``), in more than one process."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")


def is_sharded(model: nn.Module) -> bool:
    """Whether the model was sharded: then every forward pass must be made by all processes together."""
    return isinstance(model, FSDPModule)


def shard_model(model: nn.Module, device: torch.device) -> None:
    """Share the model's weights among all processes, for good; each keeps its part on ``device``.

    Blocks go there one after the other, so a model on the CPU may be larger than one device's memory.

    Raises:
        ModelError: it is quantised or offloaded, or has no stack of blocks.
    """
    for name, parameter in model.named_parameters():
        if not is_plain_float(parameter) or not parameter.is_floating_point() or parameter.is_meta:
            raise ModelError(
                f"{name} is quantised or offloaded, and such a model cannot be shared among processes: load it in "
                "bfloat16 (on the CPU, if one GPU cannot hold it), or do without --use_fsdp"
            )
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for _, block in find_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def unsharded(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Within the block, a part of the model can be called on its own; all processes must come here."""
    holder = parameter_owner(module)
    owners = [own for own in model.modules() if isinstance(own, FSDPModule) and holder in own.modules()]
    for own in owners:
        own.unshard()
    try:
        yield
    finally:
        for own in owners:
            own.reshard()
