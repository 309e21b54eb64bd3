"""Find a model's blocks (transformer layers, residual blocks of a convolutional net) from its structure, select some.

A model without a list of blocks counts as one block, whose name is empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from remend.errors import ConfigError

Blocks = list[tuple[str, nn.Module]]
"""Modules with their names, in the order in which they run."""


def find_stacks(model: Any, stages: bool = False) -> list[tuple[str, Blocks]]:
    """Return the model's stacks of blocks in the order in which they run, each with the name of what it belongs to.

    That is one stack (with an empty name), or those of an encoder and a decoder.

    Args:
        model: the model.
        stages: as in :func:`find_blocks`.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [("", find_blocks(model, stages))]
    names = {module: name for name, module in model.named_modules()}
    return [
        (
            names[part],
            [(f"{names[part]}.{name}" if name else names[part], block) for name, block in find_blocks(part, stages)],
        )
        for part in (model.get_encoder(), model.get_decoder())
    ]


def find_blocks(model: nn.Module, stages: bool = False) -> Blocks:
    """Return the model's blocks with their names: the largest outermost ``ModuleList`` of blocks of one class.

    Where that is a list of stages (ResNet, ConvNeXt, Swin), the blocks are those inside all stages. Without a list, the
    model itself is the only block.

    Args:
        model: the model.
        stages: return stages whole. Hidden states keep their shape inside a stage, and change it between two.
    """
    outermost: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in outermost)
        if isinstance(module, nn.ModuleList) and not nested and len({type(block) for block in module}) == 1:
            outermost[name] = module
    if not outermost:
        return [("", model)]
    list_name, members = max(outermost.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    blocks = [(f"{list_name}.{index}" if list_name else str(index), block) for index, block in enumerate(members)]
    inner = [_blocks_of_stage(stage) for _, stage in blocks]
    if stages or not all(inner) or not _differ_in_width(members):
        return blocks
    return [(f"{name}.{key}", block) for (name, _), part in zip(blocks, inner, strict=True) for key, block in part]


def _blocks_of_stage(stage: nn.Module) -> Blocks:
    """Return the blocks of a stage: a list or sequence directly in it of modules with two weight matrices or more."""
    for name, child in stage.named_children():
        members = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        if members and all(_weight_count(member) > 1 for member in members):
            return [(f"{name}.{key}", member) for key, member in child.named_children()]
    return []


def _weight_count(module: nn.Module) -> int:
    return sum(parameter.dim() > 1 for parameter in module.parameters())


def _differ_in_width(members: Iterable[nn.Module]) -> bool:
    """Return whether a parameter has another shape in some members.

    It tells stages from transformer blocks that each hold a list of experts: those have the same shapes in all blocks.
    """
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for member in members:
        for name, parameter in member.named_parameters():
            shapes.setdefault(name, set()).add(tuple(parameter.shape))
    return any(len(different) > 1 for different in shapes.values())


def is_inside(name: str, prefix: str) -> bool:
    """Return whether the module ``name`` is the module ``prefix`` or lies in it; all lie in the model (``""``)."""
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def select_blocks(model: nn.Module, layers: str) -> Blocks:
    """Return some of the model's blocks with their names; of an encoder-decoder, the same of both stacks.

    Args:
        model: the model.
        layers: ``last-3``; numbers from 0 and ranges of them, ends included (``12``, ``12-14``); or shares of the depth
            (``0.6-0.8``), for the blocks whose middle lies there; several of these with commas.

    Raises:
        ConfigError: ``layers`` is none of these, or names a block that does not exist.
    """
    selected: Blocks = []
    for _, stack in find_stacks(model):
        numbers: set[int] = set()
        for part in layers.split(","):
            numbers_of_part = _block_numbers(part.strip(), len(stack))
            if not numbers_of_part:
                raise ConfigError(
                    f"layers {layers!r}: {part.strip()!r} names no blocks, or more than there are: {len(stack)}. "
                    f"Allowed are 'last-3', numbers from 0 to {len(stack) - 1} and ranges of them ('2-4'), shares of "
                    "the depth ('0.6-0.8'), and several of these with commas"
                )
            numbers |= numbers_of_part
        selected += [stack[number] for number in sorted(numbers)]
    return distinct(selected)


def distinct(named: Blocks) -> Blocks:
    """Return each module once, with its first name: one that the model calls several times may have several."""
    first: dict[nn.Module, str] = {}
    for name, module in named:
        first.setdefault(module, name)
    return [(name, module) for module, name in first.items()]


def _block_numbers(part: str, count: int) -> set[int]:
    """Parse one part of a choice of blocks; empty if it is malformed or names a block that does not exist."""
    if last := re.fullmatch(r"last-(\d+)", part):
        return set(range(max(0, count - int(last[1])), count))
    if (shares := re.fullmatch(r"(\d*\.\d+|[01])-(\d*\.\d+|1)", part)) and "." in part:
        low, high = map(float, shares.groups())
        return {number for number in range(count) if low <= (number + 0.5) / count <= high}
    if ends := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
        first, final = int(ends[1]), int(ends[2] or ends[1])
        return set(range(first, final + 1)) if final < count else set()
    return set()
