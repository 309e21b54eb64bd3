"""Write hidden units into the MLPs of a model, which get wider, with an exact way back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.core.layers import is_conv1d, raise_if_shared, weight_of
from remend.core.low_rank import LowRank
from remend.core.mlp import Mlp, find_mlp, run_mlp
from remend.core.weight_checks import MERGE_TOLERANCE, refuse_unwritable
from remend.errors import ModelError, PrecisionError

CHECK_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
"""How much of what units add may differ once they are merged (Frobenius norm), by dtype."""

COARSE_CHECK_TOLERANCE = 0.1
"""The same in half precision."""


class ReplacedParameters:
    """Parameters and other attributes of modules that were replaced; :meth:`restore` puts the very objects back."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def set(self, holder: Any, attribute: str, value: Any) -> None:
        """Set an attribute and remember what it was."""
        self._originals.append((holder, attribute, getattr(holder, attribute)))
        setattr(holder, attribute, value)

    def set_matrix(self, layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        """Give a layer another weight and bias, in its layout, and the dimensions that go with them."""
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and value is not getattr(layer, name):
                wanted = getattr(layer, name).requires_grad
                self.set(layer, name, nn.Parameter(value, requires_grad=wanted))
        names = ("nx", "nf") if is_conv1d(layer) else ("out_features", "in_features")
        for name, size in zip(names, weight.shape, strict=True):
            self.set(layer, name, size)

    def restore(self) -> None:
        """Put everything back. Restoring twice does no harm."""
        while self._originals:
            holder, attribute, value = self._originals.pop()
            setattr(holder, attribute, value)


class Widening(ReplacedParameters):
    """MLPs that were made wider.

    Attributes:
        mlps: as they were before, by the name of the narrowing projection.
        lost: for each, the share of its units (Frobenius norm) that was lost to rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mlps: dict[str, Mlp] = {}
        self.lost: dict[str, float] = {}


@torch.no_grad()
def widen(model: nn.Module, changes: Mapping[str, LowRank]) -> Widening:
    """Write units into the MLPs that they were made for; all MLPs get wider, or none.

    A unit with key u, value delta and sharpness β of a gated MLP is a gate row β u, an up row u / a(β(1 − θ)) and a
    down column delta; of another one an up row β u and a down column delta / a(β(1 − θ)). A threshold is a bias −βθ.
    The wider MLP is then run on the units' keys and compared with what the units add as a side branch.

    Args:
        model: the model.
        changes: the units, by the name of the MLP's narrowing projection.

    Raises:
        PrecisionError: rounding to the weights' dtype would lose more than :data:`MERGE_TOLERANCE` of a unit, or a
            weight is quantised.
        EditError: a weight is offloaded or shared, or the units are not such as the MLP has.
        ModelError: it cannot be told how the MLP computes, or the wider one computes something else.
    """
    widening, new = Widening(), {}
    for name, change in changes.items():
        mlp = find_mlp(model, change.reads, name)
        mlp.check(change.response)
        layers = {layer: model.get_submodule(layer) for layer in mlp.layers}
        refuse_unwritable(layers)
        raise_if_shared(model, layers, "merging would change that too. Keep the edit as a side branch (apply)")
        widening.mlps[name] = mlp
        new[name], widening.lost[name] = _wider_layers(mlp, layers, change)
    plain = {
        name: run_mlp(model, mlp, functools.partial(_check_rows, change=changes[name]))
        for name, mlp in widening.mlps.items()
    }
    try:
        for tensors in new.values():
            for layer, (weight, bias) in tensors.items():
                widening.set_matrix(model.get_submodule(layer), weight, bias)
        for name, mlp in widening.mlps.items():
            _check_units(model, mlp, changes[name], *plain[name])
    except BaseException:
        widening.restore()
        raise
    return widening


def _wider_layers(
    mlp: Mlp, layers: Mapping[str, nn.Module], change: LowRank
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], float]:
    """Return weight and bias of each layer of the wider MLP, and the share of the units that is lost to rounding."""
    response = change.response
    bias = torch.full((change.rank,), -response.beta * response.threshold)
    activated, down = response.beta * change.u, change.delta
    if mlp.gated:
        plain = change.u / response.scale
    else:
        down = down / response.scale
    wider: dict[str, tuple[Tensor, Tensor | None]] = {}
    lost = 0.0
    if mlp.fused:
        halves = [(activated, bias), (plain, torch.zeros_like(bias))]
        parts = {mlp.up: halves if mlp.gate_first else halves[::-1]}
    elif mlp.gated:
        parts = {mlp.gate: [(activated, bias)], mlp.up: [(plain, torch.zeros_like(bias))]}
    else:
        parts = {mlp.up: [(activated, bias)]}
    for name, rows in parts.items():
        layer = layers[name]
        weight = weight_of(layer).mT if is_conv1d(layer) else weight_of(layer)
        rounded = [_rounded(name, units, weight) for units, _ in rows]
        lost = max(lost, *(share for _, share in rounded))
        chunks = zip(weight.chunk(len(rows)), (units for units, _ in rounded), strict=True)
        wide = torch.cat([part for pair in chunks for part in pair])
        wide_bias = None
        if (old := _bias_of(layer)) is not None:
            biases = zip(old.chunk(len(rows)), (b.to(old) for _, b in rows), strict=True)
            wide_bias = torch.cat([part for pair in biases for part in pair])
        wider[name] = (wide.mT.contiguous() if is_conv1d(layer) else wide), wide_bias
    layer = layers[mlp.down]
    weight = weight_of(layer).mT if is_conv1d(layer) else weight_of(layer)
    columns, share = _rounded(mlp.down, down.mT, weight)
    wide = torch.cat([weight, columns], 1)
    wider[mlp.down] = (wide.mT.contiguous() if is_conv1d(layer) else wide), _bias_of(layer)
    return wider, max(lost, share)


def _bias_of(layer: nn.Module) -> Tensor | None:
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def _rounded(name: str, units: Tensor, weight: Tensor) -> tuple[Tensor, float]:
    """Return what is added to a weight in its dtype, and the share that this loses.

    Raises:
        PrecisionError: it loses too much.
    """
    rounded = units.to(weight)
    lost = float((rounded.to(units) - units).norm() / units.norm().clamp(min=1e-30))
    if not rounded.isfinite().all() or lost > MERGE_TOLERANCE:
        reason = f"would round away {lost:.0%} of the units" if rounded.isfinite().all() else "cannot hold the units"
        raise PrecisionError(
            f"{name}: {weight.dtype} {reason}. Keep the edit as a side branch (apply), or load the model in float32 "
            "and merge there; no weight was changed"
        )
    return rounded, lost


def _check_rows(x: Float[Tensor, "*row d"], change: LowRank) -> Float[Tensor, "*row d"]:
    """Return rows in the shape of ``x`` at which units show: keys of some, which they answer with 1, and others."""
    u = change.u.to(x.device)
    keys = u / u.square().sum(1, keepdim=True).clamp(min=1e-30)
    rows = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(u).flatten(0, -2)
    rows = rows / u.norm(dim=1).mean().clamp(min=1e-30)
    count = min(len(keys), (len(rows) + 1) // 2)
    return torch.cat([keys[:count], rows[count:]]).view(x.shape)


def _check_units(model: nn.Module, mlp: Mlp, change: LowRank, rows: Tensor, before: Tensor) -> None:
    """Raise :class:`ModelError` unless the wider MLP computes what it did before and what its new units add."""
    after = run_mlp(model, mlp, lambda x: rows)[1]
    change = change.to(rows.device)
    added = change.output_change(rows.to(change.u.dtype)).reshape(after.shape)
    error = (after.to(added) - before.to(added) - added).norm()
    dtype = weight_of(model.get_submodule(mlp.down)).dtype
    rounding = 8 * torch.finfo(dtype).eps * float(before.to(added).norm())
    if not error <= CHECK_TOLERANCE.get(dtype, COARSE_CHECK_TOLERANCE) * added.norm() + rounding:
        raise ModelError(
            f"with hidden units more, the MLP of {mlp.down} does not compute what they add to it (it is "
            f"{float(error / added.norm()):.0%} off): keep the edit as a side branch (apply). No weight was changed"
        )
