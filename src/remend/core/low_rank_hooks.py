"""Hooks that add low-rank changes to the outputs of layers, so that a model is edited without writing to a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remend.core.layers import layer_inputs, rows_to_output
from remend.core.low_rank import LowRank


class LowRankHook:
    """A forward hook that adds ΔW x to a linear layer's output. A class, so that a hooked model can be deep-copied."""

    def __init__(self, change: LowRank) -> None:
        self.change = change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Return the layer's output with ΔW x added."""
        # The output tells where the layer runs. The input does not: Accelerate's hooks move it only later.
        if self.change.u.device != output.device:
            self.change = self.change.to(output.device)
        dtype = self.change.u.dtype
        x, experts = layer_inputs(module, args, kwargs)
        # In the change's dtype (usually float32), added before rounding to the layer's dtype: in bfloat16 a small edit
        # would be lost factor by factor.
        with torch.autocast(output.device.type, enabled=False):
            change = rows_to_output(module, self.change.output_change(x.to(output.device, dtype), experts), output)
            return (output.to(dtype) + change).to(output.dtype)


def attach_hooks(modules: Mapping[str, nn.Module], changes: Mapping[str, LowRank]) -> list[RemovableHandle]:
    """Attach each change to its module as a hook, all or none, and return the handles, which the caller removes."""
    handles: list[RemovableHandle] = []
    try:
        for name, change in changes.items():
            handles.append(modules[name].register_forward_hook(LowRankHook(change), with_kwargs=True))
    except BaseException:
        remove_hooks(handles)
        raise
    return handles


def remove_hooks(handles: list[RemovableHandle]) -> None:
    """Remove hooks; removing them twice does no harm."""
    for handle in handles:
        handle.remove()


@contextmanager
def changes_applied(modules: Mapping[str, nn.Module], changes: Mapping[str, LowRank]) -> Iterator[None]:
    """Let each module compute y + ΔW x within the block. Differentiable with respect to the changes' factors."""
    handles = attach_hooks(modules, changes)
    try:
        yield
    finally:
        remove_hooks(handles)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze ``model`` within the block: no parameter requires a gradient, and all modules are in evaluation mode.

    Autograd then records nothing below the first edited layer and forms no weight-sized gradient. Each parameter's
    ``requires_grad`` and each module's mode are restored afterwards, also after an exception.
    """
    # By owner and name: an offloaded parameter is another tensor after a forward pass.
    trainable = [(m, n) for m in model.modules() for n, p in m.named_parameters(recurse=False) if p.requires_grad]
    training = [module for module in model.modules() if module.training]
    for owner, name in trainable:
        getattr(owner, name).requires_grad_(False)
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for owner, name in trainable:
            getattr(owner, name).requires_grad_(True)
        for module in training:
            module.training = True
