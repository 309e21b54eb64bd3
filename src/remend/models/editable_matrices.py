"""Find the matrices to edit in a model from its structure, never from its name."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from remend.bounded_regex import PatternError, PatternMatcher
from remend.core.layers import dimensions, editable_layers, shared_weights
from remend.core.mlp import Mlp, find_mlp
from remend.core.moe import DOWN_PROJECTION, ExpertLinear
from remend.errors import ConfigError, ModelError
from remend.fingerprint import find_modules
from remend.models.blocks import find_stacks, is_inside, select_blocks

DEFAULT_LAYERS = "last-3"
"""The paper edits the MLP matrices of a decoder's last three blocks (section 5)."""

DEFAULT_LAYERS_ENCODER_DECODER = "last-2"
"""Of an encoder-decoder it edits the last two blocks of either stack."""

REGEX_PREFIX = "re:"
"""How a pattern begins that is a regular expression, not a glob."""

MAX_LISTED_LAYERS = 8
"""How many editable layers an error message lists."""


def editable_modules(
    model: nn.Module, patterns: Sequence[str] = (), outputs_only: bool = False, layers: str | None = None
) -> dict[str, nn.Module]:
    """Return the matrices to edit by name: those that match ``patterns``, or the MLPs' of the last blocks.

    In a model without blocks (a plain MLP), the default is all editable layers but the last, which is its output layer.

    Args:
        model: the model.
        patterns: globs, or regular expressions that begin with ``re:``; a name must match as a whole.
        outputs_only: without ``patterns``, return only the MLPs' matrices that write to the residual stream: the output
            of the other ones passes through the activation first.
        layers: the blocks to look in, as :func:`select_blocks` reads it; by default the last three where there is no
            pattern, and everywhere where there is one.

    Raises:
        ConfigError: a regular expression is malformed or takes too long, or ``layers`` names no block.
        ModelError: nothing matches, or no block has an MLP; the message names what can be edited.
    """
    candidates = dict(editable_layers(model))
    for name in _not_editable(model, candidates):
        del candidates[name]
    if patterns:
        return _matching(model, candidates, patterns, layers)
    stacks = find_stacks(model)
    names: list[str] = []
    # Without blocks there is no residual stream: every hidden layer's output passes through an activation.
    if [name for name, _ in stacks[0][1]] == [""]:
        if layers is not None:
            select_blocks(model, layers)  # raises where it names no block
        names = [name for name in candidates if name]
        names = names[:-1] or names
    else:
        layers = layers or (DEFAULT_LAYERS_ENCODER_DECODER if len(stacks) > 1 else DEFAULT_LAYERS)
        blocks = select_blocks(model, layers)
        if outputs_only:  # of an encoder-decoder, the decoder's: there targets are predicted
            in_last_stack = {name for name, _ in stacks[-1][1]}
            blocks = [(name, block) for name, block in blocks if name in in_last_stack]
        for block_name, block in blocks:
            mlp = mlp_layer_names(block_name, block)
            names += _residual_writers(find_modules(model, mlp)) if outputs_only else mlp
    if not names:
        examples = ", ".join(list(candidates)[:MAX_LISTED_LAYERS])
        raise ModelError(
            f"{type(model).__name__}: found no MLP (a pair of linear layers that widens and narrows again) in its "
            f"blocks {layers or DEFAULT_LAYERS}; "
            + (f"name the matrices with --modules. Editable: {examples} …" if examples else "it has no editable layer")
        )
    return find_modules(model, names)


