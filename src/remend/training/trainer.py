"""``Trainer``: the steps of the outer loop (paper, algorithm 1): the losses of edits, their gradients, an update.

What is around the steps is elsewhere: time and checkpoints in ``training_run``, the run as a whole in ``loop``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn, TypeVar

import torch

from remend.core.distributed import ProcessGroup
from remend.core.low_rank import LowRank
from remend.editors.trainable import CalibrationData, TrainableEditor
from remend.errors import ConfigError, ModelError, NonFiniteError
from remend.models.frozen_prefix import FrozenPrefix
from remend.models.fsdp import is_sharded
from remend.request import EditRequest
from remend.tasks.base import EDIT_BATCH_SIZE, Task
from remend.training.activation_cache import open_activation_cache, verify_prefix
from remend.training.config import Resources, TrainingConfig
from remend.training.editor_optimizer import EditorOptimizer
from remend.training.episode_runner import EpisodeRunner
from remend.training.episodes import EpisodeBatch, EpisodeLosses, Episodes
from remend.training.memory_estimate import Estimate, MemoryEstimator, fitting_micro_batch
from remend.training.negative_mining import mine

STATISTICS_REQUESTS = 2_048
"""The largest number of requests over which an editor's statistics are taken, once, before the first step."""

T = TypeVar("T")


