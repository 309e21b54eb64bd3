"""Optimize what a matrix should add at a request's subject, so that the model answers with the target.

The v* of ROME (arXiv 2202.05262, section 3.1) and the z of MEMIT (arXiv 2210.07229, Eq. 16) are the present output of a
module there plus an offset δ, which gradient descent finds; many requests at once, each with its own offset.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from remend.config import Config
from remend.core.capture import LayerInput, record_inputs
from remend.core.low_rank_hooks import frozen, remove_hooks
from remend.core.response import Response
from remend.editors.locate_then_edit.subject_prompts import Located, PromptContexts
from remend.errors import NonFiniteError
from remend.models.frozen_prefix import FrozenPrefix, run_as_far_as
from remend.progress import report_progress
from remend.tasks.base import Batch, Task
from remend.tasks.bfloat16_products import bfloat16_products
from remend.tasks.cached_prefix import CachedPrefix

LEAST_RESPONSE = 1e-5
"""The share of a value below which what a change adds is left out while the value is searched for."""

KEPT_AT_ONCE, KEPT_TOKENS_AT_ONCE = 16, 96
"""Texts of a request that should stay in one step, and their tokens from the subject on; steps take turns with more."""


@dataclass(frozen=True)
class LocateConfig(Config):
    """Settings that all editors of this kind share.

    Sizes are shares of the block's output at the subject, so that one setting suits models of any scale.

    Attributes:
        steps: the most steps on the offsets.
        enough: the −log p(target), in nats a token, below which a request is not optimized further.
        kl_weight: weight of KL(p_edited ‖ p_base) of what follows the texts that should stay.
        largest: the size to which an offset is limited.
        beginnings: the number of random stretches of text behind each of which the prompt is read, beside by itself.
        floor: the least that is added to every eigenvalue of the keys' second moment, as a share of their mean.
    """

    steps: PositiveInt = 25
    enough: NonNegativeFloat = 0.05
    kl_weight: NonNegativeFloat = 0.0625
    largest: PositiveFloat = 2.0
    beginnings: NonNegativeInt = 5
    floor: PositiveFloat = 0.01


@dataclass(frozen=True)
class DescentConfig(LocateConfig):
    """Settings that ROME and MEMIT share.

    Attributes:
        learning_rate: the size of a step, as a share of the root mean square of the block's output.
        decay: weight of the offset's squared size.
    """

    learning_rate: PositiveFloat = 0.5
    decay: NonNegativeFloat = 0.002


@dataclass(frozen=True, eq=False)
class Responses:
    """Where a change answers in a batch of texts, and how much.

    Attributes:
        place: the index of each such token among all tokens of all rows.
        text: the text that it is of.
        response: the share of its value that it adds.
    """

    place: Int[Tensor, " place"]
    text: Int[Tensor, " place"]
    response: Float[Tensor, " place"]


class SubjectBatch:
    """Texts about the subjects of some requests as a batch, with the position of the subject's last token in each row.

    The rows of one request follow each other, and all requests have as many, as changes of several episodes need it.

    Args:
        task: the model.
        located: the texts of each request.
        prefix: the blocks below the edited ones, which run only once.
        from_subject: whether tokens before the subject's last one run only once, too, where the model can keep them:
            for changes that act there and later.
        openings: the number of tokens of each target that are the model's own words before what it should say; by
            default none.

    Attributes:
        weights: of texts that should stay, how much those of each request count; by default 1.
    """

    def __init__(
        self,
        task: Task,
        located: Sequence[Sequence[Located]],
        prefix: FrozenPrefix,
        from_subject: bool = False,
        openings: Sequence[int] = (),
        weights: Sequence[float] = (),
    ) -> None:
        self.task, self.prefix = task, prefix
        self.requests, self.rows_per_request = len(located), len(located[0])
        self.batch: Batch = task.collate([example for of_request in located for example, _ in of_request])
        device = self.batch.row.device
        self.positions = torch.tensor([position for texts in located for _, position in texts], device=device)
        self.row, self.text_of_target = torch.arange(len(self.positions), device=device), self.batch.row
        self.openings = torch.tensor(openings or [0] * len(self.positions), device=device)
        self.weights = torch.tensor(weights or [1.0] * self.requests, device=device)
        self.cached: CachedPrefix | None = None
        if from_subject and task.causal:
            with torch.no_grad(), frozen(task.model):
                self.cached = CachedPrefix.of(task, self.batch, self.positions)
        self.text_of_token = self.row[:, None].where(self.batch.mask.to(device), -1)
        if self.cached is not None:
            self.batch, self.row, self.positions = self.cached.batch, self.cached.row, self.cached.position
            self.text_of_token = self.cached.text_of_token
        self.length = self.batch.inputs["input_ids"].shape[1]
        with torch.no_grad(), frozen(task.model):
            self.states = prefix.compute_states(self.outputs) if prefix.depth else None

    def on(self, task: Task) -> SubjectBatch:
        """Return the same texts for the same model with another dtype of its products."""
        batch = copy.copy(self)
        batch.task = task
        return batch

    def outputs(self) -> Float[Tensor, "target answer"]:
        """Run the model; return the outputs that predict the targets."""
        return self.task.outputs(self.batch) if self.cached is None else self.cached.outputs(self.task)

    def outputs_resumed(self) -> Float[Tensor, "target answer"]:
        """Return :meth:`outputs` without running the blocks below the edited ones again."""
        with self.prefix.resume_from(self.states):
            return self.outputs()

    def keys(self, name: str, module: nn.Module, until: nn.Module | None = None) -> Float[Tensor, "request d_in"]:
        """Return k*: a matrix's input at the subject, the mean over the contexts of each request (ROME, Eq. 3).

        The prompt by itself weighs as much as all the others together: it is what must be answered.
        """
        by_request = self.at_subjects(self.inputs(name, module, until)).view(self.requests, self.rows_per_request, -1)
        alone, *others = by_request.unbind(1)
        return (alone + sum(others) / len(others)) / 2 if others else alone

    def inputs(self, name: str, module: nn.Module, until: nn.Module | None = None) -> LayerInput:
        """Return a layer's input; what comes after ``until``, by default after the layer, does not run."""
        run = partial(run_as_far_as, self.task.model, [until or module], self.outputs_resumed)
        return record_inputs(self.task.model, {name: module}, self.batch.rows, run)[name]

    def at_subjects(self, inputs: LayerInput) -> Float[Tensor, "text d_in"]:
        """Return a layer's input at the subject of each text."""
        return inputs.at_tokens(self.positions, self.length, self.row)[0][:, 0]

    def responses(self, inputs: LayerInput, u: Float[Tensor, "request d_in"], response: Response) -> Responses:
        """Return where the change of each request answers in its own texts.

        In a decoder, hidden units do at the subject and where a target names it again; an encoder reads no target. A
        linear change answers everywhere, also before the subject, where tokens are not read again: of it, only the
        subject counts.

        Args:
            inputs: the input of the layer that the changes read (:meth:`inputs`).
            u: the direction that each request's change reads.
            response: how much it answers.
        """
        text_of_token = self.text_of_token.flatten()
        at_subjects_only = not self.task.causal
        place = self.places if at_subjects_only else (text_of_token >= 0).nonzero().flatten()
        text = text_of_token[place]
        request = text // self.rows_per_request
        x = inputs.x.view(len(self.text_of_token), self.length, -1, inputs.x.shape[-1])[:, :, 0].flatten(0, 1)
        found = response((x[place.to(x.device)] * u.to(x.device)[request.to(x.device)]).sum(-1)).to(place.device)
        acts = found.abs() >= LEAST_RESPONSE
        return Responses(place[acts], text[acts], found[acts])

    def at_subject(self, output: Float[Tensor, "*row_token d"]) -> Float[Tensor, "row d"]:
        """Return a module's output at the subject of each row; some models flatten rows and tokens into one axis."""
        return output.reshape(-1, output.shape[-1])[self.places.to(output.device)]

    @property
    def places(self) -> Int[Tensor, " text"]:
        """The index of each text's token among all tokens of all rows."""
        return self.row * self.length + self.positions

    def losses(self, outputs: Float[Tensor, "target answer"]) -> Float[Tensor, "request prompt"]:
        """Return −log p(target) after each prompt, averaged over its tokens, of the model's outputs.

        Of a target with an opening, the mean over the opening and that over the rest are added: else a long sentence
        would hide the few tokens that count.
        """
        text, texts = self.text_of_target, len(self.openings)
        with_opening = self.openings.nonzero().flatten()
        number = torch.zeros_like(self.openings).index_put((with_opening,), torch.arange(len(with_opening)).to(text))
        first = text.bincount(minlength=texts).cumsum(0).roll(1)
        first[0] = 0
        opens = torch.arange(len(text), device=text.device) - first[text] < self.openings[text]
        row = torch.where(opens, texts + number[text], text)
        losses = self.task.distribution.loss(outputs, self.batch.target, row, texts + len(with_opening))
        losses = losses[:texts].index_add(0, with_opening.to(losses.device), losses[texts:])
        return losses.view(self.requests, -1)

    def says_targets(self, outputs: Float[Tensor, "target answer"]) -> Bool[Tensor, " request"]:
        """Tell for each request whether all tokens of its target are the most probable after its prompt by itself."""
        correct = self.task.distribution.correct(outputs, self.batch.target)
        wrong = self.text_of_target.to(correct.device)[~correct].bincount(minlength=len(self.openings))
        return wrong.view(self.requests, -1)[:, 0] == 0

    def prompts_alone(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, "request d"]:
        """Return the first row of each request: its prompt by itself."""
        return rows.view(self.requests, self.rows_per_request, -1)[:, 0]


