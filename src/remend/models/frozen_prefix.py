"""Run a model only from its lowest edited block on: what the blocks below (the frozen prefix) give, no edit changes.

What enters the lowest edited block is computed once for each input. Later passes start there: the model's own forward
runs, while the blocks below hand these hidden states on in place of computing.

Most blocks return hidden states, some a tuple that begins with them. Where the rest of the tuple counts (the first of
T5's blocks computes the position bias for all), the first block runs, and only its hidden states are replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from remend.core.exclusive_execution import uncompiled
from remend.errors import ModelError, RemendError
from remend.models.blocks import find_stacks, is_inside

TOLERANCE = 1e-3
"""How much a pass from the cut may differ from a whole one: relative, or in units of the logits' standard deviation."""

_verified: WeakSet[nn.Module] = WeakSet()
"""The blocks below which a model was cut without a difference (:meth:`FrozenPrefix.check_resume`)."""


class _StopForward(Exception):  # noqa: N818 - no error: it ends a pass that has gone as far as it should
    """Ends a forward pass at a module."""


class FrozenPrefix:
    """The blocks of a model below the lowest edited one, and how to start a forward pass above them.

    Args:
        model: the model.
        edited: the names of the edited modules.

    Attributes:
        blocks: the blocks of the stack that is cut, in order; empty where the model cannot be cut.
        stack: the number of the stack that is cut: the first one that is edited (0: the only one, or the encoder).
        depth: how many blocks lie below the cut; with 0, everything is computed anew.
        output_parts: how many parts a block's output tuple has; 0 where a block returns hidden states themselves.
        states_only: whether all parts but the first are None.
    """

    def __init__(self, model: nn.Module, edited: Iterable[str]) -> None:
        self.blocks: list[nn.Module] = []
        self.stack, self.depth = 0, 0
        self.output_parts, self.states_only = 0, True
        self._has_stages = False
        # Between the blocks of a stage nothing else runs, but a stage may begin with a layer that is no block.
        stacks = [blocks for _, blocks in find_stacks(model, stages=True)]
        if any(name == "" for blocks in stacks for name, _ in blocks):
            return  # the model is one block: there is nothing to cut
        if any(len({block for _, block in blocks}) < len(blocks) for blocks in stacks):
            return  # a block that runs several times lies below the cut and above it
        block_names = [[name for name, _ in blocks] for blocks in stacks]
        # A module outside of all blocks may run before all of them.
        cuts = [
            next(
                (
                    (stack, number)
                    for stack, names in enumerate(block_names)
                    for number, block_name in enumerate(names)
                    if is_inside(name, block_name)
                ),
                (0, 0),
            )
            for name in edited
        ]
        self.stack, self.depth = min(cuts, default=(0, 0))
        self.blocks = [block for _, block in stacks[self.stack]]
        self._has_stages = find_stacks(model)[self.stack][1] != stacks[self.stack]

    def compute_states(self, forward: Callable[[], object]) -> Float[Tensor, "row token *d"]:
        """Return what enters the lowest edited block when ``forward`` runs the model; nothing above is computed."""
        with self._observe_outputs():
            return run_until(self.blocks[self.depth], forward)

    @contextmanager
    def resume_from(self, states: Float[Tensor, "row token *d"] | None) -> Iterator[None]:
        """Start the model's forward passes at the cut, with ``states``, within the context; with None, as usual."""
        # What stages return beside hidden states (a feature map's size) differs from stage to stage: run them all.
        if states is None or (self._has_stages and not self.states_only):
            yield
            return
        below = self.blocks[: self.depth]
        # The model's own forward still calls these blocks, so that masks and positions are computed as always.
        if self.states_only:
            with _replaced_forward(below, lambda forward: lambda *args, **kwargs: self._as_output(states)):
                yield
            return
        output: tuple[Any, ...] = ()

        # Later blocks read what the first one returns beside its hidden states (T5's position bias, which depends on
        # lengths only), so it has to run.
        def run_first(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
                nonlocal output
                output = (states, *forward(*args, **kwargs)[1:])
                return output

            return run

        with (
            _replaced_forward(below[:1], run_first),
            _replaced_forward(below[1:], lambda forward: lambda *args, **kwargs: output),
        ):
            yield

    @contextmanager
    def record_input(self) -> Iterator[dict[str, Tensor]]:
        """Record what enters the lowest edited block in a whole pass within the context, under ``"states"``.

        The yielded dictionary stays empty where the model cannot be cut.
        """
        recorded: dict[str, Tensor] = {}

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with suppress(ModelError):  # blocks without hidden states: such a model is not cut
                recorded["states"] = _hidden_states(args, kwargs).detach()

        if not self.depth:
            yield recorded
            return
        handle = self.blocks[self.depth].register_forward_pre_hook(record, with_kwargs=True)
        try:
            with self._observe_outputs():
                yield recorded
        finally:
            handle.remove()

    @contextmanager
    def bypass_blocks(self) -> Iterator[None]:
        """Make all blocks return their input within the context, so that only what surrounds them computes."""
        with _replaced_forward(
            self.blocks, lambda forward: lambda *args, **kwargs: self._as_output(_hidden_states(args, kwargs))
        ):
            yield

    def _as_output(self, states: Tensor) -> Tensor | tuple[Any, ...]:
        """Return hidden states in the form in which a block returns them."""
        return (states, *[None] * (self.output_parts - 1)) if self.output_parts else states

    @contextmanager
    def _observe_outputs(self) -> Iterator[None]:
        """Note in which form blocks return hidden states, in a pass that runs all of them."""

        def observe(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.output_parts = len(output) if isinstance(output, tuple) else 0
            self.states_only = not self.output_parts or all(part is None for part in output[1:])

        if not self.blocks:
            yield
            return
        # The first block tells: the lowest edited one is not run by `run_until`.
        handle = self.blocks[0].register_forward_hook(observe)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def checkpoint_activations(self) -> Iterator[None]:
        """Recompute activations above the cut in the backward pass within the context, instead of keeping them."""

        def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
            # The reentrant variant supports neither torch.autograd.grad nor keyword arguments.
            return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

        with _replaced_forward(self.blocks[self.depth :], checkpointed):
            yield

    @torch.no_grad()
    def check_resume(self, states: Tensor, forward: Callable[[], Tensor], expected: Tensor) -> bool:
        """Return whether a pass from the cut gives the same logits as a whole pass; each cut is checked once.

        Args:
            states: what entered the lowest edited block in the whole pass.
            forward: runs the model on the same input and returns logits.
            expected: the logits of the whole pass.
        """
        # A block belongs to one model and is one cut. What blocks hand on does not change, so once is enough.
        lowest_edited = self.blocks[self.depth]
        if lowest_edited not in _verified:
            with self.resume_from(states):
                logits = logits_or_none(forward)
            if logits is None or not same_logits(logits, expected):
                return False
            _verified.add(lowest_edited)
        return True

    @torch.no_grad()
    def verify(
        self, logits: Callable[[], Tensor], last: Callable[[], Tensor], head: Callable[[Tensor], Tensor]
    ) -> bool:
        """Return whether a cut pass gives what the whole one gives; if not, the model is not cut any more.

        Blocks that hand on more than hidden states would be cut wrongly, and it would show here.

        Args:
            logits: runs the model on some example and returns its logits.
            last: runs the model and returns what its output layer reads.
            head: computes logits from that.
        """
        with self._observe_outputs():
            whole = logits().float()
        if not whole.isfinite().all():
            return True  # a broken model: training will say where it breaks

        def from_cut() -> Tensor:
            with self.resume_from(self.compute_states(logits) if self.depth else None):
                return logits()

        def from_head() -> Tensor:
            states = last()
            with self.bypass_blocks():
                return head(states)

        for run in (from_cut, from_head):
            result = logits_or_none(run)
            if result is None or not same_logits(result, whole):
                self.blocks, self.depth = [], 0
                return False
        return True


def logits_or_none(run: Callable[[], Tensor]) -> Tensor | None:
    """Return the logits of a cut pass in float32, or None where it raises what a wrong cut makes blocks raise."""
    try:
        return run().float()
    except Exception as error:
        # torch reports shapes that do not fit as a plain RuntimeError. Its subclasses (out of memory, faults of the
        # device, recursion) have other causes, and running the slow way would hide them. So do remend's own errors,
        # but for the ModelError of `_hidden_states` and `run_until`; NaN (NonFiniteError) is not about the cut.
        if isinstance(error, RuntimeError):
            wrong_cut = type(error) is RuntimeError
        elif isinstance(error, RemendError):
            wrong_cut = type(error) is ModelError
        else:
            wrong_cut = isinstance(error, TypeError | AttributeError | ValueError | IndexError)
        if not wrong_cut:
            raise
        return None


def same_logits(logits: Tensor, expected: Tensor) -> bool:
    """Return whether two passes gave the same logits, but for rounding; NaN is not the same as anything."""
    scale = float(expected.std())
    return (
        math.isfinite(scale)
        and logits.shape == expected.shape
        and torch.allclose(logits, expected, TOLERANCE, TOLERANCE * scale)
    )


def run_until(module: nn.Module, forward: Callable[[], object]) -> Tensor:
    """Return the hidden states that ``module`` is called with when ``forward`` runs; the pass ends there.

    Raises:
        ModelError: ``forward`` never calls the module.
    """
    states: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(_hidden_states(args, kwargs))
        raise _StopForward

    with uncompiled():
        handle = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            forward()
        except _StopForward:
            return states[0]
        finally:
            handle.remove()
    raise ModelError(f"the model's forward pass never calls {type(module).__name__}, which lies before what is edited")


def run_as_far_as(model: nn.Module, modules: Collection[nn.Module], forward: Callable[[], object]) -> None:
    """Run ``forward`` until all of ``modules`` have run, as far as can be told from the blocks that hold them.

    What they compute is the same as in a whole pass. Where a module lies outside of all blocks, or blocks run several
    times, the whole pass runs.
    """
    above = _block_above(model, set(modules))
    if above is None:
        forward()
        return

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _StopForward

    with uncompiled():
        handle = above.register_forward_pre_hook(stop)
        try:
            forward()
        except _StopForward:
            pass
        finally:
            handle.remove()


def _block_above(model: nn.Module, modules: set[nn.Module]) -> nn.Module | None:
    """Return the first block above all that hold some of the modules; None where a pass cannot end there."""
    blocks = [block for _, stack in find_stacks(model, stages=True) for _, block in stack]
    holding = [number for number, block in enumerate(blocks) if not modules.isdisjoint(block.modules())]
    inside = {module for number in holding for module in blocks[number].modules()}
    if not modules <= inside or len(set(blocks)) < len(blocks):
        return None
    return next(iter(blocks[max(holding, default=-1) + 1 :]), None)


def _hidden_states(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among a block's arguments: the first, or the one that is named so."""
    states = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(states, Tensor):
        raise ModelError("a block of the model is called without hidden states, so the model cannot be cut there")
    return states


@contextmanager
def _replaced_forward(
    blocks: Sequence[nn.Module],
    replace: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Replace the ``forward`` of each block by ``replace(forward)`` within the context.

    It is set as an attribute of the object, never of its class. A block may have such an attribute already
    (Accelerate's way to move weights to where they are needed): it is restored afterwards.
    """
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = replace(block.forward)
        with uncompiled():
            yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward
