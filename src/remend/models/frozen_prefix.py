"""The frozen prefix: the blocks below the lowest edited one, whose output no edit can change.

What enters the lowest edited block is the same before and after every edit. So it is computed once, and the model is
entered again there: its own forward pass runs, with the blocks below handing on what they were told.

Most blocks return hidden states, some a tuple of which they are the first part. Where more parts count (T5's blocks
hand on the position bias that the first of them computes), the first block runs, and only its hidden states are
replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from remend.errors import ModelError
from remend.models.structure import find_stacks


class _Reached(Exception):  # noqa: N818 - no error: the pass has gone as far as it should
    """Ends a forward pass at the place whose input was wanted."""

    def __init__(self, found: Tensor) -> None:
        self.found = found


class FrozenPrefix:
    """Where a model is cut, and how it is entered again.

    Attributes:
        blocks: the model's blocks, in order; empty where it cannot be cut.
        stack: which of the model's stacks is cut: the first one that is edited (0: the only one, or the encoder).
        depth: how many of them lie below the cut; with 0, everything is computed anew.
        output_parts: how many parts a block returns, 0 where it returns hidden states themselves.
        states_only: whether the parts but the first are all None.
    """

    def __init__(self, model: nn.Module, edited: Iterable[str]) -> None:
        self.blocks: list[nn.Module] = []
        self.depth = 0
        self.stack, self.output_parts, self.states_only = 0, 0, True
        try:
            stacks = [blocks for _, blocks in find_stacks(model)]
        except ModelError:  # no blocks: there is nothing to cut
            return
        prefixes = [[prefix for prefix, _ in blocks] for blocks in stacks]
        # Where each edited module lies; one in no block may come before all of them.
        places = [
            next(
                ((stack, place) for stack, own in enumerate(prefixes) if (place := _place(name, own)) is not None),
                (0, 0),
            )
            for name in edited
        ]
        self.stack, self.depth = min(places, default=(0, 0))
        self.blocks = [block for _, block in stacks[self.stack]]

    def compute_states(self, forward: Callable[[], object]) -> Float[Tensor, "row token d"]:
        """What enters the lowest edited block when ``forward`` runs the model; nothing above is computed."""
        with self._noting():
            return run_until(self.blocks[self.depth], forward)

    @contextmanager
    def resume_from(self, states: Float[Tensor, "row token d"] | None) -> Iterator[None]:
        """Within the block, the model's forward pass begins at the cut, with ``states`` (with ``None``, as ever)."""
        if states is None:
            yield
            return
        below = self.blocks[: self.depth]
        if self.states_only:
            with _replaced(below, lambda own: lambda *args, **kwargs: self._parts(states)):
                yield
            return
        found: list[tuple[Any, ...]] = []

        def first(own: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
                found[:] = [(states, *own(*args, **kwargs)[1:])]
                return found[0]

            return run

        with _replaced(below[:1], first), _replaced(below[1:], lambda own: lambda *args, **kwargs: found[0]):
            yield

    @contextmanager
    def record_input(self) -> Iterator[dict[str, Tensor]]:
        """Within the block, what enters the lowest edited block in a whole pass is kept as ``states``, if it can be."""
        kept: dict[str, Tensor] = {}

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with suppress(ModelError):
                kept["states"] = _hidden(args, kwargs).detach()

        if not self.depth:
            yield kept
            return
        handle = self.blocks[self.depth].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with self._noting():
                yield kept
        finally:
            handle.remove()

    @contextmanager
    def bypass_blocks(self) -> Iterator[None]:
        """Within the block, no block of the model computes anything; what is left is around them."""
        with _replaced(self.blocks, lambda own: lambda *args, **kwargs: self._parts(_hidden(args, kwargs))):
            yield

    def _parts(self, states: Tensor) -> Tensor | tuple[Any, ...]:
        """Hidden states as a block returns them."""
        return (states, *[None] * (self.output_parts - 1)) if self.output_parts else states

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Within the block, a pass that begins at the beginning tells what blocks return."""

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.output_parts = len(output) if isinstance(output, tuple) else 0
            self.states_only = not self.output_parts or all(part is None for part in output[1:])

        if not self.blocks:
            yield
            return
        handle = self.blocks[0].register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def checkpoint_activations(self) -> Iterator[None]:
        """Within the block, activations above the cut are not kept for the backward pass but computed again."""

        def again(own: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: checkpoint(own, *args, use_reentrant=False, **kwargs)

        with _replaced(self.blocks[self.depth :], again):
            yield

    @torch.no_grad()
    def verify(
        self, logits: Callable[[], Tensor], last: Callable[[], Tensor], head: Callable[[Tensor], Tensor]
    ) -> bool:
        """Whether a cut pass gives what the whole one gives; if not, the model counts as one that cannot be cut.

        Blocks that hand on more than hidden states would be cut wrongly, and it would show here.

        Args:
            logits: runs the model on some example.
            last: runs it and returns what its output layer sees.
            head: makes logits of that.
        """
        with self._noting():
            whole = logits().float()
        if not whole.isfinite().all():
            return True  # a broken model: training will say where it breaks
        try:
            with self.resume_from(self.compute_states(logits) if self.depth else None):
                found = [logits().float()]
            states = last()
            with self.bypass_blocks():
                found.append(head(states).float())
            near = 1e-3 * float(whole.std())
            right = all(cut.shape == whole.shape and torch.allclose(cut, whole, 1e-3, near) for cut in found)
        except (ModelError, TypeError, AttributeError, ValueError, IndexError, RuntimeError):
            right = False  # a block that was expected to hand on more
        if not right:
            self.blocks, self.depth = [], 0
        return right


def run_until(module: nn.Module, forward: Callable[[], object]) -> Tensor:
    """The hidden states that ``module`` is called with when ``forward`` runs; the pass ends there.

    Raises:
        ModelError: ``forward`` never calls the module.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(_hidden(args, kwargs))

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        forward()
    except _Reached as reached:
        return reached.found
    finally:
        handle.remove()
    raise ModelError(f"the model's forward pass never calls {type(module).__name__}, which lies before what is edited")


def _hidden(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a block's arguments: the first, or the one that is named so."""
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        raise ModelError("a block of the model is called without hidden states, so the model cannot be cut there")
    return found


def _place(name: str, prefixes: Sequence[str]) -> int | None:
    """Which block a module lies in."""
    return next((i for i, prefix in enumerate(prefixes) if name == prefix or name.startswith(f"{prefix}.")), None)


@contextmanager
def _replaced(
    blocks: Sequence[nn.Module],
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Within the block, each of ``blocks`` computes something else; as an attribute of the object, never of its class.

    A block may have such an attribute already (Accelerate's way to move weights to where they are needed): it comes
    back afterwards.
    """
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = make(block.forward)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = own
