"""What an editor measures of its base model once, before training: statistics, whitening, units of the step sizes.

The base model is frozen, so none of it changes afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial

import torch

from remend.core.capture import record_inputs
from remend.core.discriminant import Discriminant
from remend.core.layers import expert_count, is_quantized, weight_of
from remend.core.running_statistics import RunningStatistics
from remend.core.sketching import SketchedMoment, random_test_matrix
from remend.core.whitening import SecondMoment
from remend.editors.mend.editor import Mend
from remend.editors.packing import PackedFactors, active_rows
from remend.errors import TrainingError
from remend.fingerprint import find_modules
from remend.models.fsdp import unsharded
from remend.tasks.base import Example, Task
from remend.training.activation_cache import ActivationCache
from remend.training.distributed import ProcessGroup
from remend.training.episodes import FactPrompts

UNIT_BATCHES = 4
"""Batches over which the units of relative step sizes are measured."""

LIMIT_BATCHES = 64
"""Batches over which the usual size of gradients is measured, at most."""

CONTRAST_PROMPTS = 32_768
"""Prompts over which contrast is measured, at most."""

CONTRAST_RIDGE = 1e-3
"""The floor of the keys' eigenvalues, as a share of their mean."""

CONTRAST_BATCH = 96
"""Prompts that go through the base model together for it."""

TEXT_TOKENS = 131_072
"""Tokens of a text over which second moments are taken, at most."""

TEXT_WINDOW = 256
"""Tokens of one stretch of text that the base model sees together, at most."""

TEXT_BATCH = 16
"""Stretches that go through it together."""


def calibrate(
    editor: Mend,
    constants: ActivationCache,
    batches: Sequence[Sequence[Example]],
    workers: ProcessGroup,
    facts: Sequence[FactPrompts] = (),
    text: Sequence[str] = (),
) -> None:
    """Fit the editor to its base model on the training set's edit pairs, and with contrast on its ``facts``.

    In one pass over ``batches``; with whitening in a second one over those that the store of gradient factors has no
    room for, or else over ``text``.

    First the whiteners (if the configuration asks for them), since what follows is measured in their coordinates; then
    the limits of gradients and contrast, if asked for; then the statistics that normalise the networks' inputs; then
    the units of the step sizes (if they are relative). Several processes share the batches and merge what they find.
    """
    own = batches[workers.rank :: workers.count]
    seen: dict[int, dict[str, PackedFactors]] = {}

    def raw(number: int) -> dict[str, PackedFactors]:
        return seen.get(number) or active_rows(constants.gradient_factors(own[number]), editor.device)

    if editor.config.ridge and text:
        _fit_whiteners_to_text(editor, constants.task, text, workers)
    elif editor.config.ridge:
        seen = _fit_whiteners(editor, constants, own, workers)
    if editor.config.limit:
        _fit_limits(editor, map(raw, range(len(_first(own, workers)))), workers)
    if editor.config.contrast:
        _fit_contrast(editor, constants, _chunks(facts)[workers.rank :: workers.count], workers)
    for number, batch in enumerate(own):
        rows = editor.prepared(raw(number))
        seen.pop(number, None)
        constants.keep_rows(batch, rows)
        _observe(editor, rows)
    for key in editor.groups:
        for statistics in (editor.network(key).u_statistics, editor.network(key).delta_statistics):
            _merge(statistics, workers)
    if editor.config.relative:
        _measure_units(editor, constants, batches[:UNIT_BATCHES])


def warm(
    editor: Mend,
    constants: ActivationCache,
    batches: Sequence[Sequence[Example]],
    workers: ProcessGroup,
    facts: Sequence[FactPrompts] = (),
    text: Sequence[str] = (),
) -> None:
    """Fill the stores as :func:`calibrate` did, with an editor that is fitted already: with the same bits."""
    own = batches[workers.rank :: workers.count]
    for batch in own if editor.config.ridge and not text else ():
        constants.prefix_states(batch)
    for batch in _first(own, workers) if editor.config.limit else ():
        constants.prefix_states(batch)
    for chunk in _chunks(facts)[workers.rank :: workers.count] if editor.config.contrast else ():
        constants.prefix_states(_prompts(chunk))
    for batch in own:
        constants.keep_rows(batch, editor.rows(constants.gradient_factors(batch)))
    for batch in batches[:UNIT_BATCHES] if editor.config.relative else ():
        constants.prefix_states(batch)


def _second_moments(editor: Mend) -> dict[str, SecondMoment]:
    """Nothing seen yet; those of wide matrices of one width share their random vectors."""
    test_matrix = cache(random_test_matrix)
    found: dict[str, SecondMoment] = {}
    for name, (d_in, _) in editor.shapes.items():
        directions = editor.directions.get(name)
        if directions:
            found[name] = SketchedMoment(test_matrix(d_in, directions, editor.device), directions)
        else:
            found[name] = SecondMoment(d_in, editor.device)
    return found