def encoder_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of the named modules that lie in the encoder of an encoder-decoder."""
    stacks = [name for name, _ in find_stacks(model)[:-1]]
    return [name for stack in stacks for name in names if name.startswith(f"{stack}.")]


def _matching(
    model: nn.Module, candidates: Mapping[str, nn.Module], patterns: Sequence[str], layers: str | None
) -> dict[str, nn.Module]:
    """Return the editable layers that match one of ``patterns`` and lie in the blocks ``layers``."""
    expressions = PatternMatcher()
    matchers = [_matcher(pattern, expressions) for pattern in patterns]
    matches = {name: module for name, module in candidates.items() if any(match(name) for match in matchers)}
    if layers is not None:
        blocks = select_blocks(model, layers)
        matches = {n: module for n, module in matches.items() if any(is_inside(n, block) for block, _ in blocks)}
    if not matches:
        where = f" in the blocks {layers}" if layers is not None else ""
        raise ModelError(
            f"no editable module{where} matches {' '.join(patterns)} (the output layer, and weights that several "
            f"modules share, cannot be edited); {_suggest(patterns[0], candidates)}"
        )
    return matches


def _matcher(pattern: str, expressions: PatternMatcher) -> Callable[[str], bool]:
    """Return a predicate that is true where a whole name matches a glob or a regular expression.

    The predicate raises ConfigError where the expression is malformed or takes too long.
    """
    if not pattern.startswith(REGEX_PREFIX):
        return lambda name: fnmatch.fnmatchcase(name, pattern)

    def matches(name: str) -> bool:
        try:
            return expressions.fullmatch(pattern.removeprefix(REGEX_PREFIX), name)
        except PatternError as error:
            raise ConfigError(f"the pattern {pattern} {error}") from None

    return matches


def _suggest(pattern: str, names: Iterable[str]) -> str:
    """Return a clause with the name closest to a pattern, or with all names, those that differ in numbers as one."""
    all_names = list(names)
    if close := difflib.get_close_matches(pattern, all_names, n=1):
        return f"did you mean {close[0]!r}?"
    grouped: dict[str, list[list[int]]] = {}
    for name in all_names:
        grouped.setdefault(re.sub(r"\d+", "{}", name), []).append([int(n) for n in re.findall(r"\d+", name)])
    forms = []
    for form, numbers in grouped.items():
        spans = [(min(column), max(column)) for column in zip(*numbers, strict=True)]
        forms.append(form.format(*(f"{low}-{high}" if low < high else f"{low}" for low, high in spans)))
    return f"there are {', '.join(forms)}"


def mlp_layer_names(prefix: str, block: nn.Module) -> list[str]:
    """Return the names of the MLP's matrices in one block.

    The MLP is the group of linear layers under one parent in which one widens, d → m (or d → 2m, a fused gate and up
    projection), and another narrows again, m → d, with the largest m > d. Attention has such pairs too where its heads
    are together wider than the model, but narrower than the MLP.

    Where a block has experts (:mod:`remend.core.moe`), the MLP is theirs, however narrow each is.

    Args:
        prefix: the block's name.
        block: the block.

    Raises:
        ModelError: the MLP's weights are no matrices that can be edited.
    """
    layers = dict(editable_layers(block, prefix))
    if experts := [name for name, module in layers.items() if isinstance(module, ExpertLinear)]:
        return experts
    # Without this, a pair of attention's matrices could be taken for the MLP: the experts' own are not found.
    for name, parameter in block.named_parameters(prefix=prefix):
        if parameter.dim() == 3 and min(parameter.shape) > 1:
            raise ModelError(
                f"{name} is one tensor of shape {tuple(parameter.shape)} (of several experts, perhaps) in a module "
                "that does not compute through transformers' interface for experts, so nothing can be captured there; "
                "name other matrices with --modules (attention's, say)"
            )
    # By parent first: in the whole block, matrices of attention that have the same shapes would be taken along.
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for name, module in layers.items():
        groups.setdefault(name.rpartition(".")[0], {})[name] = dimensions(module)
    # BERT keeps the two in modules of their own, which only the block has in common.
    return _widest_pair(groups.values()) or _widest_pair(
        [{name: dimensions(module) for name, module in layers.items()}]
    )


def block_mlp(model: nn.Module, block: str) -> Mlp:
    """Return the layers of a block's MLP and how it computes: what a hidden unit that is added to it needs.

    Args:
        model: the model; it is run once, up to this MLP.
        block: the block's name (:func:`remend.models.blocks.select_blocks`).

    Raises:
        ModelError: the block has no MLP that hidden units can be added to, or it cannot be told how it computes.
    """
    names = mlp_layer_names(block, model.get_submodule(block))
    narrows = {name: is_down_projection(module) for name, module in find_modules(model, names).items()}
    down = [name for name in names if narrows[name]]
    widening = [name for name in names if not narrows[name]]
    if len(down) != 1 or not widening:
        raise ModelError(
            f"{block} has no MLP of layers that widen and one that narrows again ({', '.join(names) or 'none found'}): "
            "hidden units cannot be added to it"
        )
    return find_mlp(model, widening[0], down[0])


def _widest_pair(groups: Iterable[Mapping[str, tuple[int, int]]]) -> list[str]:
    """Return the names of the widest pair of layers that widens and narrows again, all from one group; or nothing."""
    widest: list[str] = []
    width = 0
    for members in groups:
        for m, d in members.values():
            wide = {(d, m), (d, 2 * m)}
            if m > d and m > width and wide & set(members.values()):
                width, widest = m, [name for name, shape in members.items() if shape in {*wide, (m, d)}]
    return widest


def is_down_projection(module: nn.Module) -> bool:
    """Return whether a matrix of an MLP projects from the wider hidden layer back to the model's width."""
    d_in, d_out = dimensions(module)
    return module.parameter_name == DOWN_PROJECTION if isinstance(module, ExpertLinear) else d_in > d_out


def _residual_writers(mlp: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of those of an MLP's matrices that write to the residual stream."""
    narrows = {name: is_down_projection(module) for name, module in mlp.items()}
    order = list(narrows.values())
    # A bottleneck (ResNet) narrows first, and its widening convolution writes to the residual stream. The order alone
    # does not tell: Llama's own code names its matrices w1 (gate), w2 (down), w3 (up).
    bottleneck = bool(order) and order[0] and not order[-1]
    return [name for name, narrow in narrows.items() if narrow != bottleneck]


def _not_editable(model: nn.Module, candidates: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of layers that must not be edited: the output layer, and those that share their weight.

    A side branch would act on one use of a shared weight, a merged edit on all of them.
    """
    shared = shared_weights(model)
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    return [name for name, module in candidates.items() if module is head or name in shared]
