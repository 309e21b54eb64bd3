"""Low-rank side branches: how an edit acts on a model without touching a weight."""

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
    """A forward hook that adds ΔW x to a linear layer's output.

    The branch is computed in the change's own dtype (float32 as a rule) and added before rounding to the layer's, so
    that a small edit of a bfloat16 model is not lost factor by factor. It follows the layer to another device, which is
    told by the output: hooks of Accelerate move the input only later. A class, not a closure, so that a model with a
    branch can be deep-copied.
    """

    def __init__(self, change: LowRank) -> None:
        self.change = change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The layer's output with ΔW x added."""
        if self.change.u.device != output.device:
            self.change = self.change.to(output.device)
        dtype = self.change.u.dtype
        x, experts = layer_inputs(module, args, kwargs)
        with torch.autocast(output.device.type, enabled=False):
            change = rows_to_output(module, self.change.output_change(x.to(output.device, dtype), experts), output)
            return (output.to(dtype) + change).to(output.dtype)


def attach_hooks(modules: Mapping[str, nn.Module], changes: Mapping[str, LowRank]) -> list[RemovableHandle]:
    """Hook each change onto its module; the caller removes the handles. All of them are attached, or none."""
    handles: list[RemovableHandle] = []
    try:
        for name, change in changes.items():
            handles.append(modules[name].register_forward_hook(LowRankHook(change), with_kwargs=True))
    except BaseException:
        remove_hooks(handles)
        raise
    return handles


def remove_hooks(handles: list[RemovableHandle]) -> None:
    """Remove hooks; removing twice does no harm."""
    for handle in handles:
        handle.remove()


@contextmanager
def changes_applied(modules: Mapping[str, nn.Module], changes: Mapping[str, LowRank]) -> Iterator[None]:
    """Within the block, each module computes y + ΔW x. Differentiable with respect to the changes' factors."""
    handles = attach_hooks(modules, changes)
    try:
        yield
    finally:
        remove_hooks(handles)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block, no parameter of ``model`` asks for a gradient and the model is in evaluation mode.

    Autograd then records nothing below the first edited layer and no weight-sized gradient can arise. What each
    parameter asked for, and each module's mode, is restored afterwards, after an exception too.
    """
    # By owner and name: what is offloaded comes back from a forward pass as another tensor.
    wanted = [(m, n) for m in model.modules() for n, p in m.named_parameters(recurse=False) if p.requires_grad]
    training = [module for module in model.modules() if module.training]
    for owner, name in wanted:
        getattr(owner, name).requires_grad_(False)
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for owner, name in wanted:
            getattr(owner, name).requires_grad_(True)
        for module in training:
            module.training = True
