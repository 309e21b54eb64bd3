"""``TrainingRun``: the state of a run beside its trainer's: time, validation history, best parameters, checkpoints."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from remend.config import to_json
from remend.core.distributed import ProcessGroup
from remend.editors.loading import load_trained
from remend.editors.saved_editor import EDITOR_FORMAT
from remend.editors.trainable import TrainableEditor
from remend.errors import FileError, TrainingError
from remend.saved_folders import MANIFEST, check_replaceable, read_manifest
from remend.staging import lock_folder, readable_write_errors, unlock_folder
from remend.training import checkpoint
from remend.training.episodes import EpisodeBatch
from remend.training.trainer import Trainer


class TrainingRun:
    """The bookkeeping of :func:`remend.train`.

    Args:
        trainer: makes the steps.
        held_out: the episodes of validations.
        started: the time at which this session started.
        budget: the seconds after which the run ends, of all its sessions together.
        out: the folder of the best state so far.

    Attributes:
        saved: the time of the last checkpoint.
    """

    def __init__(
        self,
        trainer: Trainer,
        held_out: Sequence[EpisodeBatch],
        started: float,
        budget: float | None,
        out: str | Path | None,
    ) -> None:
        self.trainer, self.held_out, self.started, self.budget, self.out = trainer, held_out, started, budget, out
        self.state = checkpoint.TrainingState(seconds=0.0, history=[], best={}, best_step=0)
        self.saved = started

    def seconds(self) -> float:
        """Return how long the run has taken, over all its sessions."""
        return self.state.seconds + time.monotonic() - self.started

    def share(self) -> float:
        """Return the share of the run that is done, 0 to 1; the same in all processes."""
        by_steps = self.trainer.step / self.trainer.config.max_steps
        by_time = self.trainer.process_group.largest(self.seconds()) / self.budget if self.budget else 0.0
        return min(1.0, max(by_steps, by_time))

    def out_of_patience(self) -> bool:
        """Tell whether the validation loss has not fallen for as many steps as the settings allow."""
        return self.trainer.step - self.state.best_step >= self.trainer.config.patience

    def validated_step(self) -> int:
        """Return the step of the last validation."""
        return int(self.state.history[-1]["step"])

    def validate(self) -> dict[str, float]:
        """Validate, add the values to the history, and keep the parameters if they are the best so far."""
        values = self.trainer.validate(self.held_out)
        history = self.state.history
        history.append({"step": self.trainer.step, "seconds": round(self.seconds(), 1), **values})
        if values["loss"] <= min(entry["loss"] for entry in history):
            parameters = self.trainer.editor.named_parameters()
            best = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters}
            self.state = replace(self.state, best=best, best_step=self.trainer.step)
            self._save_editor()
        return values

    def save(self) -> None:
        """Write a checkpoint, if there is a folder for it. It exists when this returns in any process."""
        if self.out is not None and self.trainer.process_group.first:
            state = replace(self.state, seconds=self.seconds())
            checkpoint.save(checkpoint.checkpoints_folder(self.out), self.trainer, state)
        self.trainer.process_group.wait()
        self.saved = time.monotonic()

    def restore(self) -> bool:
        """Restore the last checkpoint, if there is one, and the activation cache; tell whether there was one."""
        assert self.out is not None
        state = checkpoint.load(checkpoint.checkpoints_folder(self.out), self.trainer)
        if state is None:
            return False
        self.state = state
        self.trainer.replay(self.held_out)
        # Restoring does not count: otherwise a run with a small budget could be resumed for ever without a step.
        self.started = time.monotonic()
        return True

    def finish(self) -> TrainableEditor:
        """Load the best parameters into the editor, save it with the whole history, and return it."""
        editor = self.trainer.editor
        editor.load_state_dict({**editor.state_dict(), **self.state.best})
        self._save_editor(finished=True)
        if self.out is not None and self.trainer.process_group.first:
            checkpoint.delete(checkpoint.checkpoints_folder(self.out))
        self.trainer.process_group.wait()
        return editor

    def _save_editor(self, finished: bool = False) -> None:
        self.trainer.editor.trained = {
            "config": to_json(self.trainer.config),
            "requests": len(self.trainer.episodes),
            "validation_requests": sum(map(len, self.held_out)),
            "seconds": round(self.seconds(), 1),
            "steps": self.trainer.step,
            "best_step": self.state.best_step,
            "finished": finished,
            "history": self.state.history,
        }
        self.trainer.activation_cache.flush()
        # Before the first step there is nothing to save: an untrained editor must not look like a trained one.
        if self.out is not None and self.trainer.step > 0 and self.trainer.process_group.first:
            self.trainer.editor.save(self.out)


@contextmanager
def exclusive_run(out: str | Path | None, process_group: ProcessGroup) -> Iterator[None]:
    """Within the context, keep other runs from training to ``out``: each would delete the other's checkpoints.

    Raises:
        FileError: another run trains to it now, or nothing can be written there.
    """
    folder, lock = None if out is None else checkpoint.checkpoints_folder(out), None
    if folder is not None and process_group.first:
        with readable_write_errors(folder):
            lock = lock_folder(folder)
    refused = folder is not None and process_group.first and lock is None
    if process_group.largest(float(refused)) > 0:  # in all processes of this run, or the others would wait for ever
        raise FileError(
            f"another run trains to {out} at this moment: wait until it has ended, or choose another folder"
        )
    try:
        yield
    finally:
        if folder is not None and lock is not None:
            unlock_folder(folder, lock)


def find_finished(out: str | Path | None, resume: bool) -> TrainableEditor | None:
    """Check that ``out`` may be written; return the editor in it if the run to resume is finished already."""
    if out is None:
        if resume:
            raise TrainingError(
                "there is no run to resume without a folder: give out, the folder of the interrupted run"
            )
        return None
    check_out(out, resume)
    if not resume:
        return None
    # A run that was killed after it had ended may still have checkpoints.
    if (Path(out) / MANIFEST).exists() and read_manifest(out, EDITOR_FORMAT).get("trained", {}).get("finished"):
        checkpoint.delete(checkpoint.checkpoints_folder(out))
        return load_trained(out)
    if checkpoint.exist(out):
        return None
    warnings.warn(f"no checkpoint was written for {out} yet: the run begins anew", stacklevel=3)
    return None


def check_out(out: str | Path, resume: bool) -> None:
    """Check that a run may write to a folder.

    Raises:
        FileError: something exists there already, and ``resume`` does not continue it.
    """
    check_replaceable(out)
    has_editor = (Path(out) / MANIFEST).exists()
    has_checkpoints = checkpoint.exist(out)
    if not resume and (has_editor or has_checkpoints):
        content = "an editor or an edit" if has_editor else "the checkpoints of an unfinished run"
        folder = out if has_editor else checkpoint.checkpoints_folder(out)
        advice = "go on with it (resume=True, --resume), " if has_checkpoints else ""
        raise FileError(f"{folder} holds {content} already; {advice}choose another folder, or delete it first")
