"""Solve for what should be added at a request's subject, from the gradients of all its prompts (Gauss–Newton).

Each prompt wants its log-odds of the target to be so large, and each text that should stay wants a divergence of 0.
With the gradient of every text by itself, which one backward pass gives, a step solves the linear system for all of
them at once: the prompt that is hardest to move gets the most, those that are answered already are held, and what
should stay counts in every direction in which it has been seen to move. A step along the mean gradient swings from one
prompt to the next instead, and takes three times as many (benchmarks/results/fit_real.md).

A prompt's residual is in log-odds, which are nearly linear in what is added; −log p is not. A divergence is quadratic
near the unedited model, and its square root nearly linear. The method is that of Levenberg and Marquardt, with a
longest step for a trust region.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from remend.core.low_rank_hooks import frozen
from remend.editors.locate_then_edit.value_optimization import (
    LocateConfig,
    Responses,
    SubjectBatch,
    add_at_subject,
    block_outputs,
    divergences_of_texts,
)
from remend.errors import NonFiniteError
from remend.progress import report_progress
from remend.tasks.bfloat16_products import bfloat16_products

AIM = 0.34
"""What a prompt's −log p(target) should become, as a share of ``enough``: the room is for phrasings not given."""

CAP = 2.0
"""The most that a prompt's log-odds should grow in a step."""

RIDGE = 0.01
"""The ridge of a step's system, as a share of what the prompts' log-odds are on average in its metric."""

OCTAVES, HALVINGS = 48, 40
"""Doublings of that ridge within which that of a step that is not too long is looked for, and the halvings of these."""

LEAST_LOSS, LEAST_DIVERGENCE = 1e-4, 1e-6
"""Nats below which a prompt's loss is taken for this, and below which a divergence has no direction."""

Metric = Callable[[Tensor], Tensor]
"""Turns gradients, one a row, into the directions in which they are followed."""


@dataclass(frozen=True)
class SolverConfig(LocateConfig):
    """Settings of the solver.

    Attributes:
        steps: the most steps until all prompts are answered.
        longest: the longest step, as a share of the size of the block's output.
        settle: steps after those, in which values with which the prompts stay answered are taken.
        kl_weight: what the square of √(2 KL) counts of a text that should stay, against that of a prompt's log-odds.
    """

    steps: PositiveInt = 40
    enough: PositiveFloat = 0.35
    longest: PositiveFloat = 0.5
    settle: NonNegativeInt = 5


@dataclass(eq=False)
class _Search:
    """The search for one request's value.

    Attributes:
        config: the settings.
        metric: what turns gradients into directions.
        value: the present value, in units of the root mean square of the block's output.
        best: the best one so far.
        reached: whether its prompts are answered.
        done: whether the search is over.
        kept: of each batch of texts that should stay, √(2 KL) of each text that has moved, its gradient, its weight,
            and the value at which they were computed.
    """

    config: SolverConfig
    metric: Metric
    value: Float[Tensor, " d"]
    best: Float[Tensor, " d"] = field(init=False)
    reached: bool = False
    done: bool = False
    kept: dict[int, tuple[Tensor, Tensor, float, Tensor]] = field(default_factory=dict)
    _rank: tuple[bool, bool, float] = (True, True, float("inf"))
    _unedited: float = float("inf")
    _left: int = 0

    def __post_init__(self) -> None:
        self.best, self._left = self.value, self.config.settle

    def judge(self, step: int, losses: Float[Tensor, " prompt"], said: bool) -> None:
        """Take over the present value where it is better, and decide whether the search goes on.

        Good enough are values with which the model says the target after the prompt by itself, and with which every
        prompt is; after half of the steps, the prompt by itself and all of them on average: one that is hard to move
        would cost all others.

        Args:
            step: the number of steps before.
            losses: −log p(target) after each prompt.
            said: whether the model says the target after the prompt by itself: a mean over many tokens may be small
                where one of them is wrong.
        """
        hardest = losses.max() if step < self.config.steps // 2 else torch.maximum(losses[0], losses.mean())
        good = said and float(hardest) <= self.config.enough
        if step == 0:
            self._unedited = float(losses[0])
        # A value with which the request's own prompt is further from its target than before is worse than none.
        rank = (not said, float(losses[0]) > self._unedited, float(losses.mean()))
        if good or (not self.reached and rank < self._rank):
            self.best, self._rank = self.value, rank
        if self.reached or good:
            self.reached, self.done = True, self._left <= 0
            self._left -= 1
        else:
            self.done = step >= self.config.steps

    def keep(
        self, turn: int, divergences: Float[Tensor, " text"], gradients: Float[Tensor, "text d"], weight: float
    ) -> None:
        """Note how far the texts of one batch have moved, and along which directions."""
        moved = divergences > LEAST_DIVERGENCE
        roots = (2 * divergences[moved]).sqrt()
        self.kept[turn] = (roots, gradients[moved] / roots[:, None], weight, self.value)

    def move(self, losses: Float[Tensor, " prompt"], gradients: Float[Tensor, "prompt d"]) -> None:
        """Take a step, given the losses of the prompts and their gradients."""
        losses = losses.clamp(min=LEAST_LOSS)
        missing = _log_odds(torch.full_like(losses, AIM * self.config.enough)) - _log_odds(losses)
        # The log-odds' own gradient: dz = −dL / (1 − e^−L).
        rows, wanted = [gradients / losses.neg().expm1()[:, None]], [missing.clamp(min=0, max=CAP)]
        for roots, directions, weight, at in self.kept.values():
            predicted = (roots + directions @ (self.value - at)).clamp(min=0)
            rows.append(weight**0.5 * directions)
            wanted.append(-(weight**0.5) * predicted)
        stacked = torch.cat(rows)
        turned = self.metric(stacked)
        gram = (stacked @ turned.mT).double()
        least = RIDGE * gram.diagonal()[: len(losses)].mean().clamp(min=torch.finfo(torch.float32).eps)
        eigenvalues, basis = torch.linalg.eigh((gram + gram.mT) / 2)
        along = torch.cat(wanted).double() @ basis

        def step_with(ridge: Tensor) -> Float[Tensor, " d"]:
            coefficients = basis @ (along / (eigenvalues.clamp(min=0) + ridge))
            found: Tensor = coefficients.to(turned) @ turned
            return found

        # With the least ridge with which it is not too long: a step that is cut short would have the direction of the
        # whole one, in which what should stay is held as firmly as it must be far away. By bisection rather than from a
        # list of ridges, so that rounding does not decide between two steps.
        most = self.config.longest * len(self.value) ** 0.5
        step = step_with(least)
        if step.norm() > most:
            low, high = least, least * 2.0**OCTAVES
            for _ in range(HALVINGS):
                middle = (low * high).sqrt()
                low, high = (middle, high) if step_with(middle).norm() > most else (low, middle)
            step = step_with(high)
        value = self.value + _no_longer_than(step, most)
        self.value = _no_longer_than(value, self.config.largest * len(self.value) ** 0.5)