class Trainer(EpisodeRunner):
    """A training run, step by step; :func:`remend.train` runs it as a whole.

    A step has three parts. What the base model computes never changes, so it is looked up or computed once
    (:class:`ActivationCache`). The editor turns a whole batch of edit pairs into changes. The edited model then runs on
    ``micro_batch`` episodes at a time; the backward pass of each part ends at the changes, and their gradients go back
    through the editor in one pass. No gradient of the base model's weights is ever stored, and no more than one of the
    editor's large matrices (:class:`EditorOptimizer`).

    Attributes:
        editor: the editor in training.
        step: the number of steps made.
        optimizer: updates the editor's parameters.
        micro_batch: the number of episodes that go through the edited model together; halved when a GPU's memory does
            not suffice.
    """

    def __init__(
        self,
        task: Task,
        editor: TrainableEditor,
        requests: Sequence[EditRequest],
        config: TrainingConfig,
        resources: Resources | None = None,
        process_group: ProcessGroup | None = None,
        text: Sequence[str] = (),
    ) -> None:
        resources = resources or Resources()
        self.text = text
        self.process_group = process_group or ProcessGroup(editor.device)
        self._check_options(task, editor, config, resources)
        # Each pass gathers a sharded model's weights, so all processes must make the same passes: each measures all.
        sharded = is_sharded(task.model)
        self.measuring_group = self.process_group.alone() if sharded else self.process_group
        self.episodes = Episodes(task, requests, config.seed, config.near, config.in_batch, editor)
        self.step = 0
        examples, prefix = self.episodes.pairs(), FrozenPrefix(task.model, editor.shapes)
        verify_prefix(task, prefix, examples[:2])
        cache = open_activation_cache(task, editor, prefix, examples, resources, self.process_group)
        super().__init__(task, editor, prefix, cache, config, resources)
        self.optimizer = EditorOptimizer(editor, config, self.process_group, resources.product_dtype)
        self.micro_batch = resources.micro_batch or fitting_micro_batch(
            editor, config, resources, task.device, self._memory_estimator()
        )
        if sharded:  # as many passes in every process
            self.micro_batch = -int(self.process_group.largest(-self.micro_batch))

    def _check_options(self, task: Task, editor: TrainableEditor, config: TrainingConfig, resources: Resources) -> None:
        name, batch_size, count = editor.info.name, config.batch_size, self.process_group.count
        if resources.memory is not None and not editor.estimates_memory:
            raise ConfigError(
                f"the memory of training {name} cannot be limited: give a smaller batch_size, or use mend"
            )
        if self.text and not editor.calibrates_on_text:
            raise ConfigError(f"{name} takes no second moments of a text, as MEND does for whitening: leave text away")
        if batch_size < count:
            raise ConfigError(f"a batch of {batch_size} episodes cannot be shared by {count} processes")
        if is_sharded(task.model) and batch_size % count:
            raise ConfigError(
                f"{count} processes that share one model must have equal parts of each batch, and {batch_size} "
                "episodes cannot be divided so: start a number of processes that divides it, or do without --use_fsdp"
            )

    def empty_cache(self) -> None:
        """Empty the activation cache, so that every example is new again."""
        self.activation_cache = open_activation_cache(
            self.task, self.editor, self.prefix, self.episodes.pairs(), self.resources, self.process_group
        )

    def _memory_estimator(self) -> MemoryEstimator:
        def run_backward(batch: EpisodeBatch, changes: Mapping[str, LowRank]) -> object:
            return self.edited_losses(batch, changes, backward=True)

        return MemoryEstimator(
            self.task,
            self.editor,
            self.episodes,
            self.activation_cache,
            self.config,
            self.process_group.count,
            run_backward,
        )

    def estimate_memory(self) -> Estimate:
        """Estimate what training takes with the present micro-batch, measured on a few of its longest episodes."""
        return self._memory_estimator().measure().estimate(self.micro_batch)

    # -- before the first step -----------------------------------------------------------------------------------

    def calibrate(self) -> None:
        """Mine negatives and fit the editor to the training set's edit pairs; once, before the first step."""
        self._mine_negatives()
        self.editor.calibrate(self.activation_cache, self._calibration_data(), self.measuring_group)

    def replay(self, held_out: Sequence[EpisodeBatch]) -> None:
        """Look up again what a run of ``step`` steps has looked up, in the same order.

        The cache then holds the same bits: rounding depends on which examples were computed together.

        Args:
            held_out: the episodes of the validation before the first step.
        """
        self._mine_negatives()
        self.editor.replay_calibration(self.activation_cache, self._calibration_data(), self.measuring_group)
        for batch in held_out[self.measuring_group.rank :: self.measuring_group.count]:
            self._look_up(batch)
        episodes = self.episodes.episodes
        edits, examples = [episode.edit for episode in episodes], self.episodes.pairs()
        locality = [example for episode in episodes for example in episode.locality]
        locality += [example for episode in episodes for example in episode.near] if self.config.near else []
        locality += edits if self.config.in_batch else []
        epoch_steps = max(1, len(episodes) // self.config.batch_size)
        for step in range(self.step):
            if step % epoch_steps == 0 and self.activation_cache.is_complete(edits, locality, examples):
                break
            for turn in range(self.config.hardest):
                self._look_up(self._process_batch(step, turn))

    def _calibration_data(self) -> CalibrationData:
        edits = self.episodes.edits(STATISTICS_REQUESTS, min(self.config.batch_size, EDIT_BATCH_SIZE))
        return CalibrationData(edits, self.episodes.facts(), self.text)

    def _mine_negatives(self) -> None:
        if self.config.near or self.editor.uses_negatives:
            mine(self.episodes, self.activation_cache)

    def _look_up(self, batch: EpisodeBatch) -> None:
        """Look up what a step looks up for a batch."""
        if self.editor.reads_packed_factors:
            self.activation_cache.packed_factors(batch.edits)
        else:
            self.activation_cache.prefix_states(batch.edits)
        for index in self._micro_batches(batch):
            part = batch[index]
            states = self.activation_cache.prefix_states(part.probes())
            self.activation_cache.base_outputs(part.locality, None if states is None else states[1::2])

    # -- one step ------------------------------------------------------------------------------------------------

    def train_step(self, share: float = 0.0) -> float:
        """Make one optimizer step on a batch of episodes; return the outer loss L = c_e L_e + L_loc (Eq. 4).

        Args:
            share: the share of the run that is done, for the decay of the learning rates.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; nothing was updated.
            TrainingError: after the first step, a tensor of the editor still gets no gradient.
        """
        batch = self._retry_smaller(lambda: self._select_hardest(self.step))
        parts = self._retry_smaller(lambda: self._backward(batch))
        loss = torch.stack([self._outer_loss(losses).detach().sum() for losses in parts]).sum()
        gradients = self.optimizer.gather(loss)
        if not (gradients.bound + loss).isfinite():
            self._raise_non_finite(parts, batch)
        self.optimizer.check_flow(gradients, first=self.step == 0)
        self.optimizer.step(gradients, share)
        self.step += 1
        return float(loss)

    @torch.no_grad()
    def validate(self, batches: Sequence[EpisodeBatch]) -> dict[str, float]:
        """Return the means over all episodes of the outer loss, its two parts, and the shares of successes.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
        """
        sums = torch.zeros(5, dtype=torch.float64)
        for batch in batches[self.measuring_group.rank :: self.measuring_group.count]:
            losses = self.losses(batch)
            if not losses.finite().all():
                self._raise_non_finite([losses], batch)
            columns = (losses.edit, losses.locality, losses.correct, losses.unchanged, torch.ones_like(losses.edit))
            sums += torch.stack([column.cpu().double().sum() for column in columns])
        device = self.process_group.device
        sums = sums.to(device, torch.float32 if device.type == "mps" else torch.float64)  # MPS has no float64
        self.measuring_group.sum(sums)
        means = dict(zip(("edit", "locality", "taken", "kept"), (sums[:4] / sums[4]).tolist(), strict=True))
        return {"loss": self.config.edit_weight * means["edit"] + means["locality"], **means}

    def _process_batch(self, step: int, turn: int = 0) -> EpisodeBatch:
        """Return this process's part of a step's batch."""
        batch = self.episodes.batch(step, self.config.batch_size, turn)
        return batch[self.process_group.rank :: self.process_group.count]

    def _select_hardest(self, step: int) -> EpisodeBatch:
        """Return the step's batch with the one of several locality examples that each edit changes most."""
        batches = [self._process_batch(step, turn) for turn in range(self.config.hardest)]
        if len(batches) == 1:
            return batches[0]
        losses = torch.stack([self.losses(batch).locality for batch in batches])
        worst = losses.nan_to_num(torch.inf).argmax(0).tolist()  # NaN must be met in the step, which raises
        return replace(batches[0], locality=tuple(batches[turn].locality[e] for e, turn in enumerate(worst)))

    def _backward(self, batch: EpisodeBatch) -> list[EpisodeLosses]:
        """Run forward and backward; leave gradients as factors and, of small parameters, in ``.grad``."""
        self.optimizer.clear()
        losses = []
        micro_batches = self._micro_batches(batch)
        changes = self.editor.episode_changes(self.activation_cache, batch.edits, self.optimizer.factored_gradients)
        factors = [factor for change in changes.values() for factor in (change.u, change.delta)]
        gradients = [torch.zeros_like(factor) for factor in factors]
        for index in micro_batches:
            leaves = [factor.detach()[index].requires_grad_() for factor in factors]
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient[index]  # a view, to which the backward pass adds in place
            selected = {
                name: replace(change.detach().select(index), u=leaves[2 * i], delta=leaves[2 * i + 1])
                for i, (name, change) in enumerate(changes.items())
            }
            losses.append(self.edited_losses(batch[index], selected, backward=True))
        # Factors that no parameter of the editor has a part in, such as u where only δ is transformed, have no graph.
        trained = [i for i, factor in enumerate(factors) if factor.requires_grad]
        torch.autograd.backward([factors[i] for i in trained], [gradients[i] for i in trained])
        return losses

    # -- errors --------------------------------------------------------------------------------------------------

    def _retry_smaller(self, action: Callable[[], T]) -> T:
        """Return what ``action`` returns; halve the micro-batch when it runs out of a GPU's memory."""
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
            # Outside the except block, where the exception no longer holds the tensors of the failed pass.
            self.micro_batch = (self.micro_batch + 1) // 2
            torch.cuda.empty_cache()
            warnings.warn(f"out of memory: going on with {self.micro_batch} episodes at a time", stacklevel=2)

    def _raise_non_finite(self, parts: Sequence[EpisodeLosses], batch: EpisodeBatch) -> NoReturn:
        non_finite = torch.cat([~losses.finite() for losses in parts])
        advice = "nothing was updated. Lower the learning rates, or load the model in a wider dtype"
        if bool(non_finite.any()):
            ids = ", ".join(batch.ids[i] for i in non_finite.nonzero().flatten().tolist()[:5])
            raise NonFiniteError(f"step {self.step}: the edited model's loss is not finite for {ids}; {advice}")
        names = ", ".join(self.optimizer.non_finite()) or "another process"
        raise NonFiniteError(
            f"step {self.step}: the gradient of {names} is not finite for the batch {batch.ids[0]} … {batch.ids[-1]}; "
            f"{advice}"
        )