def _fit_whiteners(
    editor: Mend, constants: ActivationCache, batches: Sequence[Sequence[Example]], workers: ProcessGroup
) -> dict[int, dict[str, PackedFactors]]:
    """One whitener a matrix, from its inputs at every token of the prompts (padding is zero, and left out).

    Returns:
        The active rows of the first batches, by number: of so many as the store of gradient factors has room for.
    """
    moments = _second_moments(editor)
    seen: dict[int, dict[str, PackedFactors]] = {}
    room = constants.factors.budget
    for number, batch in enumerate(batches):
        observed = constants.gradient_factors(batch)
        for name, factors in observed.items():
            moments[name].update(factors.u, (factors.u != 0).any(-1))
        rows = active_rows(observed, editor.device)
        room -= sum(4 * values.numel() for own in rows.values() for values in (own.u, own.delta))
        if room >= 0:
            seen[number] = rows
    _keep_whiteners(editor, moments, workers)
    return seen


def _keep_whiteners(editor: Mend, moments: Mapping[str, SecondMoment], workers: ProcessGroup) -> None:
    """What the moments of all processes together say."""
    for name, moment in moments.items():
        workers.sum(*moment.totals)
        editor.keep_operator("whitener", name, moment.whitener(editor.config.ridge))


def _fit_whiteners_to_text(editor: Mend, task: Task, text: Sequence[str], workers: ProcessGroup) -> None:
    """The same from a text's first tokens, in windows of one length."""
    modules = find_modules(task.model, editor.shapes)
    moments = _second_moments(editor)
    length = min(TEXT_WINDOW, task.context or TEXT_WINDOW)
    windows: list[Example] = []
    for passage in text:
        ids = task.encode_input(passage) if passage.strip() else []
        # What a window is followed by is asked for, not looked at.
        windows += [Example(tuple(ids[start : start + length]), (0,)) for start in range(0, len(ids), length)]
        if len(windows) * length >= TEXT_TOKENS:
            break
    if not windows:
        raise TrainingError("the text to take second moments over is empty: give one that holds words, or none")
    if task.collate(windows[:1]).decoder_mask is not None:
        raise TrainingError(
            "a text tells nothing of an encoder-decoder's decoder, which reads answers: train without text"
        )
    wanted = max(editor.directions.get(name, d_in) for name, (d_in, _) in editor.shapes.items())
    if (tokens := sum(len(window.input) for window in windows)) < wanted:
        warnings.warn(
            f"the text has {tokens} tokens, and inputs are whitened in {wanted} directions: most are not seen there, "
            "and whitening does little. Give a longer text",
            stacklevel=2,
        )
    batches = [windows[start : start + TEXT_BATCH] for start in range(0, len(windows), TEXT_BATCH)]
    for some in batches[workers.rank :: workers.count]:
        batch = task.collate(some)
        found = record_inputs(task.model, modules, batch.rows, partial(task.outputs, batch))
        counted = task.token_masks(batch, moments, predicting=False)
        for name, moment in moments.items():
            x, mask = found[name].x, counted[name].to(found[name].x.device)
            moment.update(x, mask.repeat_interleave(x.shape[1] // mask.shape[1], 1))
    _keep_whiteners(editor, moments, workers)


def _first(own: Sequence[Sequence[Example]], workers: ProcessGroup) -> Sequence[Sequence[Example]]:
    """This process's part of the batches over which limits are measured."""
    return own[: -(-LIMIT_BATCHES // workers.count)]


def _fit_limits(editor: Mend, batches: Iterable[Mapping[str, PackedFactors]], workers: ProcessGroup) -> None:
    """How large each matrix's gradients may be: a multiple of the geometric mean, which outliers hardly move."""
    assert editor.largest is not None
    logarithms, counts = torch.zeros_like(editor.largest), torch.zeros_like(editor.largest)
    for rows in batches:
        for name, own in rows.items():
            sizes = own.sizes()
            found = sizes[sizes > 0]
            logarithms[editor.place(name)] += found.log().sum()
            counts[editor.place(name)] += len(found)
    workers.sum(logarithms, counts)
    usual = (logarithms / counts.clamp(min=1)).exp()
    editor.largest.copy_((editor.config.limit * usual).masked_fill(counts == 0, torch.inf))


def _fit_contrast(
    editor: Mend, constants: ActivationCache, chunks: Sequence[Sequence[FactPrompts]], workers: ProcessGroup
) -> None:
    """One contrast operator a matrix, from its keys at the last token of every fact's prompts and their neighbours'."""
    modules = find_modules(constants.task.model, editor.shapes)
    moments = {
        name: Discriminant(d_in, editor.device, editor.operator("whitener", name))
        for name, (d_in, _) in editor.shapes.items()
    }
    for chunk in chunks:
        pairs = _prompts(chunk)
        batch = constants.task.collate(pairs)
        with constants.prefix.resume_from(constants.prefix_states(pairs)):
            found = record_inputs(constants.task.model, modules, batch.rows, partial(constants.task.outputs, batch))
        length = batch.predicting.shape[1]
        owners = torch.tensor([number for number, fact in enumerate(chunk) for _ in fact.prompts])
        near_owners = torch.tensor([n for n, fact in enumerate(chunk) for _ in fact.near], dtype=torch.long)
        for name, moment in moments.items():
            # Experts answer to their own keys alone: a fact is as many facts as there are experts.
            keys, experts = (part.to(editor.device) for part in found[name].at_tokens(batch.first_position, length))
            count, slots = expert_count(modules[name]) or 1, keys.shape[1]
            asked = slots * len(owners)
            whose = torch.cat([owners, near_owners]).to(editor.device)[:, None] * count + experts
            whose = whose.reshape(-1)
            moment.update(keys.flatten(0, 1)[:asked], whose[:asked], keys.flatten(0, 1)[asked:], whose[asked:])
    for name, moment in moments.items():
        workers.sum(*moment.totals)
        editor.keep_operator("contrast", name, moment.operator(editor.config.contrast, CONTRAST_RIDGE))


def _chunks(facts: Sequence[FactPrompts]) -> list[list[FactPrompts]]:
    """Facts whose prompts go through the base model together; no more than are needed."""
    found: list[list[FactPrompts]] = [[]]
    size = total = 0
    for fact in facts:
        own = len(fact.prompts) + len(fact.near)
        if total + own > CONTRAST_PROMPTS:
            break
        if found[-1] and size + own > CONTRAST_BATCH:
            found.append([])
            size = 0
        found[-1].append(fact)
        size, total = size + own, total + own
    return [chunk for chunk in found if chunk]


def _prompts(chunk: Sequence[FactPrompts]) -> list[Example]:
    """All prompts of some facts, then all their neighbours."""
    return [pair for fact in chunk for pair in fact.prompts] + [pair for fact in chunk for pair in fact.near]


def _observe(editor: Mend, rows: Mapping[str, PackedFactors]) -> None:
    """Merge a batch into the networks' input statistics."""
    for key, names in editor.groups.items():
        network = editor.network(key)
        for index, name in enumerate(names):
            network.u_statistics.update(rows[name].u, index)
            network.delta_statistics.update(rows[name].delta, index)


def _merge(statistics: RunningStatistics, workers: ProcessGroup) -> None:
    """Make every process's statistics those of all processes."""
    found = zip(
        *(workers.gather(part) for part in (statistics.count, statistics.mean, statistics.squares)), strict=True
    )
    first, *others = ([part.clone() for part in parts] for parts in found)
    for whole, part in zip((statistics.count, statistics.mean, statistics.squares), first, strict=True):
        whole.copy_(part)
    for count, mean, squares in others:
        statistics.merge(count, mean, squares)


@torch.no_grad()
def _measure_units(editor: Mend, constants: ActivationCache, batches: Sequence[Sequence[Example]]) -> None:
    """The unit of each α: the size of the layer's output over that of (u·ũ) δ̃, a token's answer to its own edit."""
    modules = find_modules(constants.task.model, editor.shapes)
    observed = [constants.gradient_factors(batch) for batch in batches]
    found = [editor.rows(factors) for factors in observed]
    rows = {
        name: PackedFactors(
            torch.cat([own[name].u for own in found]),
            torch.cat([own[name].delta for own in found]),
            tuple(count for own in found for count in own[name].counts),
        )
        for name in editor.shapes
    }
    for name, (pseudo_u, pseudo_delta) in editor.transform(rows).items():
        inputs_there = torch.cat([factors[name].u[factors[name].active] for factors in observed])
        module, whose = modules[name], [own[name].experts for own in found]
        experts = (
            [torch.cat([part.to(inputs_there.device) for part in whose if part is not None])]
            if expert_count(module)
            else []
        )
        dtype = constants.task.model.dtype if is_quantized(module) else weight_of(module).dtype
        with unsharded(constants.task.model, module):
            output = module(inputs_there.to(dtype), *experts).float()
        matched = (inputs_there.to(editor.device) * editor.whiten(pseudo_u, name)).sum(1).abs().mean()
        answer = matched * pseudo_delta.square().mean().sqrt()
        unit = output.square().mean().sqrt().to(editor.device) / answer
        editor.unit[editor.place(name)] = unit if unit.isfinite() and unit > 0 else 1.0
