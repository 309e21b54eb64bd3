"""Create MEND's editor networks: one for each weight shape, or as an ablation of the paper (section 5.3) has them."""

from __future__ import annotations

from collections.abc import Mapping

from remend.core.editor_network import EditorNetwork
from remend.editors.mend.config import MendConfig


def group_matrices(shapes: Mapping[str, tuple[int, int]], share: bool) -> dict[str, list[str]]:
    """Return the edited matrices that share a network: those of one shape (paper, section 3.2), or each by itself.

    Args:
        shapes: (d_in, d_out) of each edited matrix, by name.
        share: whether matrices share networks (section 5.4).

    Returns:
        The names of each group's matrices, by the key of its network: the shape, or the matrix's name with slashes,
        since torch allows no dots in the names of modules.
    """
    groups: dict[str, list[str]] = {}
    for name, (d_in, d_out) in shapes.items():
        groups.setdefault(f"{d_in}x{d_out}" if share else name.replace(".", "/"), []).append(name)
    return groups


def new_network(config: MendConfig, d_in: int, d_out: int, matrices: int) -> EditorNetwork:
    """Return an untrained network for some matrices of one shape."""
    smaller = "u" if d_in <= d_out else "delta"
    transforms = smaller if config.transforms == "smaller" else config.transforms
    return EditorNetwork(d_in, d_out, matrices, config.rank, transforms, config.normalise, config.identity)
