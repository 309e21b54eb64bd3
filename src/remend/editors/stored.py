"""What the names and sizes of a saved MEND editor's tensors say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def symmetric_of(state: Mapping[str, Tensor]) -> set[str]:
    """Which tensors of an editor are symmetric matrices, of which half is stored."""
    return {name for name, t in state.items() if name.startswith(("whitener_", "contrast_")) and t.dim() == 2}


def directions_in(shapes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """In how many directions the whiteners of a saved editor tell inputs apart, where not in all."""
    found = {name: tensors.get(f"basis_{index}") for index, name in enumerate(shapes)}
    return {name: basis.shape[1] for name, basis in found.items() if basis is not None and basis.dim() == 2}
