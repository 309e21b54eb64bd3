"""Optimize what a matrix should add at a request's subject, so that the model answers with the target.

The v* of ROME (arXiv 2202.05262, section 3.1) and the z of MEMIT (arXiv 2210.07229, Eq. 16) are the present output of a
module there plus an offset δ, which gradient descent finds; many requests at once, each with its own offset.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from remend.config import Config
from remend.core.capture import record_inputs
from remend.core.low_rank_hooks import frozen, remove_hooks
from remend.editors.locate_then_edit.subject_prompts import PromptContexts
from remend.errors import NonFiniteError
from remend.models.frozen_prefix import FrozenPrefix
from remend.tasks.base import Batch, Task
from remend.tasks.cached_prefix import CachedPrefix


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
        beginnings: the number of random stretches of text behind each of which the prompt is read, beside by itself.
        floor: the least that is added to every eigenvalue of the keys' second moment, as a share of their mean.
    """

    steps: PositiveInt = 25
    learning_rate: PositiveFloat = 0.5
    enough: NonNegativeFloat = 0.05
    kl_weight: NonNegativeFloat = 0.0625
    decay: NonNegativeFloat = 0.002
    largest: PositiveFloat = 2.0
    beginnings: NonNegativeInt = 5
    floor: PositiveFloat = 0.01
    every_prompt: ClassVar[bool] = False  # whether ``enough`` counts for each prompt; else for their mean
    satisfied: ClassVar[float] = 0.0  # the share of ``enough`` below which a prompt's loss is lowered no further

    def optimizer(self, values: Float[Tensor, "request d"]) -> torch.optim.Optimizer:
        """Return what moves the offsets, whose unit is the root mean square of the block's output."""
        return torch.optim.Adam([values], lr=self.learning_rate)


