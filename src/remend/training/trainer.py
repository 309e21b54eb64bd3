"""One step of the outer loop (paper, algorithm 1): edits that take, reach neighbours and stay local."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from remend.base import find_modules
from remend.core.branch import branches, frozen
from remend.core.losses import locality_loss, target_loss
from remend.editors.calibration import calibrate
from remend.editors.mend import Mend
from remend.errors import NonFiniteError, TrainingError
from remend.request import EditRequest
from remend.tasks.causal_lm import CausalLM
from remend.training.config import TrainingConfig
from remend.training.episodes import EpisodeBatch, Episodes

STATISTICS_REQUESTS = 2_048
"""Requests over which the networks' input statistics are taken, once, before the first step."""


@dataclass(frozen=True)
class EpisodeLosses:
    """What a batch of episodes gave, one number an episode.

    Attributes:
        edit: −log p_edited(y'|x') of the neighbour, nats a token.
        locality: KL(p_base ‖ p_edited) on the locality example, nats a token.
        taken: whether greedy decoding of the neighbour gives the whole target and the end token.
        kept: whether the edited model's first choice at every locality token is the base model's.
    """

    edit: Float[Tensor, " episode"]
    locality: Float[Tensor, " episode"]
    taken: Bool[Tensor, " episode"]
    kept: Bool[Tensor, " episode"]


class Trainer:
    """One training run, step by step; :func:`remend.train` runs it whole."""

    def __init__(self, task: CausalLM, editor: Mend, requests: Sequence[EditRequest], config: TrainingConfig) -> None:
        self.task = task
        self.editor = editor
        self.config = config
        self.episodes = Episodes(task, requests, config.seed)
        self.step = 0
        self._modules = find_modules(task.model, editor.shapes)
        self._unmoved = dict(editor.named_parameters())
        alpha, networks = [editor.alpha], list(editor.networks.parameters())
        self.optimizer = torch.optim.Adam(
            [
                {"params": networks, "lr": config.learning_rate, "full": config.learning_rate},
                {"params": alpha, "lr": config.alpha_learning_rate, "full": config.alpha_learning_rate},
            ],
            fused=True,
        )

    def calibrate(self) -> None:
        """Take the networks' input statistics over the training set's edit pairs; once, before the first step."""
        calibrate(self.editor, self.task, self.episodes.edits(STATISTICS_REQUESTS, self.config.batch_size))

    def losses(self, batch: EpisodeBatch) -> EpisodeLosses:
        """Edit the model for every episode and look at its neighbour and its locality example, all in one pass."""
        changes = self.editor(self.editor.capture(self.task, batch.edits))
        probes, episodes = batch.probes, batch.edits.rows
        local = probes.row % 2 == 1
        with frozen(self.task.model):
            with torch.no_grad():
                base = self.task.target_logits(probes)[local]
            with branches(self._modules, changes):
                logits = self.task.target_logits(probes)
        own = probes.row // 2
        target, right = probes.target[~local], logits.argmax(-1)
        same = torch.where(local, True, right == probes.target)
        same[local] = right[local] == base.argmax(-1)
        whole = torch.ones(probes.rows, dtype=torch.bool, device=same.device).index_fill(0, probes.row[~same], False)
        return EpisodeLosses(
            edit=target_loss(logits[~local], target, own[~local], episodes),
            locality=locality_loss(base, logits[local], own[local], episodes),
            taken=whole[0::2],
            kept=whole[1::2],
        )

    def train_step(self, share: float = 0.0) -> float:
        """One optimiser step on one batch of episodes; returns the outer loss L = c_e L_e + L_loc (Eq. 4).

        Args:
            share: of the run that is done, for the decay of the learning rates.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; nothing was updated.
            TrainingError: after the first step, a tensor of the editor still gets no gradient.
        """
        batch = self.episodes.batch(self.step, self.config.batch_size)
        losses = self.losses(batch)
        loss = (self.config.edit_weight * losses.edit + losses.locality).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.editor.parameters(), self.config.gradient_clip)
        if not torch.isfinite(norm + loss.detach()):
            self._refuse_non_finite(losses, batch)
        self._check_gradient_flow()
        for group in self.optimizer.param_groups:
            group["lr"] = group["full"] * (1 - share if self.config.decay else 1)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def validate(self, batches: Sequence[EpisodeBatch]) -> dict[str, float]:
        """Means over the episodes of ``batches``: the outer loss, its two parts, edit success and locality.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
        """
        found = []
        for batch in batches:
            found.append(self.losses(batch))
            if not (found[-1].edit + found[-1].locality).isfinite().all():
                self._refuse_non_finite(found[-1], batch)
        means = {
            name: float(torch.cat([getattr(losses, name).float() for losses in found]).mean())
            for name in ("edit", "locality", "taken", "kept")
        }
        return {"loss": self.config.edit_weight * means["edit"] + means["locality"], **means}

    def _check_gradient_flow(self) -> None:
        """Assert that every tensor of the editor is reached by a gradient that is not zero.

        At the very first step the gradients of V and of the scales *are* zero, since U starts at zero; so a tensor may
        be without one at the first step, and no longer at the second.
        """
        if not self._unmoved:
            return
        for name, parameter in list(self._unmoved.items()):
            if parameter.grad is not None and bool(parameter.grad.any()):
                del self._unmoved[name]
        if self._unmoved and self.step > 0:
            raise TrainingError(
                f"no gradient reaches {', '.join(self._unmoved)} of the editor: it would train and learn nothing. "
                "Check that the edited modules lie on the path from the prompt to the loss"
            )

    def _refuse_non_finite(self, losses: EpisodeLosses, batch: EpisodeBatch) -> None:
        bad = ~(losses.edit + losses.locality).isfinite()
        if bool(bad.any()):
            which = ", ".join(batch.ids[i] for i in bad.nonzero().flatten().tolist()[:5])
            raise NonFiniteError(
                f"step {self.step}: the edited model's loss is not finite for {which}; nothing was updated. "
                "Lower the learning rates, or load the model in a wider dtype"
            )
        names = [n for n, p in self.editor.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        raise NonFiniteError(
            f"step {self.step}: the gradient of {', '.join(names)} is not finite for the batch {batch.ids[0]} … "
            f"{batch.ids[-1]}; nothing was updated. Lower the learning rates, or load the model in a wider dtype"
        )
