"""How a model runs while remend uses it: by one thread at a time, uncompiled, and in the dtypes of its weights."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from remend.errors import ModelError

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def lock_of(model: nn.Module) -> threading.RLock:
    """Return the lock that a thread holds while it writes to the model's weights or records what the model computes.

    A thread may take it several times. Two threads that record at once would record each other's passes.
    """
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside of what ``torch.compile`` and data parallelism put around it.

    They call that model's own modules, so that hooks and weights of it are theirs.

    Raises:
        ModelError: the model is wrapped by something that replaces its modules or splits its weights.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if isinstance(model, DataParallel | DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    wrapper = type(model).__name__
    if hasattr(model, "_fsdp_wrapped_module"):
        raise ModelError(
            f"a {wrapper} splits weights and joins them into one vector, so no matrix of it can be found: give the "
            "model itself, before it is wrapped"
        )
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise ModelError(
            f"a {wrapper} replaces layers by adapters of PEFT: apply the edit to the model before PEFT wraps it (the "
            "edit goes on acting), or give what merge_and_unload() or unload() returns"
        )
    return model


def forget_compiled() -> None:
    """Let everything that was compiled with ``torch.compile`` be compiled anew at its next call.

    Compiled code does not look whether a module got a hook, so it would go on without. What calls a module cannot be
    known (a compiled function may call a model, and ``generate`` compiles models by itself), so all of it is forgotten.
    """
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes seconds
        # Without this option, blocks of a model that are compiled one by one share code, whatever hooks they have.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


class _Uncompiled:
    """Turns compiled code off for the whole process while at least one thread needs that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._stance: Any = None

    def enter(self) -> None:
        with self._lock:
            if not self._users and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_uncompiled = _Uncompiled()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled models and functions as if they were not compiled within the block, so that hooks in them act."""
    _uncompiled.enter()
    try:
        yield
    finally:
        _uncompiled.leave()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Let this thread alone run or change ``model`` through remend within the block, and run it uncompiled."""
    with lock_of(model), uncompiled():
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn autocast off within the block, which would round factors and statistics to half precision."""
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as contexts:
        for device in {"cpu", *([accelerator.type] if accelerator is not None else [])}:
            contexts.enter_context(torch.autocast(device, enabled=False))
        yield
