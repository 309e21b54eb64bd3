"""Finding the matrices to edit from a model's structure, never from its name."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from remend.core.layers import dimensions, editable_layers
from remend.core.moe import DOWN_PROJECTION, ExpertLinear
from remend.errors import ConfigError, ModelError
from remend.fingerprint import find_modules

DEFAULT_LAYERS = "last-3"
"""The paper edits the MLP matrices of a decoder's last three blocks (section 5)."""

DEFAULT_LAYERS_ENCODER_DECODER = "last-2"
"""Of an encoder-decoder it edits the last two of either stack."""

REGEX = "re:"
"""What a pattern begins with that is a regular expression, not a glob."""


def editable_modules(
    model: nn.Module, patterns: Sequence[str] = (), outputs_only: bool = False, layers: str | None = None
) -> dict[str, nn.Module]:
    """The matrices to edit, by name: those that match one of ``patterns``, or the MLPs' of the last blocks.

    Args:
        model: the model.
        patterns: globs, or regular expressions that begin with ``re:``; a name must match as a whole.
        outputs_only: of the MLPs, without ``patterns``, only the matrices that narrow again: what they write goes into
            the residual stream as it is, while what the others write goes through the activation first.
        layers: the blocks to look in, as :func:`select_blocks` reads it; by default the last three where there is no
            pattern, and everywhere where there is one.

    Raises:
        ConfigError: a regular expression is malformed, or ``layers`` names no block.
        ModelError: nothing matches, or no stack of blocks with MLPs was found; the message names what exists.
    """
    every = dict(editable_layers(model))
    for name in _shared(model, every):
        del every[name]
    if patterns:
        matches = [_matcher(pattern) for pattern in patterns]
        chosen = {name: module for name, module in every.items() if any(match(name) for match in matches)}
        if layers is not None:
            inside = tuple(f"{prefix}." for prefix, _ in select_blocks(model, layers))
            chosen = {name: module for name, module in chosen.items() if name.startswith(inside)}
        if not chosen:
            where = f" in the blocks {layers}" if layers is not None else ""
            raise ModelError(
                f"no editable module{where} matches {' '.join(patterns)} (the output layer, and weights that several "
                f"modules share, cannot be edited); {_meant(patterns[0], every)}"
            )
        return chosen
    blocks = select_blocks(
        model, layers or (DEFAULT_LAYERS_ENCODER_DECODER if len(find_stacks(model)) > 1 else DEFAULT_LAYERS)
    )
    if outputs_only:  # of an encoder-decoder, the decoder's: there targets are predicted
        writing = {prefix for prefix, _ in find_stacks(model)[-1][1]}
        blocks = [(prefix, block) for prefix, block in blocks if prefix in writing]
    names = [name for prefix, block in blocks for name in mlp_layer_names(prefix, block)]
    if outputs_only:
        names = [name for name, module in find_modules(model, names).items() if is_down_projection(module)]
    if not names:
        raise ModelError(
            f"{type(model).__name__}: found no MLP (a pair of linear layers that widens and narrows again) in its "
            f"blocks {layers or DEFAULT_LAYERS}; name the matrices with --modules. Editable: "
            f"{', '.join(list(every)[:8])} …"
        )
    return find_modules(model, names)


def select_blocks(model: nn.Module, layers: str) -> list[tuple[str, nn.Module]]:
    """Some of the model's blocks, in order, with their names; of an encoder-decoder, the same of both stacks.

    Args:
        model: the model.
        layers: ``last-3``; numbers from 0 and ranges of them, ends included (``12``, ``12-14``); or shares of the depth
            (``0.6-0.8``), for the blocks whose middle lies there; several of these with commas.

    Raises:
        ConfigError: it is none of these, or names a block that there is not.
        ModelError: the model has no stack of blocks.
    """
    every = []
    for _, stack in find_stacks(model):
        chosen: set[int] = set()
        for part in layers.split(","):
            found = _places(part.strip(), len(stack))
            if not found:
                raise ConfigError(
                    f"layers {layers!r}: {part.strip()!r} names no blocks, or more than there are: {len(stack)}. "
                    f"Allowed are 'last-3', numbers from 0 to {len(stack) - 1} and ranges of them ('2-4'), shares of "
                    "the depth ('0.6-0.8'), and several of these with commas"
                )
            chosen |= found
        every += [stack[place] for place in sorted(chosen)]
    return every


