"""Other ways to train or to edit that ``benchmarks/frontier.py`` measures beside what remend does.

None of them moved the frontier clearly, which is why they are here and not in the package: each line of the table
names one. ``wide`` is what the package does with inputs much wider than the worlds' models have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from remend.core.hooks import changes_applied
from remend.core.losses import row_mean
from remend.core.low_rank import LowRank, concatenate
from remend.core.whitening import SecondMoment
from remend.editors.mend.config import MendConfig
from remend.editors.mend.editor import Mend
from remend.editors.strength_search import UneditedPass, settled
from remend.fingerprint import ModelFingerprint, find_modules
from remend.request import EditRequest
from remend.tasks.base import in_batches
from remend.tasks.causal_lm import CausalLM
from remend.training.trainer import EpisodeLosses, Trainer


class Focal(Trainer):
    """Locality examples count the more the more they were disturbed: each loss weighted by itself over the mean."""

    def _outer_loss(self, losses: EpisodeLosses) -> Tensor:
        weight = losses.locality.detach() / losses.locality.detach().mean().clamp(min=1e-6)
        return super()._outer_loss(replace(losses, locality=weight * losses.locality))


class Margin(Trainer):
    """A hinge on the locality example's own answer, in place of the divergence: ahead of its best rival by 2 logits."""

    AHEAD = 2.0

    def edited_losses(self, batch: Any, changes: Mapping[str, LowRank], backward: bool = False) -> EpisodeLosses:
        """As :meth:`Trainer.edited_losses`, with the other loss."""
        with patch("remend.training.trainer.locality_loss", self._hinge):
            return super().edited_losses(batch, changes, backward)

    def _hinge(self, base: Tensor, edited: Tensor, row: Tensor, rows: int) -> Tensor:
        own = base.argmax(-1, keepdim=True)
        rival = edited.scatter(1, own, -torch.inf).max(1).values
        return row_mean((self.AHEAD + rival - edited.gather(1, own)[:, 0]).clamp(min=0), row, rows)


class Bounded(Trainer):
    """Success subject to a bound on the share of locality answers that are kept, with a learned multiplier."""

    BOUND, RATE = 0.97, 0.3

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.multiplier = 1.0
        self.kept: list[float] = []

    def edited_losses(self, batch: Any, changes: Mapping[str, LowRank], backward: bool = False) -> EpisodeLosses:
        """As :meth:`Trainer.edited_losses`; notes what was kept."""
        losses = super().edited_losses(batch, changes, backward)
        if backward:
            self.kept += losses.kept.float().tolist()
        return losses

    def train_step(self, share: float = 0.0) -> float:
        """As :meth:`Trainer.train_step`; then one step of the multiplier, in logarithms."""
        loss = super().train_step(share)
        missing = self.BOUND - sum(self.kept) / len(self.kept)
        self.multiplier *= float(torch.tensor(self.RATE * missing).exp())
        self.kept.clear()
        return loss

    def _outer_loss(self, losses: EpisodeLosses) -> Tensor:
        return super()._outer_loss(replace(losses, locality=self.multiplier * losses.locality))


class Small(Trainer):
    """The squared norm of each change, in units of its mean at the first step, added to the loss."""

    WEIGHT = 0.1

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.unit: dict[str, Tensor] = {}

    def edited_losses(self, batch: Any, changes: Mapping[str, LowRank], backward: bool = False) -> EpisodeLosses:
        """As :meth:`Trainer.edited_losses`; the penalty's gradient is added where the loss's goes."""
        losses = super().edited_losses(batch, changes, backward)
        if backward:
            penalty = torch.zeros(())
            for name, change in changes.items():
                squares = ((change.u @ change.u.mT) * (change.delta @ change.delta.mT)).sum((-2, -1))
                unit = self.unit.setdefault(name, squares.detach().mean())
                penalty = penalty + (squares / unit).sum()
            (self.WEIGHT / len(changes) / self.config.batch_size * penalty).backward()
        return losses


class WhitenedDelta(Mend):
    """δ in coordinates whitened by its second moment too, and δ̃ back from there."""

    RIDGE = 1e-2

    def prepare(self, task: CausalLM, requests: Sequence[EditRequest]) -> None:
        """Take the second moment over some requests."""
        moments = {name: SecondMoment(d_out, self.device) for name, (_, d_out) in self.shapes.items()}
        for some in in_batches([task.encode(r.prompt, r.target) for r in requests[:1024]]):
            for name, factors in self.capture(task, task.collate(some)).items():
                moments[name].update(factors.delta, factors.active)
        self.delta_whiteners = {name: moment.whitener(self.RIDGE).inner for name, moment in moments.items()}

    def prepared(self, rows: Any) -> Any:
        """As :meth:`Mend.prepared`, with δ whitened too."""
        own = super().prepared(rows)
        return {name: replace(row, delta=row.delta @ self.delta_whiteners[name]) for name, row in own.items()}

    def transform(self, rows: Any, ledger: Any = None) -> Any:
        """As :meth:`Mend.transform`, with δ̃ in the layer's coordinates."""
        found = super().transform(rows, ledger)
        return {name: (u, delta @ self.delta_whiteners[name]) for name, (u, delta) in found.items()}


