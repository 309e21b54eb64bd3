"""Make all MLPs of a model as wide as the widest, and its configuration with them, so that it is a checkpoint.

Units make single MLPs wider, but a configuration has one width for all MLPs (or one for an encoder's and one for a
decoder's). So the others get units that add nothing: all their weights are zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from remend.core.exclusive_execution import lock_of
from remend.core.mlp import Mlp
from remend.core.mlp_widening import ReplacedParameters
from remend.errors import ModelError

FIELDS_WITH_DEFAULT = ("n_inner", "intermediate_size", "ffn_dim", "ffn_hidden_size")
"""Fields of configurations that may be None, for a multiple of the model's width."""

Shapes = Mapping[str, torch.Size]
"""The shapes of a model's parameters by name."""


@contextmanager
def of_one_width(model: Any, mlps: Mapping[str, Mlp]) -> Iterator[None]:
    """Within the block, let a model with some wider MLPs be such as its configuration describes.

    Args:
        model: the model.
        mlps: the MLPs that were made wider, as they were before, by the name of the narrowing projection.

    Raises:
        ModelError: no field of the configuration is the width of these MLPs.
    """
    replaced = ReplacedParameters()
    pending = dict(mlps)
    with lock_of(model):
        try:
            for holder, name in _fields(model.config, {mlp.width for mlp in mlps.values()}):
                if pending:
                    _raise_field(model, holder, name, pending, replaced)
            if pending:
                down, mlp = next(iter(pending.items()))
                raise ModelError(
                    f"no setting of {type(model.config).__name__} is the width of the MLP of {down} ({mlp.width}), so "
                    "a checkpoint cannot have a wider one: keep the edit as it is (a folder), or merge it in memory"
                )
            yield
        finally:
            replaced.restore()


def _fields(config: Any, widths: set[int]) -> list[tuple[Any, str]]:
    """Return the settings, with what holds them, that may be one of the widths; those without a value last."""
    holders = [config, *(value for value in vars(config).values() if hasattr(value, "to_diff_dict"))]
    settings = [(holder, name, value) for holder in holders for name, value in vars(holder).items()]
    numbers = [(holder, name) for holder, name, value in settings if type(value) is int and value in widths]
    return numbers + [
        (holder, name) for holder, name, value in settings if value is None and name in FIELDS_WITH_DEFAULT
    ]


def _raise_field(model: Any, holder: Any, name: str, pending: dict[str, Mlp], replaced: ReplacedParameters) -> None:
    """Raise a setting if it is the width of pending MLPs, pad what it determines, and take them from the pending ones.

    Whether it is, a model without values tells that is built with the setting raised.
    """
    value = getattr(holder, name)
    of_field = {down: mlp for down, mlp in pending.items() if value in (None, mlp.width)}
    if not of_field:
        return
    width = next(iter(of_field.values())).width
    wide = max(_units_of(model.get_submodule(down)) for down in of_field)
    before = _shapes(model)
    with _set(holder, name, wide):
        after = _shapes(model)
    differing = {key: shape for key, shape in after.items() if shape != before.get(key)}
    covered = {down: mlp for down, mlp in of_field.items() if f"{down}.weight" in differing}
    if not covered or not all(_is_wider(before.get(key), shape, width, wide) for key, shape in differing.items()):
        return
    if len(covered) < len(of_field):  # those of another field may have been wider than these
        wide = max(_units_of(model.get_submodule(down)) for down in covered)
        with _set(holder, name, wide):
            after = _shapes(model)
    for layer_name in dict.fromkeys(key.rpartition(".")[0] for key in differing):
        layer: Any = model.get_submodule(layer_name)
        weight, bias = (
            _padded(getattr(layer, part, None), before.get(key), after.get(key), wide)
            for part, key in (("weight", f"{layer_name}.weight"), ("bias", f"{layer_name}.bias"))
        )
        assert weight is not None, "an MLP's layer with a wider bias has a wider weight"
        replaced.set_matrix(layer, weight, bias)
    replaced.set(holder, name, wide)
    for down in covered:
        del pending[down]


def _units_of(layer: Any) -> int:
    """Return the width of a narrowing projection."""
    return int(layer.nx if hasattr(layer, "nx") else layer.in_features)


@contextmanager
def _set(holder: Any, name: str, value: int) -> Iterator[None]:
    """Change a setting within the block."""
    old = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, old)


def _shapes(model: Any) -> Shapes:
    """Return the shapes of the parameters that a model of the same class has with the configuration as it is now."""
    try:
        with torch.device("meta"):
            built = type(model)(copy.deepcopy(model.config))
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
        return {}  # no model has this setting: it is no width
    return {name: parameter.shape for name, parameter in built.named_parameters(remove_duplicate=False)}


def _is_wider(before: torch.Size | None, after: torch.Size, width: int, wide: int) -> bool:
    """Return whether a parameter got as much wider along one axis as one of an MLP does, which may hold two parts."""
    if before is None or len(before) != len(after):
        return False
    sizes = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    return len(sizes) == 1 and sizes[0] in ((width, wide), (2 * width, 2 * wide))


def _padded(tensor: Tensor | None, before: torch.Size | None, after: torch.Size | None, wide: int) -> Tensor | None:
    """Return a parameter with zeros behind each part (gate and up) along the axis that gets wider, if one does."""
    if tensor is None or before is None or after is None or before == after:
        return tensor
    axis = next(axis for axis, (old, new) in enumerate(zip(before, after, strict=True)) if old != new)
    moved = tensor.detach().movedim(axis, 0)
    split = moved.reshape(after[axis] // wide, -1, *moved.shape[1:])
    zeros = split.new_zeros(split.shape[0], wide - split.shape[1], *split.shape[2:])
    return torch.cat([split, zeros], 1).flatten(0, 1).movedim(0, axis).contiguous()