def solve_values(
    batch: SubjectBatch,
    kept: Sequence[SubjectBatch],
    module: nn.Module,
    block: nn.Module,
    config: SolverConfig,
    responses: Sequence[Responses],
    metrics: Sequence[Metric],
) -> Float[Tensor, "request d_out"]:
    """Return δ of each request: added to the output of ``module`` at the subject, it makes the model say the target.

    Args:
        batch: the prompts of the requests, with targets.
        kept: the texts that should stay, in batches that take turns from step to step.
        module: the module whose output is changed.
        block: its block.
        config: the settings.
        responses: where δ is added in the prompts, and in each batch of texts that should stay, and how much of it.
        metrics: what turns gradients into the directions of steps, for each request.

    Raises:
        NonFiniteError: the model's loss is NaN or infinite.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        frozen(batch.task.model),
        bfloat16_products(batch.task) as task,
        plain_attention(batch.task.device),
    ):
        batch, kept = batch.on(task), [part.on(task) for part in kept]
        stream = block_outputs(batch, block)
        unit = stream.norm(dim=1, keepdim=True).clamp(min=1e-6) / stream.shape[1] ** 0.5
        unedited = [part.outputs_resumed() for part in kept]
        of_prompts, *of_kept = responses
        searches = [_Search(config, metric, torch.zeros_like(row)) for metric, row in zip(metrics, stream, strict=True)]

        def gradients(
            part: SubjectBatch, where: Responses, measure: Callable[[SubjectBatch, Tensor], Tensor]
        ) -> tuple[Float[Tensor, "request text"], Float[Tensor, "request text d"], Tensor]:
            """Return a number of each text, its gradient in the request's value, and the model's outputs."""
            values = torch.stack([search.value for search in searches]).repeat_interleave(part.rows_per_request, 0)
            values.requires_grad_()
            with torch.enable_grad():
                offsets = values * unit.repeat_interleave(part.rows_per_request, 0)
                with add_at_subject(module, part, offsets, where):
                    outputs = part.outputs_resumed()
                numbers = measure(part, outputs)
                (found,) = torch.autograd.grad(numbers.sum(), [values])
            if not numbers.isfinite().all():
                raise NonFiniteError("the loss of an edit is not finite: the model's weights or activations are not")
            by_request = (part.requests, part.rows_per_request)
            return numbers.detach().float().view(by_request).to(found), found.unflatten(0, by_request), outputs.detach()

        for step in range(config.steps + config.settle + 1):
            report_progress("fitting what an edit adds", step, config.steps + config.settle + 1)
            losses, found, outputs = gradients(batch, of_prompts, _losses)
            says = batch.says_targets(outputs).tolist()
            for search, of_request, said in zip(searches, losses, says, strict=True):
                if not search.done:
                    search.judge(step, of_request, said)
            if all(search.done for search in searches):
                break
            if kept and step:  # nothing has moved before the first step
                turn = step % len(kept)
                weights = (config.kl_weight * kept[turn].weights).tolist()
                moved, along, _ = gradients(
                    kept[turn], of_kept[turn], partial(divergences_of_texts, base=unedited[turn])
                )
                for search, far, directions, weight in zip(searches, moved, along, weights, strict=True):
                    search.keep(turn, far, directions, weight)
            for search, of_request, along_it in zip(searches, losses, found, strict=True):
                if not search.done:
                    search.move(of_request, along_it)
        best: Tensor = torch.stack([search.best for search in searches]) * unit
        return best


def plain_attention(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which attention on a processor is products and a softmax.

    The fused kernel saves memory, which texts of a few tokens do not need, and its backward pass takes several times as
    long there.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _losses(batch: SubjectBatch, outputs: Float[Tensor, "target answer"]) -> Float[Tensor, " text"]:
    losses: Tensor = batch.losses(outputs).flatten()
    return losses


def _log_odds(losses: Float[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
    """Return log(p / (1 − p)) of losses −log p."""
    odds: Tensor = -losses - (-losses.neg().expm1()).log()
    return odds


def _no_longer_than(vector: Float[Tensor, " d"], most: float) -> Float[Tensor, " d"]:
    shorter: Tensor = vector * (most / vector.norm().clamp(min=1e-30)).clamp(max=1)
    return shorter