class NormalizedDescent(torch.optim.Optimizer):
    """Gradient descent with momentum whose steps have one length in each row, whatever the size of the gradient.

    Adam moves every coordinate alike, so that after some steps most of an offset is noise; the gradient of an edit has
    few large coordinates.

    Args:
        values: what is moved, row by row.
        length: the length of a step.
        momentum: the share of the direction before that is kept.
    """

    def __init__(self, values: Float[Tensor, "row d"], length: float, momentum: float) -> None:
        super().__init__([values], {"length": length, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move each row."""
        for group in self.param_groups:
            for values in group["params"]:
                state = self.state[values]
                state["direction"] = group["momentum"] * state.get("direction", 0.0) + values.grad
                norms = state["direction"].norm(dim=-1, keepdim=True).clamp(min=1e-30)
                values -= group["length"] * state["direction"] / norms


class SubjectBatch:
    """The prompts of some requests as a batch, with the position of the subject's last token in each row.

    The rows of one request follow each other, and all requests have as many, as changes of several episodes need it:
    first those that have the target and then those that should stay.

    Args:
        task: the model.
        contexts: the prompts of each request.
        prefix: the blocks below the edited ones, which run only once.
        from_subject: whether tokens before the subject's last one run only once, too, where the model can keep them:
            for changes that act there and later.
    """

    def __init__(
        self, task: Task, contexts: Sequence[PromptContexts], prefix: FrozenPrefix, from_subject: bool = False
    ) -> None:
        self.task, self.prefix = task, prefix
        self.requests, self.rows_with_target = len(contexts), len(contexts[0].examples)
        examples = [example for of_request in contexts for example in of_request.all_examples]
        self.rows_per_request = len(examples) // len(contexts)
        self.batch: Batch = task.collate(examples)
        positions = [position for of_request in contexts for position in of_request.all_positions]
        self.positions = torch.tensor(positions, device=self.batch.row.device)
        self.cached: CachedPrefix | None = None
        if from_subject and task.causal:
            with torch.no_grad(), frozen(task.model):
                self.cached = CachedPrefix.of(task, self.batch, self.positions)
        if self.cached is not None:
            self.batch, self.positions = self.cached.batch, torch.zeros_like(self.positions)
        self.length = self.batch.inputs["input_ids"].shape[1]
        with torch.no_grad(), frozen(task.model):
            self.states = prefix.compute_states(self.outputs) if prefix.depth else None

    def outputs(self) -> Float[Tensor, "target answer"]:
        """Run the model; return the outputs that predict the targets."""
        return self.task.outputs(self.batch) if self.cached is None else self.cached.outputs(self.task)

    def outputs_resumed(self) -> Float[Tensor, "target answer"]:
        """Return :meth:`outputs` without running the blocks below the edited ones again."""
        with self.prefix.resume_from(self.states):
            return self.outputs()

    def keys(self, name: str, module: nn.Module) -> Float[Tensor, "request d_in"]:
        """Return k*: a matrix's input at the subject, the mean over the contexts of each request (ROME, Eq. 3).

        The prompt by itself weighs as much as all the others together: it is what must be answered.
        """
        by_request = self.keys_of_rows(name, module).view(self.requests, self.rows_per_request, -1)
        alone, *others = by_request[:, : self.rows_with_target].unbind(1)
        return (alone + sum(others) / len(others)) / 2 if others else alone

    def keys_of_rows(self, name: str, module: nn.Module) -> Float[Tensor, "row d_in"]:
        """Return a layer's input at the subject of each row."""
        inputs = record_inputs(self.task.model, {name: module}, self.batch.rows, self.outputs_resumed)[name]
        return inputs.at_tokens(self.positions, self.length)[0][:, 0]

    def at_subject(self, output: Float[Tensor, "*row_token d"]) -> Float[Tensor, "row d"]:
        """Return a module's output at the subject of each row; some models flatten rows and tokens into one axis."""
        positions = self.positions.to(output.device)
        rows = torch.arange(len(positions), device=output.device)
        return output.reshape(len(positions), self.length, -1)[rows, positions]

    def prompts_alone(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, "request d"]:
        """Return the first row of each request: its prompt by itself."""
        return rows.view(self.requests, self.rows_per_request, -1)[:, 0]


@contextmanager
def add_at_subject(
    module: nn.Module,
    batch: SubjectBatch,
    offsets: Float[Tensor, "request d"] | None,
    responses: Float[Tensor, " row"] | None = None,
) -> Iterator[list[Tensor]]:
    """Within the context, add an offset to a module's output at each subject, times ``responses`` of each row.

    Yields the list to which each forward pass appends the module's output there, before the offset is added.
    """
    recorded: list[Tensor] = []

    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        recorded.append(batch.at_subject(hidden).detach().float())
        if offsets is None:
            return None
        per_row = offsets.to(hidden.device).repeat_interleave(batch.rows_per_request, 0)
        if responses is not None:
            per_row = per_row * responses.to(per_row)[:, None]
        # In one axis of rows and tokens, since some models flatten them and index_add needs one index.
        flat = hidden.reshape(-1, hidden.shape[-1])
        index = torch.arange(len(per_row), device=hidden.device) * batch.length + batch.positions.to(hidden.device)
        # In float32, as the offset is: in half precision it would be rounded before it is added.
        return flat.float().index_add(0, index, per_row).to(hidden.dtype).view(hidden.shape)

    handle = module.register_forward_hook(add)
    try:
        yield recorded
    finally:
        remove_hooks([handle])


def optimize_values(
    batch: SubjectBatch,
    module: nn.Module,
    block: nn.Module,
    config: LocateConfig,
    responses: Float[Tensor, " row"] | None = None,
) -> Float[Tensor, "request d_out"]:
    """Return δ of each request: added to the output of ``module`` at the subject, it makes the model say the target.

    Minimizes, for each request, −log p(target) averaged over its contexts, plus ``kl_weight`` times the divergence of
    what follows the prompts that should stay (ROME, Eq. 4: the subject alone), plus ``decay`` ‖δ‖² / ‖h‖², with h the
    output of the module's ``block`` there. A request that is good enough stays as it is.

    Args:
        batch: the requests.
        module: the module whose output is changed.
        block: its block.
        config: the settings.
        responses: how much of δ is added in each row; by default all of it.

    Raises:
        NonFiniteError: the model's loss is NaN or infinite.
    """
    with torch.inference_mode(False), torch.no_grad(), frozen(batch.task.model):
        with add_at_subject(block, batch, None) as recorded:
            base = batch.outputs_resumed()
        # The size of the prompt by itself counts: all contexts of a request get the same offset.
        stream = batch.prompts_alone(recorded[0])
        stream_norm = stream.norm(dim=1, keepdim=True).clamp(min=1e-6)
        unit = stream_norm / stream.shape[1] ** 0.5
        # In units of the stream's root mean square, so that one learning rate of Adam suits models of any scale.
        values = torch.zeros_like(stream)
        optimizer = config.optimizer(values)
        active = torch.ones(batch.requests, dtype=torch.bool, device=values.device)
        for _ in range(config.steps):
            values.requires_grad_()
            with torch.enable_grad():
                with add_at_subject(module, batch, values * unit, responses):
                    by_prompt, divergence = _losses(batch, batch.outputs_resumed(), base)
                # Prompts that are good enough leave the others, and those that should stay, to decide.
                losses = (by_prompt - config.satisfied * config.enough).clamp(min=0).mean(1)
                decay = config.decay * (values * unit / stream_norm).square().sum(1)
                objective = losses + config.kl_weight * divergence + decay.to(losses.device)
                (values.grad,) = torch.autograd.grad(objective.sum(), [values])
            values.requires_grad_(False)
            if not objective.isfinite().all():
                raise NonFiniteError("the loss of an edit is not finite: the model's weights or activations are not")
            reached = by_prompt.amax(1) if config.every_prompt else by_prompt.mean(1)
            active &= (reached > config.enough).to(active.device)
            if not active.any():
                break
            before = values.clone()
            optimizer.step()
            norms = (values * unit).norm(dim=1, keepdim=True).clamp(min=1e-30)
            values *= (config.largest * stream_norm / norms).clamp(max=1)
            # Momentum moves finished requests on, so their step is undone.
            values[~active] = before[~active]
        offsets: Tensor = values.detach() * unit
        return offsets


def _losses(
    batch: SubjectBatch, outputs: Float[Tensor, "target answer"], base: Float[Tensor, "target answer"]
) -> tuple[Float[Tensor, "request prompt"], Float[Tensor, " request"]]:
    """Return −log p(target) after each prompt, and the mean KL(p_edited ‖ p_base) after those that should stay."""
    targets, per_request, with_target = batch.batch, batch.rows_per_request, batch.rows_with_target
    counted = targets.row % per_request < with_target
    # The rows are numbered anew, as if there were none of subjects alone.
    row = targets.row[counted] // per_request * with_target + targets.row[counted] % per_request
    losses = batch.task.distribution.loss(outputs[counted], targets.target[counted], row, batch.requests * with_target)
    losses = losses.view(-1, with_target)
    if with_target == per_request:
        return losses, torch.zeros_like(losses[:, 0])
    # Distribution.divergence has the arguments the other way round, and only its second one is differentiable.
    edited, unedited = (part[~counted].float().log_softmax(-1) for part in (outputs, base))
    divergences = (edited.exp() * (edited - unedited)).sum(1)
    return losses, divergences.view(batch.requests, -1).mean(1)
