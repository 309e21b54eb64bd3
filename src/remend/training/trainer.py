"""One step of the outer loop (paper, algorithm 1): edits that take, reach neighbours and stay local."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import NoReturn, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.factored_gradients import FactoredGradients
from remend.core.hooks import changes_applied, frozen
from remend.core.losses import locality_loss, target_loss
from remend.core.low_rank import LowRank
from remend.editors import Trainable
from remend.editors.mend.editor import Mend
from remend.errors import ConfigError, ModelError, NonFiniteError
from remend.fingerprint import find_modules, hash_model
from remend.models.frozen_prefix import FrozenPrefix
from remend.models.fsdp import is_sharded
from remend.request import EditRequest
from remend.tasks.base import EDIT_BATCH_SIZE, Example, Task
from remend.training import calibration
from remend.training.activation_cache import ActivationCache
from remend.training.config import Resources, TrainingConfig
from remend.training.distributed import ProcessGroup
from remend.training.episodes import EpisodeBatch, EpisodeLosses, Episodes
from remend.training.memory import fitting_micro_batch
from remend.training.negative_mining import mine
from remend.training.optimizer import EditorOptimizer
from remend.training.tensor_store import TensorStore

STATISTICS_REQUESTS = 2_048
"""Requests over which the networks' input statistics are taken, once, before the first step."""

T = TypeVar("T")


