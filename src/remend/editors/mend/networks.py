"""Which editor networks an editor has: one for each weight shape, or what the paper's ablations make of it."""

from __future__ import annotations

from collections.abc import Mapping

from remend.core.editor_network import EditorNetwork
from remend.editors.mend.config import MendConfig


def grouped(shapes: Mapping[str, tuple[int, int]], share: bool) -> dict[str, list[str]]:
    """The edited matrices that share a network: those of one shape (paper, section 3.2), or each by itself.

    Args:
        shapes: (d_in, d_out) of each edited module, by name.
        share: whether matrices share networks (section 5.4).

    Returns:
        The names of each group's modules, by the name of its network: the shape, or the module's with slashes, since
        torch allows no dot there.
    """
    found: dict[str, list[str]] = {}
    for name, (d_in, d_out) in shapes.items():
        found.setdefault(f"{d_in}x{d_out}" if share else name.replace(".", "/"), []).append(name)
    return found


def new_network(config: MendConfig, d_in: int, d_out: int, matrices: int) -> EditorNetwork:
    """The untrained network of some matrices of one shape."""
    smaller = "u" if d_in <= d_out else "delta"
    reads = smaller if config.transforms == "smaller" else config.transforms
    return EditorNetwork(d_in, d_out, matrices, config.rank, reads, config.normalise, config.identity)
