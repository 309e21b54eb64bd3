"""Hooks that add changes to the outputs of layers, so that a model is edited without writing to a weight.

A change that reads another layer than the one that it changes has a hook at either: the first computes its responses
from that layer's input, the second adds what they make to the output, in the same pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remend.core.exclusive_execution import exclusive, uncompiled
from remend.core.layers import layer_inputs, output_rows, rows_to_output
from remend.core.low_rank import LowRank
from remend.errors import EditError


class LowRankHook:
    """A forward hook that adds a change to a layer's output. A class, so that a hooked model can be deep-copied.

    Attributes:
        change: the change.
        reader: the hook at the layer that the change reads; None if that is the changed layer itself.
        reached: whether the layer has been called since.
    """

    def __init__(self, change: LowRank) -> None:
        self.change = change
        self.reader = _ReadHook(self) if change.reads else None
        self.reached = False
        self._on_device = {change.u.device: change}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Return the layer's output with the change added."""
        self.reached = True
        change = self.on_device(output)
        dtype = change.u.dtype
        # In the change's dtype (usually float32), added before rounding to the layer's dtype: in bfloat16 a small edit
        # would be lost factor by factor.
        with torch.autocast(output.device.type, enabled=False):
            if self.reader is None:
                x, experts = layer_inputs(module, args, kwargs)
                added = change.output_change(x.to(output.device, dtype), experts)
            else:
                responses = self.reader.take().to(output.device)
                added = change.from_responses(responses).reshape(output_rows(module, output).shape)
            return (output.to(dtype) + rows_to_output(module, added, output)).to(output.dtype)

    def on_device(self, output: Tensor) -> LowRank:
        """Return the change on the device of a layer's output."""
        # The output tells where a layer runs. The input does not: Accelerate's hooks move it only later. One copy for
        # each device: DataParallel calls the same hook on several at once.
        change = self._on_device.get(output.device)
        if change is None:
            change = self._on_device[output.device] = self.change.to(output.device)
        return change


class _ReadHook:
    """A forward hook that computes a change's responses at the layer that it reads, for the hook that adds them.

    Not the input is kept but what is computed of it at once: a model may overwrite its activations in place.
    """

    def __init__(self, adder: LowRankHook) -> None:
        self.adder = adder
        self._of_thread = threading.local()  # DataParallel, and servers, run one model in several threads at once

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Compute the responses to the layer's input."""
        change = self.adder.on_device(output)
        x, _ = layer_inputs(module, args, kwargs)
        with torch.autocast(output.device.type, enabled=False):
            responses = change.responses(x.to(output.device, change.u.dtype))
        self._of_thread.responses = responses

    def take(self) -> Tensor:
        """Return the responses of the pass that runs in this thread, and forget them.

        Raises:
            EditError: the layer was not called since the changed one was called last.
        """
        responses: Tensor | None = getattr(self._of_thread, "responses", None)
        self._of_thread.responses = None
        if responses is None:
            raise EditError(
                f"{self.adder.change.reads} is not called before each call of the layer that an edit changes: hidden "
                "units read the input of the MLP whose output they add to"
            )
        return responses

    def __getstate__(self) -> LowRankHook:
        """Leave out what belongs to passes that are running now."""
        return self.adder

    def __setstate__(self, adder: LowRankHook) -> None:
        """Take over what a copy was made of."""
        self.__init__(adder)  # type: ignore[misc]


class ReachCheck:
    """Hooks that raise where a forward pass of a model did not call a layer that carries a change.

    Some code computes with a layer's weight without calling the layer, or replays a recorded graph (CUDA graphs), so
    that no hook runs. The first pass in which all layers are called ends the check; it costs nothing after that.
    A layer may be left out together with what it belongs to, such as an encoder whose output is given, or an image
    tower of a model that reads a text; but not all of them, and none whose parent runs.

    Args:
        model: the model.
        hooks: the hook of each changed layer, by its name.
    """

    def __init__(self, model: nn.Module, hooks: Mapping[str, LowRankHook]) -> None:
        self.hooks = hooks
        self.parents: set[str] = set()
        self.handles: list[RemovableHandle] = []
        for parent in {name.rpartition(".")[0] for name in hooks} - {""}:
            self.handles.append(model.get_submodule(parent).register_forward_hook(_Note(self.parents, parent)))
        self.handles.append(model.register_forward_hook(self))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Check the pass of the model that ends here.

        Raises:
            EditError: a layer that carries a change was not called.
        """
        # What is compiled now is compiled with the hooks in it.
        if torch.compiler.is_compiling():
            return
        missed = [name for name, hook in self.hooks.items() if not hook.reached]
        passed_over = [name for name in missed if name.rpartition(".")[0] in {"", *self.parents}]
        if passed_over or len(missed) == len(self.hooks):
            raise EditError(
                f"the forward pass of this {type(module).__name__} did not call {(passed_over or missed)[0]}, so an "
                "edit that is applied there does not act: the model computes with the weight by itself, or runs a "
                "recorded graph. Revert the edit, and merge it, or apply it before the graph is recorded"
            )
        if not missed:
            remove_hooks(self.handles)


class _Note:
    """A forward hook that notes that a module was called. A class, so that a hooked model can be deep-copied."""

    def __init__(self, called: set[str], name: str) -> None:
        self.called, self.name = called, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.called.add(self.name)


def attach_hooks(
    modules: Mapping[str, nn.Module], changes: Mapping[str, LowRank], checked: nn.Module | None = None
) -> list[RemovableHandle]:
    """Attach each change to its module as a hook, all or none, and return the handles, which the caller removes.

    Args:
        modules: the layers by name, with those that changes read.
        changes: their changes.
        checked: the model, if its first forward pass shall check that it calls all layers (:class:`ReachCheck`).
    """
    handles: list[RemovableHandle] = []
    hooks = {name: LowRankHook(change) for name, change in changes.items()}
    try:
        for name, hook in hooks.items():
            if hook.reader is not None:
                handles.append(modules[hook.change.reads].register_forward_hook(hook.reader, with_kwargs=True))
            handles.append(modules[name].register_forward_hook(hook, with_kwargs=True))
        if checked is not None and hooks:
            handles += ReachCheck(checked, hooks).handles
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
    """Let each changed module add its change within the block. Differentiable with respect to the factors."""
    with uncompiled():
        handles = attach_hooks(modules, changes)
        try:
            yield
        finally:
            remove_hooks(handles)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze ``model`` within the block: no parameter requires a gradient, and all modules are in evaluation mode.

    Autograd then records nothing below the first edited layer and forms no weight-sized gradient. Each parameter's
    ``requires_grad`` and each module's mode are restored afterwards, also after an exception. Other threads that use
    the model through remend wait meanwhile, and it runs uncompiled (:func:`exclusive`).
    """
    with exclusive(model):
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