class Trainer:
    """One training run, step by step; :func:`remend.train` runs it whole.

    A step has three parts. What the base model computes is constant: it is looked up, or computed once
    (:class:`ActivationCache`). The editor turns a whole batch of gradient factors into changes. The edited model then
    runs on ``micro_batch`` episodes at a time; the backward pass of each part ends at the changes, and what reaches
    them goes back through the editor in one pass. No gradient of the base model's weights is ever held, nor more than
    one of the editor's (:class:`EditorOptimizer`).

    Attributes:
        editor: what is trained.
        step: how many steps were made.
        optimiser: moves the editor's parameters.
        micro_batch: episodes that go through the edited model together; halved when a GPU's memory does not suffice.
    """

    editor: Mend

    def __init__(
        self,
        task: Task,
        editor: Trainable,
        requests: Sequence[EditRequest],
        config: TrainingConfig,
        resources: Resources | None = None,
        workers: ProcessGroup | None = None,
        text: Sequence[str] = (),
    ) -> None:
        self.task = task
        self.editor = editor  # type: ignore[assignment]  # of others, DirectTrainer does what MEND's does here
        self.config = config
        self.text = text
        self.resources = resources or Resources()
        self.workers = workers or ProcessGroup(editor.device)
        if config.batch_size < self.workers.count:
            raise ConfigError(
                f"a batch of {config.batch_size} episodes cannot be shared by {self.workers.count} processes"
            )
        # Each pass gathers a sharded model's weights, so all processes must make the same passes: each measures all.
        sharded = is_sharded(task.model)
        self.measuring = self.workers.alone() if sharded else self.workers
        if sharded and config.batch_size % self.workers.count:
            raise ConfigError(
                f"{self.workers.count} processes that share one model must have equal parts of each batch, which "
                f"{config.batch_size} episodes have not: start a number of processes that divides it, or do without "
                "--use_fsdp"
            )
        self.episodes = Episodes(task, requests, config.seed, config.near, config.in_batch)
        self.step = 0
        self.prefix = FrozenPrefix(task.model, editor.shapes)
        self._verify_prefix()
        self.constants = self._constants()
        self.optimiser = EditorOptimizer(editor, config, self.workers, self.resources.product_dtype)
        self._modules = find_modules(task.model, editor.shapes)
        self.micro_batch = self.resources.micro_batch or fitting_micro_batch(self)
        if sharded:  # as many passes in every process
            self.micro_batch = -int(self.workers.largest(-self.micro_batch))

    # -- before the first step -----------------------------------------------------------------------------------

    def calibrate(self) -> None:
        """Find negatives and fit the editor to the training set's edit pairs; once, before the first step."""
        self._mine()
        facts, batches = self.episodes.facts(), self._calibration_batches()
        calibration.calibrate(self.editor, self.constants, batches, self.measuring, facts, self.text)

    def warm(self, held_out: Sequence[EpisodeBatch]) -> None:
        """Look up again whatever a run of ``step`` steps had looked up, in the same order.

        The stores then hold the same bits: rounding depends on which examples were computed together.
        """
        self._mine()
        self._warm_calibration()
        for batch in held_out[self.measuring.rank :: self.measuring.count]:
            self._look_up(batch)
        prepared = self.episodes.episodes
        edits, pairs = [episode.edit for episode in prepared], self.episodes.pairs()
        locality = [pair for episode in prepared for pair in episode.locality]
        locality += [pair for episode in prepared for pair in episode.near] if self.config.near else []
        locality += edits if self.config.in_batch else []
        an_epoch = max(1, len(prepared) // self.config.batch_size)
        for step in range(self.step):
            if step % an_epoch == 0 and self.constants.settled(edits, locality, pairs):
                break
            for turn in range(self.config.hardest):
                self._look_up(self._own(step, turn))

    def _warm_calibration(self) -> None:
        facts, batches = self.episodes.facts(), self._calibration_batches()
        calibration.warm(self.editor, self.constants, batches, self.measuring, facts, self.text)

    def _mine(self) -> None:
        if self.config.near or self.editor.config.contrast:
            mine(self.episodes, self.constants)

    def _calibration_batches(self) -> list[list[Example]]:
        return self.episodes.edits(STATISTICS_REQUESTS, min(self.config.batch_size, EDIT_BATCH_SIZE))

    def _look_up(self, batch: EpisodeBatch) -> None:
        self._look_up_edits(batch)
        for places in self._parts(batch):
            part = batch[places]
            states = self.constants.prefix_states(part.probes())
            self.constants.base_logits(part.locality, None if states is None else states[1::2])

    def _look_up_edits(self, batch: EpisodeBatch) -> None:
        self.constants.rows(batch.edits)

    def _verify_prefix(self) -> None:
        """Check on two examples that the model can be entered again at the cut; if not, say so and do without."""
        batch = self.task.collate(self.episodes.pairs()[:2])
        with frozen(self.task.model):
            right = self.prefix.verify(
                lambda: self.task.outputs(batch), lambda: self.task.output_states(batch), self.task.outputs_from_states
            )
        if not right:
            warnings.warn(
                f"{type(self.task.model).__name__} hands more than hidden states from block to block, so the blocks "
                "below the edited ones run anew in every pass: training is slower, not different",
                stacklevel=3,
            )

    def _constants(self) -> ActivationCache:
        """The stores, within their budget: hidden states first, gradient factors with what is left."""
        budget = int(self.resources.cache * 1e9)
        folder = self.resources.cache_folder
        if folder is not None:  # states of another model, cut or precision are other states
            own = f"{hash_model(self.task.model)[:32]}-{self.prefix.depth}-{self.resources.precision}"
            folder = folder / own
        states = TensorStore(budget, folder)
        factors = TensorStore(max(0, budget - self.state_bytes()))
        passes = (lambda own: int(self.workers.largest(own))) if is_sharded(self.task.model) else int
        return ActivationCache(self.task, self.editor, self.prefix, states, factors, passes)

    def state_bytes(self) -> int:
        """What the hidden states of all examples would take: those entering the cut, and the last ones at targets."""
        cut = self.prefix.depth > 0
        # Where examples have no length, their states count as one each (state_bytes is then that of an example).
        lengths = [self.task.states_length(pair, self.prefix.stack) if cut else 0 for pair in self.episodes.pairs()]
        tokens = sum(1 if length is None else length for length in lengths) + sum(
            len(pair.target) for pair in self.episodes.pairs()
        )
        return tokens * self.task.state_bytes

    # -- one step ------------------------------------------------------------------------------------------------

    def train_step(self, share: float = 0.0) -> float:
        """One optimiser step on one batch of episodes; returns the outer loss L = c_e L_e + L_loc (Eq. 4).

        Args:
            share: of the run that is done, for the decay of the learning rates.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; nothing was updated.
            TrainingError: after the first step, a tensor of the editor still gets no gradient.
        """
        batch = self._fitting(lambda: self._hardest(self.step))
        found = self._fitting(lambda: self._gradients(batch))
        loss = torch.stack([self._outer_loss(losses).detach().sum() for losses in found]).sum()
        gradients = self.optimiser.gather(loss)
        if not (gradients.bound + loss).isfinite():
            self._refuse_non_finite(found, batch)
        self.optimiser.check_flow(gradients, first=self.step == 0)
        self.optimiser.step(gradients, share)
        self.step += 1
        return float(loss)

    @torch.no_grad()
    def validate(self, batches: Sequence[EpisodeBatch]) -> dict[str, float]:
        """Means over the episodes of ``batches``: the outer loss, its two parts, edit success and locality.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
        """
        sums = torch.zeros(5, dtype=torch.float64)
        for batch in batches[self.measuring.rank :: self.measuring.count]:
            losses = self.losses(batch)
            if not losses.finite().all():
                self._refuse_non_finite([losses], batch)
            columns = (losses.edit, losses.locality, losses.taken, losses.kept, torch.ones_like(losses.edit))
            sums += torch.stack([column.cpu().double().sum() for column in columns])
        sums = sums.to(self.workers.device, torch.float32 if self.workers.device.type == "mps" else torch.float64)
        self.measuring.sum(sums)
        means = dict(zip(("edit", "locality", "taken", "kept"), (sums[:4] / sums[4]).tolist(), strict=True))
        return {"loss": self.config.edit_weight * means["edit"] + means["locality"], **means}

    @torch.no_grad()
    def losses(self, batch: EpisodeBatch) -> EpisodeLosses:
        """Edit the model for every episode, and look at its neighbour and its locality example."""
        changes = self._changes(batch)
        found = []
        for places in self._parts(batch):
            found.append(
                self.edited_losses(batch[places], {name: change.select(places) for name, change in changes.items()})
            )
        return EpisodeLosses(
            *(torch.cat([getattr(part, field.name) for part in found]) for field in fields(EpisodeLosses))
        )

    def _changes(self, batch: EpisodeBatch, ledger: FactoredGradients | None = None) -> dict[str, LowRank]:
        """What each episode's edit changes; differentiable in the editor's parameters."""
        found: dict[str, LowRank] = self.editor(self.constants.rows(batch.edits), ledger)
        return found

    def _own(self, step: int, turn: int = 0) -> EpisodeBatch:
        """This process's share of a step's batch."""
        return self.episodes.batch(step, self.config.batch_size, turn)[self.workers.rank :: self.workers.count]

    def _hardest(self, step: int) -> EpisodeBatch:
        """The step's batch with, of several locality examples for each episode, the one that its edit disturbs most."""
        batches = [self._own(step, turn) for turn in range(self.config.hardest)]
        if len(batches) == 1:
            return batches[0]
        worst = torch.stack([self.losses(batch).locality for batch in batches]).nan_to_num(torch.inf).argmax(0).tolist()
        return replace(batches[0], locality=tuple(batches[turn].locality[e] for e, turn in enumerate(worst)))

    def _parts(self, batch: EpisodeBatch) -> list[slice]:
        """The episodes of a batch that go through the edited model together."""
        self.constants.micro_batch = 2 * self.micro_batch  # an episode has two examples there
        return [slice(start, start + self.micro_batch) for start in range(0, len(batch), self.micro_batch)]

    def _gradients(self, batch: EpisodeBatch) -> list[EpisodeLosses]:
        """Backward from the outer loss: into the ledger, and into the small parameters' ``.grad``."""
        self.optimiser.clear()
        found = []
        parts = self._parts(batch)
        changes = self._changes(batch, self.optimiser.ledger)
        factors = [factor for change in changes.values() for factor in (change.u, change.delta)]
        reached = [torch.zeros_like(factor) for factor in factors]
        for places in parts:
            leaves = [factor.detach()[places].requires_grad_() for factor in factors]
            for leaf, gradient in zip(leaves, reached, strict=True):
                leaf.grad = gradient[places]  # where the backward pass adds
            some = {
                name: replace(change.detach().select(places), u=leaves[2 * i], delta=leaves[2 * i + 1])
                for i, (name, change) in enumerate(changes.items())
            }
            found.append(self.edited_losses(batch[places], some, backward=True))
        learning = [place for place, factor in enumerate(factors) if factor.requires_grad]
        torch.autograd.backward([factors[i] for i in learning], [reached[i] for i in learning])
        return found

    def edited_losses(
        self, batch: EpisodeBatch, changes: Mapping[str, LowRank], backward: bool = False
    ) -> EpisodeLosses:
        """Look at each episode's neighbour and locality example in its own edited model, all in one pass."""
        pairs, episodes = batch.probes(), len(batch)
        probes = self.task.collate(pairs).ordered(range(0, 2 * episodes, 2), range(1, 2 * episodes, 2))
        local = sum(len(pair.target) for pair in batch.locality)
        edits, own = len(probes.target) - local, probes.row // 2
        states = self.constants.prefix_states(pairs)
        base = self.constants.base_logits(batch.locality, None if states is None else states[1::2])
        with contextlib.ExitStack() as edited:
            edited.enter_context(frozen(self.task.model))
            edited.enter_context(self.prefix.resume_from(states))
            edited.enter_context(changes_applied(self._modules, changes))
            if backward and self.resources.recompute:
                edited.enter_context(self.prefix.checkpoint_activations())
            near, far = self.task.outputs(probes).split((edits, local))
            wrong = near.argmax(-1) != probes.target[:edits], far.argmax(-1) != base.argmax(-1)
            whole = torch.ones(probes.rows, dtype=torch.bool, device=near.device)
            whole[probes.row[torch.cat(wrong)]] = False
            losses = EpisodeLosses(
                edit=target_loss(near, probes.target[:edits], own[:edits], episodes),
                locality=locality_loss(base, far, own[edits:], episodes),
                taken=whole[0::2],
                kept=whole[1::2],
            )
            if backward:  # here, where what is computed again for the backward pass is edited too
                self._outer_loss(losses).sum().backward()
        return losses

    def _outer_loss(self, losses: EpisodeLosses) -> Float[Tensor, " episode"]:
        """What each episode adds to the batch's mean loss (Eq. 4)."""
        return (self.config.edit_weight * losses.edit + losses.locality) / self.config.batch_size

    def _fitting(self, action: Callable[[], T]) -> T:
        """What ``action`` returns; when it needs more memory than a GPU has, with smaller micro-batches."""
        while True:
            try:
                return action()
            except torch.OutOfMemoryError:
                if is_sharded(self.task.model):
                    raise ModelError(
                        f"{self.micro_batch} episodes at a time do not fit the device's memory, and processes that "
                        "share one model cannot each choose fewer: give a smaller micro_batch"
                    ) from None
                if self.micro_batch == 1:
                    raise ModelError(
                        "one episode alone does not fit the device's memory: load the model in bfloat16 or quantised, "
                        "edit fewer matrices, choose a smaller rank, shorten the texts, or recompute activations"
                    ) from None
            self.micro_batch = (self.micro_batch + 1) // 2
            torch.cuda.empty_cache()
            warnings.warn(f"out of memory: going on with {self.micro_batch} episodes at a time", stacklevel=2)

    def _refuse_non_finite(self, found: Sequence[EpisodeLosses], batch: EpisodeBatch) -> NoReturn:
        bad = torch.cat([~losses.finite() for losses in found])
        advice = "nothing was updated. Lower the learning rates, or load the model in a wider dtype"
        if bool(bad.any()):
            which = ", ".join(batch.ids[i] for i in bad.nonzero().flatten().tolist()[:5])
            raise NonFiniteError(f"step {self.step}: the edited model's loss is not finite for {which}; {advice}")
        names = ", ".join(self.optimiser.broken()) or "another process"
        raise NonFiniteError(
            f"step {self.step}: the gradient of {names} is not finite for the batch {batch.ids[0]} … {batch.ids[-1]}; "
            f"{advice}"
        )
