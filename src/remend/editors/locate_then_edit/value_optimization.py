"""Optimize what a matrix should add at a request's subject, so that the model answers with the target.

The v* of ROME (arXiv 2202.05262, section 3.1) and the z of MEMIT (arXiv 2210.07229, Eq. 16) are the present output of a
module there plus an offset δ, which gradient descent finds; many requests at once, each with its own offset.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

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

NOTABLE_GAIN = 0.05
"""The share by which further steps must lower a loss for their values to be taken: else they only move about."""

LEAST_RESPONSE = 1e-4
"""The share of a value below which what a change adds is left out while the value is searched for."""

KEPT_AT_ONCE, KEPT_TOKENS_AT_ONCE = 16, 96
"""Texts of a request that should stay in one step, and their tokens from the subject on; steps take turns with more."""


@dataclass(frozen=True)
class LocateConfig(Config):
    """Settings that ROME and MEMIT share.

    Sizes are shares of the block's output at the subject, so that one setting suits models of any scale.

    Attributes:
        steps: the most steps on the offsets.
        learning_rate: the size of a step, as a share of the root mean square of the block's output.
        enough: the −log p(target), in nats a token, below which a request is not optimized further.
        kl_weight: weight of KL(p_edited ‖ p_base) of what follows the subject alone: what the model takes it to be.
        decay: weight of the offset's squared size.
        largest: the size to which an offset is limited.
        settle: where texts should stay, the steps after those, shorter and shorter, in which values that are good
            enough remain so and the texts are disturbed less.
        beginnings: the number of random stretches of text behind each of which the prompt is read, beside by itself.
        floor: the least that is added to every eigenvalue of the keys' second moment, as a share of their mean.
    """

    steps: PositiveInt = 25
    learning_rate: PositiveFloat = 0.5
    enough: NonNegativeFloat = 0.05
    kl_weight: NonNegativeFloat = 0.0625
    decay: NonNegativeFloat = 0.002
    largest: PositiveFloat = 2.0
    settle: NonNegativeInt = 0
    beginnings: NonNegativeInt = 5
    floor: PositiveFloat = 0.01
    every_prompt: ClassVar[bool] = False  # whether each prompt must be good enough; else their mean
    satisfied: ClassVar[float] = 0.0  # the share of ``enough`` below which a prompt's loss is lowered no further

    def optimizer(self, values: Float[Tensor, "request d"]) -> torch.optim.Adam | NormalizedDescent:
        """Return what moves the offsets, whose unit is the root mean square of the block's output."""
        return torch.optim.Adam([values], lr=self.learning_rate)

    def further_optimizer(self, values: Float[Tensor, "request d"], steps: int) -> torch.optim.Adam | NormalizedDescent:
        """Return what moves the offsets in further steps, for requests that the first ones did not suffice for."""
        return self.optimizer(values)

    def settling_optimizer(self, values: Float[Tensor, "request d"]) -> torch.optim.Adam | NormalizedDescent:
        """Return what moves the offsets in the last steps, while values that are good enough remain so."""
        return self.optimizer(values)


class NormalizedDescent:
    """Gradient descent with momentum whose steps have one length in each row, whatever the size of the gradient.

    Adam moves every coordinate alike, so that after some steps most of an offset is noise; the gradient of an edit has
    few large coordinates.

    Args:
        values: what is moved, row by row.
        length: the length of a step.
        momentum: the share of the direction before that is kept.
        shrinking_over: the steps over which the length falls to nothing, evenly; by default it stays. Steps of one
            length circle around the best values and never arrive.
    """

    def __init__(
        self, values: Float[Tensor, "row d"], length: float, momentum: float, shrinking_over: int | None = None
    ) -> None:
        self.values, self.length, self.momentum = values, length, momentum
        self._shrinking = length / shrinking_over if shrinking_over else 0.0
        self._direction = torch.zeros_like(values)

    @torch.no_grad()
    def step(self) -> None:
        """Move each row against its gradient, ``values.grad``."""
        assert self.values.grad is not None
        self._direction = self.momentum * self._direction + self.values.grad
        self.values -= self.length * self._direction / self._direction.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        self.length = max(self.length - self._shrinking, 0.0)


