"""Variants of training and editing that ``benchmarks/frontier.py`` compares with those of the package.

None of them improved the frontier clearly, so they are not in the package, except ``wide``: it uses for the testbeds'
models what the package uses only for layers with much wider inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from remend.core.losses import row_mean
from remend.core.low_rank import LowRank, concatenate
from remend.core.low_rank_hooks import changes_applied
from remend.core.whitening import SecondMoment
from remend.editors.mend.config import MendConfig
from remend.editors.mend.editor import Mend
from remend.editors.strength_search import UneditedPass, scale_to_strength
from remend.fingerprint import ModelFingerprint, find_modules
from remend.request import EditRequest
from remend.tasks.base import in_batches
from remend.tasks.causal_lm import CausalLM
from remend.training import Trainer
from remend.training.episodes import EpisodeLosses


class FocalLocality(Trainer):
    """Weights each locality example by its loss over the mean loss, so that disturbed examples count more."""

    def _outer_loss(self, losses: EpisodeLosses) -> Tensor:
        weight = losses.locality.detach() / losses.locality.detach().mean().clamp(min=1e-6)
        return super()._outer_loss(replace(losses, locality=weight * losses.locality))


class LocalityMargin(Trainer):
    """Uses a hinge loss for locality: the base model's first choice stays ahead of all others by a margin in logits."""

    MARGIN = 2.0

    def locality_loss(self, base: Tensor, edited: Tensor, episode: Tensor, episodes: int) -> Tensor:
        """Compute the hinge loss of each episode."""
        first_choice = base.argmax(-1, keepdim=True)
        best_other = edited.scatter(1, first_choice, -torch.inf).max(1).values
        return row_mean(
            (self.MARGIN + best_other - edited.gather(1, first_choice)[:, 0]).clamp(min=0), episode, episodes
        )


class ConstrainedLocality(Trainer):
    """Maximizes success subject to a bound on the share of unchanged locality answers, with a learned multiplier."""

    BOUND, RATE = 0.97, 0.3

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.multiplier = 1.0
        self.unchanged: list[float] = []

    def edited_losses(self, batch: Any, changes: Mapping[str, LowRank], backward: bool = False) -> EpisodeLosses:
        """Compute the losses as :meth:`Trainer.edited_losses`, and record which answers are unchanged."""
        losses = super().edited_losses(batch, changes, backward)
        if backward:
            self.unchanged += losses.unchanged.float().tolist()
        return losses

    def train_step(self, share: float = 0.0) -> float:
        """Train one step as :meth:`Trainer.train_step`, then update the multiplier's logarithm."""
        loss = super().train_step(share)
        violation = self.BOUND - sum(self.unchanged) / len(self.unchanged)
        self.multiplier *= float(torch.tensor(self.RATE * violation).exp())
        self.unchanged.clear()
        return loss

    def _outer_loss(self, losses: EpisodeLosses) -> Tensor:
        return super()._outer_loss(replace(losses, locality=self.multiplier * losses.locality))


class NormPenalty(Trainer):
    """Adds the squared norm of each change to the loss, in units of its mean at the first step."""

    WEIGHT = 0.1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.units: dict[str, Tensor] = {}

    def edited_losses(self, batch: Any, changes: Mapping[str, LowRank], backward: bool = False) -> EpisodeLosses:
        """Compute the losses as :meth:`Trainer.edited_losses`, and add the gradient of the penalty."""
        losses = super().edited_losses(batch, changes, backward)
        if backward:
            penalty = torch.zeros(())
            for name, change in changes.items():
                squares = ((change.u @ change.u.mT) * (change.delta @ change.delta.mT)).sum((-2, -1))
                unit = self.units.setdefault(name, squares.detach().mean())
                penalty = penalty + (squares / unit).sum()
            (self.WEIGHT / len(changes) / self.config.batch_size * penalty).backward()
        return losses


class WhitenedDelta(Mend):
    """Whitens δ by its second moment before the network, and transforms δ̃ back after it."""

    RIDGE = 1e-2

    def fit_to(self, task: CausalLM, requests: Sequence[EditRequest]) -> None:
        """Compute the second moment of δ over some requests."""
        moments = {name: SecondMoment(d_out, self.device) for name, (_, d_out) in self.shapes.items()}
        examples = [task.encode(request.prompt, request.target) for request in requests[:1024]]
        for batch in in_batches(examples):
            for name, factors in self.capture(task, task.collate(batch)).items():
                moments[name].update(factors.delta, factors.active)
        self.delta_whiteners = {name: moment.whitener(self.RIDGE).inner for name, moment in moments.items()}

    def whiten_and_clip(self, packed: Any) -> Any:
        """Whiten and clip as :meth:`Mend.whiten_and_clip`, and whiten δ."""
        prepared = super().whiten_and_clip(packed)
        return {name: replace(row, delta=row.delta @ self.delta_whiteners[name]) for name, row in prepared.items()}

    def transform(self, rows: Any, factored_gradients: Any = None) -> Any:
        """Transform rows as :meth:`Mend.transform`, with δ̃ in the layer's coordinates."""
        transformed = super().transform(rows, factored_gradients)
        return {name: (u, delta @ self.delta_whiteners[name]) for name, (u, delta) in transformed.items()}


