"""The measurements of MEND's calibration, each of which fills some of the editor's buffers.

They are: whiteners of the matrices' inputs, the norms to which gradients are clipped, discriminants of keys, the mean
and spread by which the networks normalize their inputs, and the unit in which each matrix's step size α is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from remend.core.capture import GradientFactors, record_inputs
from remend.core.distributed import ProcessGroup
from remend.core.key_discriminant import Discriminant
from remend.core.layers import expert_count, is_quantized, weight_as_matrix, weight_of
from remend.core.running_statistics import RunningStatistics
from remend.core.sketched_moment import SketchedMoment, random_test_matrix
from remend.core.whitening import SecondMoment
from remend.editors.factor_packing import PackedFactors
from remend.editors.mend.transform import GradientTransform
from remend.editors.trainable import ActivationSource, FactPrompts
from remend.errors import TrainingError
from remend.fingerprint import find_modules
from remend.models.frozen_prefix import run_as_far_as
from remend.models.fsdp import unsharded
from remend.progress import report_progress
from remend.tasks.base import Example, Task

DISCRIMINANT_RIDGE = 1e-3
"""The floor of the eigenvalues of the keys' second moment, as a share of their mean."""

TEXT_TOKENS = 131_072
"""The largest number of tokens of a text over which second moments are taken."""

TEXT_WINDOW = 256
"""The largest number of tokens of a window of text."""

TEXT_BATCH = 16
"""The number of windows that go through the base model together."""

ORDINARY_INPUTS, ORDINARY_SEED = 1_024, 0
"""The number of ordinary inputs where no text is given, and the seed of their draw."""


def new_moments(editor: GradientTransform) -> dict[str, SecondMoment]:
    """Return an empty second moment for the inputs of each matrix; sketched for wide ones."""
    test_matrix = cache(random_test_matrix)  # matrices of one width share the random vectors
    moments: dict[str, SecondMoment] = {}
    for name, (d_in, _) in editor.shapes.items():
        directions = editor.directions.get(name)
        if directions:
            moments[name] = SketchedMoment(test_matrix(d_in, directions, editor.device), directions)
        else:
            moments[name] = SecondMoment(d_in, editor.device)
    return moments


def update_moments(moments: Mapping[str, SecondMoment], factors: Mapping[str, GradientFactors]) -> None:
    """Add the inputs at every token of some examples, other than padding."""
    for name, factor in factors.items():
        moments[name].update(factor.u, (factor.u != 0).any(-1))  # the inputs of padding are zeros


def set_whiteners(editor: GradientTransform, moments: Mapping[str, SecondMoment], process_group: ProcessGroup) -> None:
    """Set each matrix's whitener from the moments of all processes together."""
    for name, moment in moments.items():
        process_group.sum(*moment.totals)
        editor.set_operator("whitener", name, moment.whitener(editor.config.ridge))


def fit_whiteners_to_text(
    editor: GradientTransform, task: Task, windows: Sequence[Example], process_group: ProcessGroup
) -> None:
    """Set each matrix's whitener from its inputs at all tokens of ordinary text."""
    modules = editor.edited_modules(task)
    moments = new_moments(editor)
    directions = max(editor.directions.get(name, d_in) for name, (d_in, _) in editor.shapes.items())
    if (tokens := sum(map(task.context_length, windows))) < directions:
        warnings.warn(
            f"the text has {tokens} tokens, and inputs are whitened in {directions} directions: most are not seen "
            "there, and whitening does little. Give a longer text",
            stacklevel=2,
        )
    for inputs in _inputs_at_tokens(task, modules, windows, process_group):
        for name, moment in moments.items():
            moment.update(*inputs[name])
    set_whiteners(editor, moments, process_group)


def ordinary_inputs(task: Task, text: Sequence[str]) -> list[Example]:
    """Return the first tokens of a text in windows of one length or, without one, what a decoder writes by itself.

    Raises:
        TrainingError: the text holds no words, or is given to an encoder-decoder.
    """
    if not text:
        return task.ordinary_examples((), ORDINARY_SEED, ORDINARY_INPUTS)
    windows = _text_windows(task, text)
    if not windows:
        raise TrainingError("the text to take second moments over is empty: give one that holds words, or none")
    if task.collate(windows[:1]).decoder_mask is not None:
        raise TrainingError(
            "a text tells nothing of the inputs of an encoder-decoder's decoder, which reads answers: train without "
            "text"
        )
    return windows