class BestValues:
    """The values of each request when it was good enough first, or else those with the least loss on average.

    Of the latter, those with which the model says the target after the prompt by itself come before all others.

    Args:
        values: the values to begin with.
        config: the settings.

    Attributes:
        values: the best values.
        reached: the requests that were good enough.
        averaged: those of them of which the prompts were so on average only.
    """

    def __init__(self, values: Float[Tensor, "request d"], config: LocateConfig) -> None:
        self._config = config
        self._loss = torch.full_like(values[:, 0], torch.inf)
        self.values = values.clone()
        self._said = torch.zeros_like(self._loss, dtype=torch.bool)
        self.reached = torch.zeros_like(self._loss, dtype=torch.bool)
        self.averaged = torch.zeros_like(self.reached)

    def update(
        self,
        values: Float[Tensor, "request d"],
        losses: Float[Tensor, "request prompt"],
        said: Bool[Tensor, " request"] | None = None,
        gain: float = 0.0,
        on_average: bool = False,
    ) -> None:
        """Take over the values of the requests that have not been good enough, where they are the best.

        Args:
            values: the present values.
            losses: −log p(target) after each prompt.
            said: with ``every_prompt``, whether the model says the target of each request after its prompt by itself;
                by default it does. Else the request is not good enough: a mean over many tokens may be small where one
                of them is wrong.
            gain: the share by which the loss must become less for other values to be better.
            on_average: with ``every_prompt``, whether the request's own prompt must be good enough by itself, and the
                others together with it on average: one that is hard to move would cost all of them.
        """
        loss = losses.mean(1).to(self._loss)
        if said is None or not self._config.every_prompt:
            said = torch.ones_like(self._said)
        says = said.to(self._said.device)
        enough = self._good_enough(losses, on_average) & says & ~self.reached
        less = loss < (1 - gain) * self._loss
        better = (enough | (says & ~self._said) | ((says == self._said) & less)) & ~self.reached
        self._said = torch.where(better, says, self._said)
        self.values = torch.where(better[:, None], values, self.values)
        self._loss = torch.where(better, loss, self._loss)
        self.reached |= enough
        if on_average:
            self.averaged |= enough

    def settle(
        self,
        values: Float[Tensor, "request d"],
        losses: Float[Tensor, "request prompt"],
        said: Bool[Tensor, " request"],
    ) -> None:
        """Take over the values of the requests that were good enough, where these are good enough, too."""
        good = torch.where(self.averaged, self._good_enough(losses, True), self._good_enough(losses, False))
        if self._config.every_prompt:
            good = good & said.to(good.device)
        self.values = torch.where((good & self.reached)[:, None], values, self.values)

    def _good_enough(self, losses: Float[Tensor, "request prompt"], on_average: bool) -> Bool[Tensor, " request"]:
        """Tell of each request whether its prompts are good enough."""
        hardest = losses.mean(1)
        if self._config.every_prompt:
            hardest = torch.maximum(losses[:, 0], hardest) if on_average else losses.amax(1)
        return (hardest <= self._config.enough).to(self._loss.device)


