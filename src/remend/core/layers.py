"""The two kinds of layer whose weight can be edited, and how each lays its weight out."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from remend.core.low_rank import LowRank


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``, a linear layer whose weight is stored as [d_in, d_out].

    The class is told by its qualified name, so that the core needs torch only. The shape must not decide: a square
    ``Conv1D`` weight looks just like a ``Linear`` one.
    """
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def is_editable(module: nn.Module) -> bool:
    """Whether remend can capture factors at ``module`` and edit its weight."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def weight_of(module: nn.Module) -> Tensor:
    """The weight parameter, in the layer's own layout: [d_out, d_in] for ``Linear``, [d_in, d_out] for ``Conv1D``."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def dimensions(module: nn.Module) -> tuple[int, int]:
    """``(d_in, d_out)`` of an editable layer."""
    rows, columns = weight_of(module).shape
    return (rows, columns) if is_conv1d(module) else (columns, rows)


def dense_in_layout(module: nn.Module, change: LowRank) -> Float[Tensor, "rows columns"]:
    """``change`` as a dense matrix in the layout of ``module``'s own weight: to merge, never to train or apply."""
    dense = change.dense()
    return dense.mT if is_conv1d(module) else dense


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one tensor a linear layer was called with, given by position or by keyword."""
    candidates = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    assert len(candidates) == 1, "a linear layer takes exactly one tensor"
    return candidates[0]
