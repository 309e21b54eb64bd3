"""What is checked before a weight is written."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from remend.core.layers import is_quantized, weight_of
from remend.errors import EditError, PrecisionError

MERGE_TOLERANCE = 0.25
"""The largest share of an edit (Frobenius norm) that merging may lose to rounding before it refuses."""


def refuse_unwritable(modules: Mapping[str, nn.Module]) -> None:
    """Raise where a layer's weight cannot be written: it is quantized (PrecisionError) or offloaded (EditError)."""
    for name, module in modules.items():
        if is_quantized(module):
            raise PrecisionError(
                f"{name} is quantised ({type(module).__name__}), and requantising would alter more than the edit does. "
                "Keep it as a side branch (apply), or make the edit on the unquantised model and merge there; no "
                "weight was changed"
            )
        if weight_of(module).is_meta:
            raise EditError(
                f"{name} is offloaded: what is written to it now would be gone at the next call. Keep the edit as a "
                "side branch (apply), or load the model on one device and merge there; no weight was changed"
            )