class FewDirections(Mend):
    """Whitens in a limited number of directions, as the package does for very wide inputs."""

    DIRECTIONS = 256

    def __init__(self, config: MendConfig, base: ModelFingerprint, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(config, base, shapes, dict.fromkeys(shapes, self.DIRECTIONS))


class SubjectToken(Mend):
    """Edits at the subject's last token only."""

    def fit_to(self, task: CausalLM, requests: Sequence[EditRequest]) -> None:
        """Find the subject's last token in every prompt."""
        self.subject_tokens: dict[tuple[int, ...], int] = getattr(self, "subject_tokens", {})
        for request in requests:
            ids = task.encode_input(request.prompt)
            end = request.prompt.rfind(request.subject or "") + len(request.subject or "")
            self.subject_tokens[tuple(ids)] = len(task.encode_input(request.prompt[:end])) - 1

    def capture(self, task: CausalLM, batch: Any, loss: Any = None) -> Any:
        """Capture gradient factors as :meth:`Mend.capture`, of that token only."""
        predicting = torch.zeros_like(batch.mask)
        first = batch.first_position.tolist()
        for row, ids in enumerate(batch.inputs["input_ids"].tolist()):
            predicting[row, self.subject_tokens[tuple(ids[: first[row] + 1])]] = True
        with patch("remend.tasks.base.Batch.predicting", predicting):
            return super().capture(task, batch, loss)

    def _changes(self, task: CausalLM, requests: Sequence[EditRequest], inputs: Any = None) -> Any:
        self.fit_to(task, requests)
        return super()._changes(task, requests, inputs)


class SeveralSteps(Mend):
    """Edits in three steps of a third each, with the gradient of the model as the previous steps have edited it.

    It is for single requests: inputs for solving for several edits together are not collected.
    """

    STEPS = 3

    @torch.no_grad()
    def _changes(self, task: CausalLM, requests: Sequence[EditRequest], inputs: Any = None) -> Any:
        changes_of_requests: list[dict[str, LowRank]] = []
        modules = find_modules(task.model, self.shapes)
        for chunk in in_batches([task.encode(request.prompt, request.target) for request in requests]):
            batch = task.collate(chunk)
            unedited = UneditedPass(task, batch, self.shapes)
            changes = self._one_step(self.pack(self.capture(task, batch, unedited.loss)))
            for _ in range(self.STEPS - 1):
                with changes_applied(modules, changes):
                    step = self._one_step(self.pack(self.capture(task, batch)))
                changes = {name: concatenate([change, step[name]]) for name, change in changes.items()}
            if self.config.settle:
                changes = scale_to_strength(
                    unedited, changes, self.config.settle, {name: [0] * len(chunk) for name in changes}
                )
            for index in range(len(chunk)):
                changes_of_requests.append(
                    {
                        name: LowRank(change.u[index], change.delta[index], change.response)
                        for name, change in changes.items()
                    }
                )
        return changes_of_requests

    def _one_step(self, rows: Any) -> dict[str, LowRank]:
        return {name: change.scaled(1 / self.STEPS) for name, change in self(rows).items()}


@dataclass(frozen=True)
class Variant:
    """The trainer and the editor that replace those of the package."""

    trainer: Callable[..., Trainer] = Trainer
    editor: type[Mend] = Mend


VARIANTS = {
    "focal": Variant(trainer=FocalLocality),
    "margin": Variant(trainer=LocalityMargin),
    "bounded": Variant(trainer=ConstrainedLocality),
    "small": Variant(trainer=NormPenalty),
    "whitened-delta": Variant(editor=WhitenedDelta),
    "wide": Variant(editor=FewDirections),
    "subject-token": Variant(editor=SubjectToken),
    "several-steps": Variant(editor=SeveralSteps),
}


def train(task: CausalLM, editor: Mend, requests: Sequence[EditRequest], config: Any, variant: Variant) -> None:
    """Train an editor as a variant says, for all steps and without validation."""
    # Without choosing the best state: learning rates end at zero, so the last state is as good.
    if hasattr(editor, "fit_to"):
        editor.fit_to(task, requests)
    trainer = variant.trainer(task, editor, requests, config)
    trainer.calibrate()
    for step in range(config.max_steps):
        trainer.train_step(step / config.max_steps)
