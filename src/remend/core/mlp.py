"""``Mlp``: the layers of one MLP of a model, and how it computes, found out by running it.

An MLP widens, activates and narrows again: down(a(up(x))), or, if it is gated, down(a(gate(x)) · up(x)). Which layer is
which, and what a is, names do not tell. So the model is run once on an arbitrary input, with arbitrary numbers in the
place of what its widening layers give; what arrives at the narrowing layer tells.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remend.core.example_inputs import example_inputs
from remend.core.layers import dimensions, editable_layers, is_conv1d, layer_inputs, weight_of
from remend.core.low_rank_hooks import frozen, remove_hooks
from remend.core.moe import ExpertLinear
from remend.core.response import ACTIVATIONS, Response
from remend.errors import EditError, ModelError

SPREAD = 2.0
"""The standard deviation of the numbers that take the place of what widening layers give: where activations differ."""

ROUNDING = 8
"""By how many roundings to its dtype the MLP's activations may differ from the function that they are taken for."""


@dataclass(frozen=True)
class Mlp:
    """The layers of an MLP by name, and how it computes.

    Attributes:
        up: the widening projection; of a gated MLP the one whose output is not activated.
        down: the narrowing projection.
        activation: the name of a (:data:`remend.core.response.ACTIVATIONS`).
        width: the number of hidden units.
        gate: of a gated MLP, the widening projection whose output is activated; ``up`` again where one layer holds
            both; empty if the MLP is not gated.
        gate_first: whether in such a layer the outputs of the gate are the first half.
        threshold: whether the projection that is activated has a bias, so that a unit can have a threshold.
    """

    up: str
    down: str
    activation: str
    width: int
    gate: str = ""
    gate_first: bool = True
    threshold: bool = False

    @property
    def gated(self) -> bool:
        """Whether the activation is multiplied with what another projection gives."""
        return bool(self.gate)

    @property
    def fused(self) -> bool:
        """Whether one layer holds both widening projections of a gated MLP."""
        return self.gate == self.up

    @property
    def reads(self) -> str:
        """The layer whose input a unit reads (:attr:`LowRank.reads <remend.core.low_rank.LowRank>`)."""
        return self.gate or self.up

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of all its layers, the narrowing one last."""
        return tuple(dict.fromkeys(name for name in (self.gate, self.up, self.down) if name))

    def response(self, beta: float = 10.0, threshold: float = 0.0) -> Response:
        """Return the response of a hidden unit of this MLP.

        Args:
            beta: its sharpness.
            threshold: its threshold.

        Raises:
            EditError: a number is out of its range, or the MLP has no bias for a threshold.
        """
        response = Response(self.activation, self.gated, beta, threshold)
        self.check(response)
        return response

    def check(self, response: Response) -> None:
        """Raise :class:`EditError` unless units with this response can be hidden units of this MLP."""
        if (response.activation, response.gated) != (self.activation, self.gated):
            own = f"{'gated ' if self.gated else ''}{self.activation}"
            raise EditError(
                f"units with the response {response} cannot be hidden units of the MLP of {self.down}, whose units are "
                f"{own}: take the response from its Mlp, or keep the edit as a side branch (apply)"
            )
        if response.threshold and not self.threshold:
            raise EditError(
                f"the MLP of {self.down} has no biases, which a threshold of {response.threshold:g} takes: make the "
                "edit with the threshold 0, or keep it as a side branch (apply)"
            )


def find_mlp(model: nn.Module, reads: str, down: str) -> Mlp:
    """Return the MLP that a widening and a narrowing projection belong to.

    Args:
        model: the model, which is run up to this MLP.
        reads: one of the MLP's widening projections.
        down: its narrowing projection.

    Raises:
        ModelError: these are no layers of one MLP that hidden units can be added to, or it cannot be told how.
    """
    widening = _widening_layers(model, reads, down)
    given, read, hidden = _probe(model, widening, down)
    layers = [model.get_submodule(name) for name in widening]
    width = dimensions(model.get_submodule(down))[0]
    if any(not torch.equal(read[name], read[widening[0]]) for name in widening):
        raise ModelError(f"{' and '.join(widening)} are not given the same input: they are not of one MLP")
    candidates: list[tuple[Tensor, Tensor | None, dict[str, Any]]] = []
    if len(widening) == 1 and given[widening[0]].shape[-1] == width:
        candidates.append((given[widening[0]], None, {"up": widening[0]}))
    elif len(widening) == 1:
        first, second = given[widening[0]].chunk(2, -1)
        for gate, up, gate_first in ((first, second, True), (second, first, False)):
            fused = {"up": widening[0], "gate": widening[0], "gate_first": gate_first}
            candidates.append((gate, up, fused))
    else:
        for gate_name, up_name in (widening, widening[::-1]):
            candidates.append((given[gate_name], given[up_name], {"gate": gate_name, "up": up_name}))
    error, activation, roles = min(
        (
            (_error(function, gate, up, hidden), name, roles)
            for gate, up, roles in candidates
            for name, function in ACTIVATIONS.items()
        ),
        key=lambda candidate: candidate[0],
    )
    if error > 1:
        raise ModelError(
            f"what reaches {down} is no known function ({', '.join(ACTIVATIONS)}) of what {' and '.join(widening)} "
            "give, alone or gated: hidden units cannot be added to this MLP. Use a change of low rank"
        )
    activated = layers[widening.index(roles.get("gate", roles["up"]))]
    return Mlp(down=down, activation=activation, width=width, threshold=activated.bias is not None, **roles)


def _error(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor | None, hidden: Tensor) -> float:
    """Return how far hidden units are from an activation, in the largest difference that rounding may make."""
    wanted = activation(gate.double())
    wanted = wanted if up is None else wanted * up.double()
    # Relative to both factors: a product is rounded in proportion to its size, an activation to that of its input.
    size = 1 + gate.double().abs() * (1 if up is None else up.double().abs())
    limit = ROUNDING * torch.finfo(hidden.dtype).eps * size
    return float(((wanted - hidden.double()).abs() / limit).max())


def _widening_layers(model: nn.Module, reads: str, down: str) -> list[str]:
    """Return the widening projections of the MLP of two layers: those like the one given, under the same parent.

    Raises:
        ModelError: the layers are no linear layers, or of another shape.
    """
    layers = dict(editable_layers(model))
    for name in (reads, down):
        if isinstance(layers.get(name), ExpertLinear):
            raise ModelError(f"{name} holds several experts' matrices, to which no hidden units can be added")
        if not isinstance(layers.get(name), nn.Linear) and not is_conv1d(layers.get(name, model)):
            raise ModelError(f"{name} is no Linear or Conv1D layer of this model, so it is none of an MLP's")
        if weight_of(layers[name]).is_meta and not hasattr(layers[name], "_hf_hook"):
            raise ModelError(f"the weight of {name} has no values: load the model whole to find out how it computes")
    width, narrowed = dimensions(layers[down])
    d, widened = dimensions(layers[reads])
    if d != narrowed or widened not in (width, 2 * width):
        raise ModelError(
            f"{reads} ({d} → {widened}) and {down} ({width} → {narrowed}) do not widen and narrow again: they are no "
            "MLP's"
        )
    # Under the deepest common parent: of an MLP, or of a block that has its layers itself (OPT, BERT).
    pairs = zip(reads.split("."), down.split("."), strict=False)
    prefix = ".".join(part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    found = [
        name
        for name, layer in layers.items()
        if (not prefix or name.startswith(f"{prefix}.")) and dimensions(layer) == (d, widened)
    ]
    if len(found) > (1 if widened != width else 2):
        raise ModelError(f"{', '.join(found)} all widen like an MLP's layer: it cannot be told which belong to {down}")
    return found


class _Stop(Exception):  # noqa: N818 - no error: it ends a pass that has gone as far as it should
    """Ends a forward pass with the tensor that it was run for."""

    def __init__(self, found: Tensor) -> None:
        self.found = found


def _probe(model: nn.Module, widening: list[str], down: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return the numbers that the widening layers gave, the input of each, and what came of them at the narrowing one.

    The numbers are arbitrary: they take the place of the layers' outputs.
    """
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}

    def substitute(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            read[name] = layer_inputs(module, args, kwargs)[0].to("cpu", copy=True)
            numbers = SPREAD * torch.randn(output.shape, generator=generator)
            given[name] = numbers.to(output.dtype)  # compared on the CPU: not all devices have float64
            return given[name].to(output, copy=True)

        return hook

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(given) == len(widening):
            raise _Stop(layer_inputs(module, args, kwargs)[0].clone())

    with _hooks() as handles:
        for name in widening:
            handles.append(model.get_submodule(name).register_forward_hook(substitute(name), with_kwargs=True))
        handles.append(model.get_submodule(down).register_forward_pre_hook(stop, with_kwargs=True))
        hidden = _run_until_stopped(model, f"{down} after {' and '.join(widening)}").cpu()
    if hidden.shape[:-1] != given[widening[0]].shape[:-1]:
        raise ModelError(f"{down} is not given a row for each row of {widening[0]}: they are not of one MLP")
    return given, read, hidden


def run_mlp(
    model: nn.Module, mlp: Mlp, make_rows: Callable[[Tensor], Float[Tensor, "*row d"]]
) -> tuple[Float[Tensor, "*row d"], Float[Tensor, "*row d"]]:
    """Run an MLP in its model on given rows; return the rows and what its narrowing projection gives for them.

    Args:
        model: the model, which is run up to this MLP.
        mlp: the MLP.
        make_rows: returns the rows, in the shape of the MLP's usual input, which it is given.
    """
    rows: list[Tensor] = []

    def substitute(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        x = layer_inputs(module, args, kwargs)[0]
        if not rows:
            rows.append(make_rows(x).to(x))
        new = tuple(rows[0] if value is x else value for value in args)
        return new, {key: rows[0] if value is x else value for key, value in kwargs.items()}

    def stop(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if rows:
            raise _Stop(output.clone())

    with _hooks() as handles:
        for name in mlp.layers[:-1]:
            handles.append(model.get_submodule(name).register_forward_pre_hook(substitute, with_kwargs=True))
        handles.append(model.get_submodule(mlp.down).register_forward_hook(stop))
        output = _run_until_stopped(model, mlp.down)
    return rows[0], output


@contextmanager
def _hooks() -> Iterator[list[RemovableHandle]]:
    """Remove the hooks whose handles are put into the list within the block afterwards."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        remove_hooks(handles)


@torch.no_grad()
def _run_until_stopped(model: nn.Module, where: str) -> Tensor:
    """Run the model on an arbitrary input until a hook raises :class:`_Stop`, and return what it found.

    Raises:
        ModelError: no hook did, or the model cannot be run on the input.
    """
    inputs: Mapping[str, Any] = example_inputs(model)
    try:
        with frozen(model):
            model(**inputs)
    except _Stop as stopped:
        return stopped.found
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise ModelError(
            f"a {type(model).__name__} cannot be run on an arbitrary input ({str(error).splitlines()[0][:200]}), so it "
            "cannot be found out how its MLPs compute: use a change of low rank"
        ) from None
    raise ModelError(f"a pass of {type(model).__name__} did not call {where}: hidden units cannot be added there")