class Wide(Mend):
    """Whitening and contrast as for inputs so wide that they are told apart in some of their directions only."""

    DIRECTIONS = 256

    def __init__(self, config: MendConfig, base: ModelFingerprint, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(config, base, shapes, dict.fromkeys(shapes, self.DIRECTIONS))


class SubjectToken(Mend):
    """Edits at the subject's last token alone."""

    def prepare(self, task: CausalLM, requests: Sequence[EditRequest]) -> None:
        """Find that token in every prompt."""
        self.places: dict[tuple[int, ...], int] = getattr(self, "places", {})
        for request in requests:
            ids = task.encode_input(request.prompt)
            end = request.prompt.rfind(request.subject or "") + len(request.subject or "")
            self.places[tuple(ids)] = len(task.encode_input(request.prompt[:end])) - 1

    def capture(self, task: CausalLM, batch: Any, loss: Any = None) -> Any:
        """As :meth:`Mend.capture`, from that token alone."""
        predicting = torch.zeros_like(batch.mask)
        first = batch.first_position.tolist()
        for row, ids in enumerate(batch.inputs["input_ids"].tolist()):
            predicting[row, self.places[tuple(ids[: first[row] + 1])]] = True
        with patch("remend.tasks.base.Batch.predicting", predicting):
            return super().capture(task, batch, loss)

    def _changes(self, task: CausalLM, requests: Sequence[EditRequest], inputs: Any = None) -> Any:
        self.prepare(task, requests)
        return super()._changes(task, requests, inputs)


class SeveralSteps(Mend):
    """An edit in three steps, each of a third, from the gradient of the model that the steps before have edited.

    Of single requests; the inputs with which several would be solved for together are not collected.
    """

    STEPS = 3

    @torch.no_grad()
    def _changes(self, task: CausalLM, requests: Sequence[EditRequest], inputs: Any = None) -> Any:
        found: list[dict[str, LowRank]] = []
        modules = find_modules(task.model, self.shapes)
        for chunk in in_batches([task.encode(request.prompt, request.target) for request in requests]):
            batch = task.collate(chunk)
            unedited = UneditedPass(task, batch, self.shapes)
            changes = self._part(self.rows(self.capture(task, batch, unedited.loss)))
            for _ in range(self.STEPS - 1):
                with changes_applied(modules, changes):
                    more = self._part(self.rows(self.capture(task, batch)))
                changes = {name: concatenate([change, more[name]]) for name, change in changes.items()}
            if self.config.settle:
                changes = settled(unedited, changes, self.config.settle, {name: [0] * len(chunk) for name in changes})
            for e in range(len(chunk)):
                found.append({name: LowRank(own.u[e], own.delta[e], own.gate) for name, own in changes.items()})
        return found

    def _part(self, rows: Any) -> dict[str, LowRank]:
        return {name: change.scaled(1 / self.STEPS) for name, change in self(rows).items()}


@dataclass(frozen=True)
class Variant:
    """What takes the place of remend's own trainer and editor."""

    trainer: Callable[..., Trainer] = Trainer
    editor: type[Mend] = Mend


VARIANTS = {
    "focal": Variant(trainer=Focal),
    "margin": Variant(trainer=Margin),
    "bounded": Variant(trainer=Bounded),
    "small": Variant(trainer=Small),
    "whitened-delta": Variant(editor=WhitenedDelta),
    "wide": Variant(editor=Wide),
    "subject-token": Variant(editor=SubjectToken),
    "several-steps": Variant(editor=SeveralSteps),
}


def train(task: CausalLM, editor: Mend, requests: Sequence[EditRequest], config: Any, variant: Variant) -> None:
    """All steps of a run; with learning rates that end at zero, its last state is as good as its best."""
    if hasattr(editor, "prepare"):
        editor.prepare(task, requests)
    trainer = variant.trainer(task, editor, requests, config)
    trainer.calibrate()
    for step in range(config.max_steps):
        trainer.train_step(step / config.max_steps)