@dataclass(frozen=True, eq=False)
class Responses:
    """Where a change answers in a batch of texts, and how much.

    Attributes:
        place: the index of each such token among all tokens of all rows.
        request: the request whose change answers there.
        response: the share of its value that it adds.
    """

    place: Int[Tensor, " place"]
    request: Int[Tensor, " place"]
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
        text = self.text_of_token.flatten()
        at_subjects_only = response.linear or not self.task.causal
        place = self.places if at_subjects_only else (text >= 0).nonzero().flatten()
        request = text[place] // self.rows_per_request
        x = inputs.x.view(len(self.text_of_token), self.length, -1, inputs.x.shape[-1])[:, :, 0].flatten(0, 1)
        found = response((x[place.to(x.device)] * u.to(x.device)[request.to(x.device)]).sum(-1)).to(place.device)
        acts = found.abs() >= LEAST_RESPONSE
        return Responses(place[acts], request[acts], found[acts])

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
    offsets: Float[Tensor, "request d"] | None,
    responses: Responses | None = None,
) -> Iterator[list[Tensor]]:
    """Within the context, add an offset to a module's output at each subject, or as much of it where ``responses`` say.

    Yields the list to which each forward pass appends the module's output there, before the offset is added.
    """
    recorded: list[Tensor] = []

    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        recorded.append(batch.at_subject(hidden).detach().float())
        if offsets is None:
            return None
        if responses is None:
            index, added = batch.places, offsets.to(hidden.device).repeat_interleave(batch.rows_per_request, 0)
        else:
            index, added = responses.place, offsets.to(hidden.device)[responses.request.to(hidden.device)]
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
    batch: SubjectBatch,
    kept: Sequence[SubjectBatch],
    module: nn.Module,
    block: nn.Module,
    config: LocateConfig,
    responses: Sequence[Responses] | None = None,
    directions: Sequence[Callable[[Tensor], Tensor]] | None = None,
    further: int = 0,
) -> Float[Tensor, "request d_out"]:
    """Return δ of each request: added to the output of ``module`` at the subject, it makes the model say the target.

    Minimizes, for each request, −log p(target) averaged over its prompts, plus ``kl_weight`` times the divergence of
    what follows the texts that should stay (ROME, Eq. 4: the subject alone), plus ``decay`` ‖δ‖² / ‖h‖², with h the
    output of the module's ``block`` there.

    Args:
        batch: the prompts of the requests, with targets.
        kept: the texts that should stay, in batches that take turns from step to step.
        module: the module whose output is changed.
        block: its block.
        config: the settings.
        responses: where δ is added in the prompts, and in each batch of texts that should stay, and how much of it; by
            default all of it at the subject.
        directions: what gives the direction of a step from a gradient, for each request; by default itself.
        further: the most steps after those of ``config``, along the gradient itself, while a request is not good
            enough.

    Raises:
        NonFiniteError: the model's loss is NaN or infinite.
    """
    with torch.inference_mode(False), torch.no_grad(), frozen(batch.task.model), bfloat16_products(batch.task) as task:
        batch, kept = batch.on(task), [part.on(task) for part in kept]
        with add_at_subject(block, batch, None) as recorded:
            run_as_far_as(batch.task.model, [block], batch.outputs_resumed)
        unedited = [part.outputs_resumed() for part in kept]
        everywhere: Sequence[Responses | None] = responses or [None] * (1 + len(kept))
        of_prompts, *of_kept = everywhere
        # The size of the prompt by itself counts: all prompts of a request get the same offset.
        stream = batch.prompts_alone(recorded[0])
        stream_norm = stream.norm(dim=1, keepdim=True).clamp(min=1e-6)
        unit = stream_norm / stream.shape[1] ** 0.5
        # In units of the stream's root mean square, so that one learning rate of Adam suits models of any scale.
        values = torch.zeros_like(stream)
        optimizer = config.optimizer(values)
        best = BestValues(values, config)

        def losses(step: int) -> tuple[Float[Tensor, "request prompt"], Bool[Tensor, " request"]]:
            """Compute the gradient of the present values; return the loss of each prompt, and who says its target."""
            values.requires_grad_()
            with torch.enable_grad():
                offsets = values * unit
                with add_at_subject(module, batch, offsets, of_prompts):
                    outputs = batch.outputs_resumed()
                by_prompt = batch.losses(outputs)
                # Prompts that are good enough leave the others, and those that should stay, to decide.
                objective = (by_prompt - config.satisfied * config.enough).clamp(min=0).mean(1)
                objective = objective + config.decay * (offsets / stream_norm).square().sum(1).to(objective.device)
                if kept:
                    turn = step % len(kept)
                    with add_at_subject(module, kept[turn], offsets, of_kept[turn]):
                        objective = objective + config.kl_weight * _divergences(kept[turn], unedited[turn])
                (values.grad,) = torch.autograd.grad(objective.sum(), [values])
            values.requires_grad_(False)
            if not objective.isfinite().all():
                raise NonFiniteError("the loss of an edit is not finite: the model's weights or activations are not")
            return by_prompt.detach(), batch.says_targets(outputs.detach())

        def move(optimizer: Any, natural: bool) -> None:
            """Move the values against their gradient."""
            if natural and directions is not None:
                assert values.grad is not None
                values.grad = torch.stack([turn(row) for turn, row in zip(directions, values.grad, strict=True)])
            optimizer.step()
            norms = (values * unit).norm(dim=1, keepdim=True).clamp(min=1e-30)
            values.mul_((config.largest * stream_norm / norms).clamp(max=1))

        for step in range(config.steps + further):
            report_progress("fitting what an edit adds", step, config.steps + further)
            hard = step >= config.steps
            if step == config.steps:
                optimizer = config.further_optimizer(values, further)
            by_prompt, said = losses(step)
            best.update(values, by_prompt, said, NOTABLE_GAIN if hard else 0.0, on_average=hard)
            if best.reached.all():
                break
            move(optimizer, natural=not hard)
        if kept and config.settle and best.reached.any():
            values.copy_(best.values)
            optimizer = config.settling_optimizer(values)
            for step in range(config.settle):
                best.settle(values, *losses(step))
                move(optimizer, natural=True)
            best.settle(values, *losses(config.settle))
        found: Tensor = best.values * unit
        return found


def _divergences(kept: SubjectBatch, base: Float[Tensor, "target answer"]) -> Float[Tensor, " request"]:
    """Return KL(p_edited ‖ p_base) of each request: the mean of its texts, each the mean over its targets, weighed."""
    # Distribution.divergence has the arguments the other way round, and only its second one is differentiable.
    edited, unedited = (outputs.float().log_softmax(-1) for outputs in (kept.outputs_resumed(), base))
    by_target = (edited.exp() * (edited - unedited)).sum(1)
    text = kept.text_of_target.to(by_target.device)
    texts = by_target.new_zeros(kept.requests * kept.rows_per_request).index_add(0, text, by_target)
    return kept.weights.to(texts) * (texts / text.bincount()).view(kept.requests, -1).mean(1)