def _text_windows(task: Task, text: Sequence[str]) -> list[Example]:
    length = min(TEXT_WINDOW, task.context or TEXT_WINDOW)
    windows: list[Example] = []
    for passage in text:
        ids = task.encode_input(passage) if passage.strip() else []
        # An example needs a target; which one does not matter, since only the inputs of layers are read.
        windows += [Example(tuple(ids[start : start + length]), (0,)) for start in range(0, len(ids), length)]
        if len(windows) * length >= TEXT_TOKENS:
            break
    return windows


def _inputs_at_tokens(
    task: Task, modules: Mapping[str, nn.Module], examples: Sequence[Example], process_group: ProcessGroup
) -> Iterator[dict[str, tuple[Float[Tensor, "row token d_in"], Bool[Tensor, "row token"]]]]:
    """Yield the inputs of layers in each batch of this process, with the mask of tokens that are not padding."""
    batches = [examples[start : start + TEXT_BATCH] for start in range(0, len(examples), TEXT_BATCH)]
    own_batches = batches[process_group.rank :: process_group.count]
    for number, of_batch in enumerate(own_batches):
        report_progress("measuring the inputs of matrices over the text", number, len(own_batches))
        batch = task.collate(of_batch)
        forward = partial(run_as_far_as, task.model, modules.values(), partial(task.outputs, batch))
        inputs = record_inputs(task.model, modules, batch.rows, forward)
        masks = task.token_masks(batch, modules, predicting=False)
        at_tokens = {}
        for name in modules:
            x, mask = inputs[name].x, masks[name].to(inputs[name].x.device)
            # A layer of experts reads each token once for every expert that it goes to.
            at_tokens[name] = x, mask.repeat_interleave(x.shape[1] // mask.shape[1], 1)
        yield at_tokens


def fit_limits(
    editor: GradientTransform, batches: Iterable[Mapping[str, PackedFactors]], process_group: ProcessGroup
) -> None:
    """Set the largest gradient norm of each matrix: a multiple of the geometric mean, which outliers hardly move."""
    assert editor.largest is not None
    logarithms, counts = torch.zeros_like(editor.largest), torch.zeros_like(editor.largest)
    for packed in batches:
        for name, factors in packed.items():
            norms = factors.delta_norms()
            positive = norms[norms > 0]
            logarithms[editor.index(name)] += positive.log().sum()
            counts[editor.index(name)] += len(positive)
    process_group.sum(logarithms, counts)
    usual = (logarithms / counts.clamp(min=1)).exp()
    editor.largest.copy_((editor.config.limit * usual).masked_fill(counts == 0, torch.inf))


def fit_discriminants(
    editor: GradientTransform,
    source: ActivationSource,
    batches: Sequence[tuple[Sequence[FactPrompts], Sequence[Example]]],
    ordinary: Sequence[Example],
    process_group: ProcessGroup,
) -> None:
    """Set each matrix's discriminant from its keys at the last token of the facts' prompts and of their neighbours.

    Args:
        editor: the editor.
        source: the base model.
        batches: facts, with all their prompts followed by all their neighbours, that go through the model together.
        ordinary: ordinary inputs, all of whose tokens count, too; none where the editor's settings weigh them with 0.
        process_group: the processes of the run.
    """
    task = source.task
    modules = editor.edited_modules(task)
    moments = {
        name: Discriminant(d_in, editor.device, editor.operator("whitener", name))
        for name, (d_in, _) in editor.shapes.items()
    }
    for number, (facts, examples) in enumerate(batches):
        report_progress("measuring keys of facts", number, len(batches))
        batch = task.collate(examples)
        forward = partial(run_as_far_as, task.model, modules.values(), partial(task.outputs, batch))
        with source.prefix.resume_from(source.prefix_states(examples)):
            inputs = record_inputs(task.model, modules, batch.rows, forward)
        length = batch.predicting.shape[1]
        fact_of_prompt = torch.tensor([number for number, fact in enumerate(facts) for _ in fact.prompts])
        fact_of_near = torch.tensor([number for number, fact in enumerate(facts) for _ in fact.near], dtype=torch.long)
        for name, moment in moments.items():
            keys, experts = (part.to(editor.device) for part in inputs[name].at_tokens(batch.first_position, length))
            # Experts act on their own keys only: each pair of a fact and an expert counts as a fact.
            count, slots = expert_count(modules[name]) or 1, keys.shape[1]
            prompt_rows = slots * len(fact_of_prompt)
            numbers = torch.cat([fact_of_prompt, fact_of_near]).to(editor.device)[:, None] * count + experts
            numbers, keys = numbers.reshape(-1), keys.flatten(0, 1)
            moment.update(keys[:prompt_rows], numbers[:prompt_rows], keys[prompt_rows:], numbers[prompt_rows:])
    for at_tokens in _inputs_at_tokens(task, modules, ordinary, process_group):
        for name, (x, mask) in at_tokens.items():
            moments[name].update_ordinary(x[mask].to(editor.device))
    for name, moment in moments.items():
        process_group.sum(*moment.totals)
        operator = moment.operator(editor.config.contrast, DISCRIMINANT_RIDGE, editor.config.ordinary)
        editor.set_operator("contrast", name, operator)


def update_statistics(editor: GradientTransform, packed: Mapping[str, PackedFactors]) -> None:
    """Add a batch to the statistics that normalize the networks' inputs."""
    for key, names in editor.groups.items():
        network = editor.network(key)
        for matrix, name in enumerate(names):
            network.u_statistics.update(packed[name].u, matrix)
            network.delta_statistics.update(packed[name].delta, matrix)


def merge_statistics(statistics: RunningStatistics, process_group: ProcessGroup) -> None:
    """Replace every process's statistics by those of all processes together."""
    buffers = (statistics.count, statistics.mean, statistics.squares)
    of_processes = zip(*(process_group.gather(buffer) for buffer in buffers), strict=True)
    # Copies: with one process, gather returns the buffers themselves.
    first, *others = ([part.clone() for part in parts] for parts in of_processes)
    for buffer, part in zip(buffers, first, strict=True):
        buffer.copy_(part)
    for count, mean, squares in others:
        statistics.merge(count, mean, squares)


@torch.no_grad()
def measure_units(editor: GradientTransform, source: ActivationSource, batches: Sequence[Sequence[Example]]) -> None:
    """Set the unit of each α: the size of the layer's output over that of (u·ũ) δ̃, what its own edit adds to it."""
    model = source.task.model
    modules = find_modules(model, editor.shapes)
    captured = [source.gradient_factors(examples) for examples in batches]
    packed = [editor.pack(factors) for factors in captured]
    joined = {
        name: PackedFactors(
            torch.cat([factors[name].u for factors in packed]),
            torch.cat([factors[name].delta for factors in packed]),
            tuple(count for factors in packed for count in factors[name].counts),
        )
        for name in editor.shapes
    }
    for name, (pseudo_u, pseudo_delta) in editor.transform(joined).items():
        inputs = torch.cat([factors[name].u[factors[name].active] for factors in captured])
        module, experts = modules[name], [factors[name].experts for factors in packed]
        arguments = (
            [torch.cat([part.to(inputs.device) for part in experts if part is not None])]
            if expert_count(module)
            else []
        )
        dtype = model.dtype if is_quantized(module) else weight_of(module).dtype
        with unsharded(model, module):
            output = _layer_outputs(module, inputs.to(dtype), *arguments).float()
        response = (inputs.to(editor.device) * editor.whiten(pseudo_u, name)).sum(1).abs().mean()
        size = response * pseudo_delta.square().mean().sqrt()
        unit = output.square().mean().sqrt().to(editor.device) / size
        # A matrix without gradient, or with a zero output, keeps 1.
        editor.unit[editor.index(name)] = unit if unit.isfinite() and unit > 0 else 1.0


def _layer_outputs(
    module: nn.Module, inputs: Float[Tensor, "row d_in"], *experts: Tensor
) -> Float[Tensor, "row d_out"]:
    """Run a layer on rows of inputs."""
    if isinstance(module, nn.Conv2d):  # it takes images only, while rows are patches of several
        return nn.functional.linear(inputs, weight_as_matrix(module, module.weight), module.bias)
    outputs: Tensor = module(inputs, *experts)
    return outputs
