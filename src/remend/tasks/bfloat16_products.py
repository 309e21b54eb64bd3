"""Multiply in bfloat16 for a while, where that is faster: for an optimization, whose result is checked afterwards.

Autocast alone narrows a frozen weight anew in each pass, which for short texts takes as long as the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from remend.core.layers import is_conv1d
from remend.tasks.base import Task

LEAST_WEIGHTS = 10_000_000
"""Weights of a model from which such products are worth it; a pass of a smaller one takes milliseconds."""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for products in bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@contextmanager
def bfloat16_products(task: Task, least: int = LEAST_WEIGHTS) -> Iterator[Task]:
    """Within the block, let a float32 model's linear layers hold bfloat16 copies of their weights; yield its task.

    All else of the model stays float32, as do sums of hidden states. Where the device has no such instructions, the
    model is small, of another dtype or already narrowed by autocast, nothing changes and the same task is yielded.
    """
    layers = _linear_layers(task.model)
    weights = sum(layer.weight.numel() for layer in layers)
    if task.autocast is not None or weights < least or not multiplies_bfloat16(task.device):
        yield task
        return
    kept = [layer.weight for layer in layers]
    try:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
        yield task.with_autocast(torch.bfloat16)
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight = weight


def _linear_layers(model: nn.Module) -> list[Any]:
    """Return the layers whose float32 weight is a plain parameter of their own, read by nothing but their product."""
    return [
        module
        for module in model.modules()
        if (type(module) is nn.Linear or is_conv1d(module))
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and module.weight.dtype == torch.float32
    ]
