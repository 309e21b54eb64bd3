"""Finding the matrices to edit from a model's structure, never from its name."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from remend.base import find_modules
from remend.core.layers import dimensions, is_editable
from remend.errors import ModelError, nearest

LAST_BLOCKS = 3
"""The paper edits the MLP matrices of a decoder's last three blocks (section 5)."""


def editable_modules(
    model: nn.Module, patterns: Sequence[str] = (), outputs_only: bool = False
) -> dict[str, nn.Module]:
    """The matrices to edit, by name: those that match a glob in ``patterns``, or the MLPs' of the last blocks.

    Args:
        model: the model.
        patterns: globs, if any.
        outputs_only: of the MLPs, without ``patterns``, only the matrices that narrow again: what they write goes into
            the residual stream as it is, while what the others write goes through the activation first.

    Raises:
        ModelError: nothing matches, or no stack of blocks with MLPs was found; the message names what exists.
    """
    every = {name: module for name, module in model.named_modules() if is_editable(module)}
    for name in _shared(model, every):
        del every[name]
    if patterns:
        chosen = {n: m for n, m in every.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)}
        if not chosen:
            raise ModelError(
                f"no editable module matches {' '.join(patterns)} (the output layer, and weights that several modules "
                f"share, cannot be edited); {nearest(patterns[0], every)}"
            )
        return chosen
    blocks = block_stack(model)
    names = [name for prefix, block in blocks[-LAST_BLOCKS:] for name in mlp_matrices(prefix, block)]
    if outputs_only:
        shapes = {name: dimensions(module) for name, module in find_modules(model, names).items()}
        names = [name for name, (d_in, d_out) in shapes.items() if d_in > d_out]
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

    The MLP is the group of linear layers under one parent in which one widens, d → m (or d → 2m, a fused gate and up
    projection), and another narrows again, m → d, with the largest m > d. Attention has such pairs too where its heads
    are together wider than the model, but narrower than the MLP.

    Raises:
        ModelError: the MLP's weights are not matrices (experts stored as one tensor of three axes).
    """
    for name, parameter in block.named_parameters(prefix=prefix):
        if parameter.dim() == 3:
            raise ModelError(
                f"{name} holds several experts in one tensor of shape {tuple(parameter.shape)}, which cannot be edited "
                "yet; name other matrices with --modules (attention's, say)"
            )
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for name, module in block.named_modules(prefix=prefix):
        if is_editable(module):
            groups.setdefault(name.rpartition(".")[0], {})[name] = dimensions(module)
    best: list[str] = []
    width = 0
    for members in groups.values():
        for m, d in members.values():
            wide = {(d, m), (d, 2 * m)}
            if m > d and m > width and wide & set(members.values()):
                width, best = m, [name for name, shape in members.items() if shape in {*wide, (m, d)}]
    return best


def _shared(model: nn.Module, editable: Mapping[str, nn.Module]) -> list[str]:
    """Editable modules that must not be edited: the output layer, and those whose weight another module uses too.

    A side branch would act on one use of a shared weight, a merged edit on all of them.
    """
    users: Counter[int] = Counter()
    for module in model.modules():
        users.update(id(parameter) for parameter in module.parameters(recurse=False))
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    return [name for name, module in editable.items() if module is head or users[id(module.weight)] > 1]
