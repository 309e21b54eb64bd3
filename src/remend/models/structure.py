"""Finding the matrices to edit from a model's structure, never from its name."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from remend.base import find_modules
from remend.core.layers import dimensions, is_editable
from remend.errors import ModelError, nearest

LAST_BLOCKS = 3
"""The paper edits the MLP matrices of a decoder's last three blocks (section 5)."""


def editable_modules(model: nn.Module, patterns: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The matrices to edit, by name: those that match a glob in ``patterns``, or the paper's default.

    Raises:
        ModelError: nothing matches, or no stack of blocks with MLPs was found; the message names what exists.
    """
    every = {name: module for name, module in model.named_modules() if is_editable(module)}
    if patterns:
        chosen = {n: m for n, m in every.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)}
        if not chosen:
            raise ModelError(f"no editable module matches {' '.join(patterns)}; {nearest(patterns[0], every)}")
        return chosen
    blocks = block_stack(model)
    names = [name for prefix, block in blocks[-LAST_BLOCKS:] for name in mlp_matrices(prefix, block)]
    if not names:
        raise ModelError(
            f"{type(model).__name__}: found no MLP (a pair of linear layers that widens and narrows again) in its last "
            f"{LAST_BLOCKS} blocks; name the matrices with --modules. Editable: {', '.join(list(every)[:8])} …"
        )
    return find_modules(model, names)


def block_stack(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's blocks, in order, with their names: the largest outermost ``ModuleList`` of blocks of one class.

    Raises:
        ModelError: there is none.
    """
    outermost: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{other}.") for other in outermost)
        if isinstance(module, nn.ModuleList) and not nested and len({type(block) for block in module}) == 1:
            outermost[name] = module
    if not outermost:
        raise ModelError(f"{type(model).__name__} has no stack of blocks (a ModuleList); name the matrices to edit")
    name, blocks = max(outermost.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [(f"{name}.{index}", block) for index, block in enumerate(blocks)]


def mlp_matrices(prefix: str, block: nn.Module) -> list[str]:
    """The names of the MLP's matrices in one block.

    The MLP is the group of linear layers under one parent in which one widens, d → m, and another narrows, m → d, with
    the largest m. (Attention has such pairs too where its heads are wider than the model, but narrower than the MLP.)
    """
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for name, module in block.named_modules(prefix=prefix):
        if is_editable(module):
            groups.setdefault(name.rpartition(".")[0], {})[name] = dimensions(module)
    best: list[str] = []
    width = 0
    for members in groups.values():
        for d_in, d_out in members.values():
            pair = {(d_in, d_out), (d_out, d_in), (d_in, 2 * d_out)}  # (d, 2m) → m: a fused gate and up projection
            if (d_out, d_in) in members.values() and d_out > width:
                width = d_out
                best = [name for name, shape in members.items() if shape in pair]
    return best