def _places(part: str, count: int) -> set[int]:
    """The places that one part of a choice of blocks names; none where it makes no sense, or names one too many."""
    if last := re.fullmatch(r"last-(\d+)", part):
        return set(range(max(0, count - int(last[1])), count))
    if (shares := re.fullmatch(r"(\d*\.\d+|[01])-(\d*\.\d+|1)", part)) and "." in part:
        low, high = map(float, shares.groups())
        return {place for place in range(count) if low <= (place + 0.5) / count <= high}
    if numbers := re.fullmatch(r"(\d+)(?:-(\d+))?", part):
        first, end = int(numbers[1]), int(numbers[2] or numbers[1])
        return set(range(first, end + 1)) if end < count else set()
    return set()


def _meant(pattern: str, names: Iterable[str]) -> str:
    """A clause with the name closest to a pattern, or with all there are, those that differ in numbers as one."""
    known = list(names)
    if close := difflib.get_close_matches(pattern, known, n=1):
        return f"did you mean {close[0]!r}?"
    grouped: dict[str, list[list[int]]] = {}
    for name in known:
        grouped.setdefault(re.sub(r"\d+", "{}", name), []).append([int(n) for n in re.findall(r"\d+", name)])
    told = []
    for form, numbers in grouped.items():
        spans = [(min(column), max(column)) for column in zip(*numbers, strict=True)]
        told.append(form.format(*(f"{low}-{high}" if low < high else f"{low}" for low, high in spans)))
    return f"there are {', '.join(told)}"


def _matcher(pattern: str) -> Callable[[str], object]:
    """Whether a whole name matches a glob, or a regular expression.

    Raises:
        ConfigError: the expression is malformed.
    """
    if not pattern.startswith(REGEX):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    try:
        return re.compile(pattern.removeprefix(REGEX)).fullmatch
    except re.error as error:
        raise ConfigError(f"{pattern} is no regular expression: {error}") from None


def find_stacks(model: Any) -> list[tuple[str, list[tuple[str, nn.Module]]]]:
    """The model's stacks of blocks in the order in which they run, each with the name of what it belongs to.

    One, or an encoder's and a decoder's.

    Raises:
        ModelError: there is none.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [("", find_blocks(model))]
    names = {module: name for name, module in model.named_modules()}
    found = []
    for part in (model.get_encoder(), model.get_decoder()):
        own = names[part]
        found.append((own, [(f"{own}.{name}", block) for name, block in find_blocks(part)]))
    return found


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
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


def mlp_layer_names(prefix: str, block: nn.Module) -> list[str]:
    """The names of the MLP's matrices in one block.

    The MLP is the group of linear layers under one parent in which one widens, d → m (or d → 2m, a fused gate and up
    projection), and another narrows again, m → d, with the largest m > d. Attention has such pairs too where its heads
    are together wider than the model, but narrower than the MLP.

    Where a block has experts (:mod:`remend.core.moe`), the MLP is theirs, however narrow each is.

    Raises:
        ModelError: the MLP's weights are no matrices that can be edited.
    """
    layers = dict(editable_layers(block, prefix))
    if experts := [name for name, module in layers.items() if isinstance(module, ExpertLinear)]:
        return experts
    for name, parameter in block.named_parameters(prefix=prefix):
        if parameter.dim() == 3 and min(parameter.shape) > 1:
            raise ModelError(
                f"{name} is one tensor of shape {tuple(parameter.shape)} (of several experts, perhaps) in a module "
                "that does not compute through transformers' interface for experts, so nothing can be captured there; "
                "name other matrices with --modules (attention's, say)"
            )
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for name, module in layers.items():
        groups.setdefault(name.rpartition(".")[0], {})[name] = dimensions(module)
    # BERT keeps the two in modules of their own, which only the block has in common.
    return _widest(groups.values()) or _widest([{name: dimensions(module) for name, module in layers.items()}])


def _widest(groups: Iterable[Mapping[str, tuple[int, int]]]) -> list[str]:
    """Of the group with the widest pair of layers that widens and narrows again, those that do; empty without one."""
    best: list[str] = []
    width = 0
    for members in groups:
        for m, d in members.values():
            wide = {(d, m), (d, 2 * m)}
            if m > d and m > width and wide & set(members.values()):
                width, best = m, [name for name, shape in members.items() if shape in {*wide, (m, d)}]
    return best


def is_down_projection(module: nn.Module) -> bool:
    """Whether a matrix of an MLP writes to the residual stream."""
    d_in, d_out = dimensions(module)
    return module.parameter_name == DOWN_PROJECTION if isinstance(module, ExpertLinear) else d_in > d_out


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