def subject_batches(
    task: Task, contexts: Sequence[PromptContexts], prefix: FrozenPrefix, from_subject: bool = False
) -> tuple[SubjectBatch, list[SubjectBatch]]:
    """Return the prompts of some requests as a batch, and the texts that should stay in batches of a few of each."""
    openings = [length for of_request in contexts for length in of_request.openings]
    batch = SubjectBatch(task, [of_request.examples for of_request in contexts], prefix, from_subject, openings)
    count = len(contexts[0].kept)
    tokens = max(sum(len(example) - position for example, position in c.kept) for c in contexts)
    parts = min(count, max(math.ceil(count / KEPT_AT_ONCE), math.ceil(tokens / KEPT_TOKENS_AT_ONCE)))
    # The first part has the texts 0, parts, 2 parts …, since the surest come first; all parts have as many.
    kept = [[c.kept[part::parts][: count // parts] for c in contexts] for part in range(parts)]
    weights = [of_request.kept_weight for of_request in contexts]
    return batch, [SubjectBatch(task, part, prefix, from_subject, weights=weights) for part in kept]


@contextmanager
def add_at_subject(
    module: nn.Module,
    batch: SubjectBatch,
    offsets: Float[Tensor, "text_or_request d"] | None,
    responses: Responses | None = None,
) -> Iterator[list[Tensor]]:
    """Within the context, add an offset to a module's output at each subject, or as much of it where ``responses`` say.

    There is one offset for each text, or for all texts of each request. Yields the list to which each forward pass
    appends the module's output at each subject, before the offset is added.
    """
    recorded: list[Tensor] = []
    if offsets is not None and len(offsets) != len(batch.places):
        offsets = offsets.repeat_interleave(batch.rows_per_request, 0)

    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        recorded.append(batch.at_subject(hidden).detach().float())
        if offsets is None:
            return None
        if responses is None:
            index, added = batch.places, offsets.to(hidden.device)
        else:
            index, added = responses.place, offsets.to(hidden.device)[responses.text.to(hidden.device)]
            added = added * responses.response.to(added)[:, None]
        # In one axis of rows and tokens, since some models flatten them and index_add needs one index.
        flat = hidden.reshape(-1, hidden.shape[-1])
        # In float32, as the offset is: in half precision it would be rounded before it is added.
        return flat.float().index_add(0, index.to(hidden.device), added).to(hidden.dtype).view(hidden.shape)

    handle = module.register_forward_hook(add)
    try:
        yield recorded
    finally:
        remove_hooks([handle])


def optimize_values(
    batch: SubjectBatch, kept: Sequence[SubjectBatch], module: nn.Module, block: nn.Module, config: DescentConfig
) -> Float[Tensor, "request d_out"]:
    """Return δ of each request: added to the output of ``module`` at the subject, it makes the model say the target.

    Minimizes, for each request, −log p(target) averaged over its prompts, plus ``kl_weight`` times the divergence of
    what follows the subject alone (ROME, Eq. 4), plus ``decay`` ‖δ‖² / ‖h‖², with h the output of the module's
    ``block`` there. The values are those with which a request was good enough first, or else those with the least loss.

    Args:
        batch: the prompts of the requests, with targets.
        kept: the texts that should stay, in batches that take turns from step to step.
        module: the module whose output is changed.
        block: its block.
        config: the settings.

    Raises:
        NonFiniteError: the model's loss is NaN or infinite.
    """
    with torch.inference_mode(False), torch.no_grad(), frozen(batch.task.model), bfloat16_products(batch.task) as task:
        batch, kept = batch.on(task), [part.on(task) for part in kept]
        # The size of the prompt by itself counts: all prompts of a request get the same offset.
        stream = block_outputs(batch, block)
        unedited = [part.outputs_resumed() for part in kept]
        stream_norm = stream.norm(dim=1, keepdim=True).clamp(min=1e-6)
        unit = stream_norm / stream.shape[1] ** 0.5
        # In units of the stream's root mean square, so that one learning rate of Adam suits models of any scale.
        values = torch.zeros_like(stream)
        optimizer = torch.optim.Adam([values], lr=config.learning_rate)
        best, least = values.clone(), torch.full_like(values[:, 0], torch.inf)
        reached = torch.zeros_like(least, dtype=torch.bool)
        for step in range(config.steps):
            report_progress("fitting what an edit adds", step, config.steps)
            values.requires_grad_()
            with torch.enable_grad():
                offsets = values * unit
                with add_at_subject(module, batch, offsets):
                    losses = batch.losses(batch.outputs_resumed()).mean(1)
                objective = losses + config.decay * (offsets / stream_norm).square().sum(1).to(losses.device)
                if kept:
                    turn = step % len(kept)
                    with add_at_subject(module, kept[turn], offsets):
                        objective = objective + config.kl_weight * _divergences(kept[turn], unedited[turn])
                (values.grad,) = torch.autograd.grad(objective.sum(), [values])
            values.requires_grad_(False)
            if not objective.isfinite().all():
                raise NonFiniteError("the loss of an edit is not finite: the model's weights or activations are not")
            loss = losses.detach().to(least)
            better = (loss < least) & ~reached
            best, least = torch.where(better[:, None], values, best), torch.where(better, loss, least)
            reached |= loss <= config.enough
            if reached.all():
                break
            optimizer.step()
            norms = (values * unit).norm(dim=1, keepdim=True).clamp(min=1e-30)
            values.mul_((config.largest * stream_norm / norms).clamp(max=1))
        found: Tensor = best * unit
        return found


def block_outputs(batch: SubjectBatch, block: nn.Module) -> Float[Tensor, "request d"]:
    """Return the output of a block at the subject of each request's prompt by itself."""
    with add_at_subject(block, batch, None) as recorded:
        run_as_far_as(batch.task.model, [block], batch.outputs_resumed)
    return batch.prompts_alone(recorded[0])


def divergences_of_texts(
    kept: SubjectBatch, outputs: Float[Tensor, "target answer"], base: Float[Tensor, "target answer"]
) -> Float[Tensor, " text"]:
    """Return KL(p_edited ‖ p_base) of each text, the mean over its targets, of edited and unedited outputs."""
    # Distribution.divergence has the arguments the other way round, and only its second one is differentiable.
    edited, unedited = (each.float().log_softmax(-1) for each in (outputs, base))
    by_target = (edited.exp() * (edited - unedited)).sum(1)
    text = kept.text_of_target.to(by_target.device)
    texts = by_target.new_zeros(kept.requests * kept.rows_per_request).index_add(0, text, by_target)
    return texts / text.bincount()


def _divergences(kept: SubjectBatch, base: Float[Tensor, "target answer"]) -> Float[Tensor, " request"]:
    """Return KL(p_edited ‖ p_base) of each request: the mean of its texts, weighed."""
    by_request = divergences_of_texts(kept, kept.outputs_resumed(), base).view(kept.requests, -1).mean(1)
    return kept.weights.to(by_request) * by_request
