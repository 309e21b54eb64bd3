"""Training the editors whose changes are computed from the pairs themselves: the outer loop is MEND's (Alg. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from remend.core.capture import capture_gradient_factors
from remend.core.factored_gradients import FactoredGradients
from remend.core.low_rank import LowRank
from remend.editors.trainable import TrainableEditor
from remend.errors import ConfigError
from remend.fingerprint import find_modules
from remend.request import EditRequest
from remend.tasks.base import Task
from remend.training.config import Resources, TrainingConfig
from remend.training.distributed import ProcessGroup
from remend.training.episodes import EpisodeBatch
from remend.training.trainer import Trainer

UNIT_BATCHES = 4
"""Batches over which the units of the steps are measured."""


class DirectTrainer(Trainer):
    """A :class:`Trainer` of a :class:`TrainableEditor` editor: nothing of an edit pair is kept but what enters the cut.

    A batch's changes are made in one pass and probed in one, unless ``micro_batch`` says otherwise: their graph is what
    takes the memory, and it is held for the whole batch.

    Raises:
        ConfigError: memory is limited, which only MEND's training can keep to, or a text is given for whitening.
    """

    editor: TrainableEditor  # type: ignore[assignment]

    def __init__(
        self,
        task: Task,
        editor: TrainableEditor,
        requests: Sequence[EditRequest],
        config: TrainingConfig,
        resources: Resources | None = None,
        workers: ProcessGroup | None = None,
        text: Sequence[str] = (),
    ) -> None:
        resources, name = resources or Resources(), editor.info.name
        if resources.memory is not None:
            raise ConfigError(
                f"the memory of training {name} cannot be limited: give a smaller batch_size, or use mend"
            )
        if text:
            raise ConfigError(f"{name} takes no second moments of a text, as MEND does for whitening: leave it away")
        fitting = replace(resources, micro_batch=resources.micro_batch or config.batch_size)
        super().__init__(task, editor, requests, config, fitting, workers, text)

    def calibrate(self) -> None:
        """Find negatives and measure the units of the steps."""
        self._mine()
        task, editor = self.task, self.editor
        batch = task.collate([pair for batch in self._calibration_batches()[:UNIT_BATCHES] for pair in batch])
        tokens = task.token_masks(batch, editor.shapes, predicting=False)
        modules = find_modules(task.model, editor.shapes)
        editor.fit(task, capture_gradient_factors(task.model, modules, tokens, lambda: task.loss(batch))[1])

    def _warm_calibration(self) -> None:
        """Nothing that was measured is kept."""

    def _look_up_edits(self, batch: EpisodeBatch) -> None:
        self.constants.prefix_states(batch.edits)

    def _changes(self, batch: EpisodeBatch, ledger: FactoredGradients | None = None) -> dict[str, LowRank]:
        return self.editor.episode_changes(
            self.task, batch.edits, self.prefix, self.constants.prefix_states(batch.edits)
        )

    def _mine(self) -> None:
        if self.config.near:
            super()._mine()
