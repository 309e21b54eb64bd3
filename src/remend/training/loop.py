"""A whole training run: splits, time, validation, the best state so far, and going on after an interruption."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from remend.config import to_json
from remend.editors import Trainable, load_trained
from remend.editors.mend.editor import Mend
from remend.editors.serialization import EDITOR_FORMAT
from remend.editors.trainable import TrainableEditor
from remend.errors import FileError, TrainingError
from remend.models import fsdp as sharding
from remend.models.loading import choose_device
from remend.request import EditRequest
from remend.serialization import MANIFEST, check_replaceable, read_manifest
from remend.tasks import Task
from remend.training import checkpoint
from remend.training.config import PRESETS, Resources, TrainingConfig
from remend.training.direct_trainer import DirectTrainer
from remend.training.distributed import ProcessGroup
from remend.training.episodes import EpisodeBatch, Episodes
from remend.training.interrupts import interruptible
from remend.training.splits import split
from remend.training.tracking import Log, tracked
from remend.training.trainer import Trainer

CHECKPOINT_MINUTES = 5.0


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run stands.

    Attributes:
        step: steps made.
        share: of the run that is done, by its steps or its seconds, whichever is further.
        loss: the outer loss of this step's batch.
        validation: what was measured, after a step that was followed by a validation.
    """

    step: int
    share: float
    loss: float
    validation: dict[str, float] | None = None


def train(
    task: Task,
    requests: Sequence[EditRequest],
    validation: Sequence[EditRequest] | None = None,
    *,
    preset: str = "default",
    config: TrainingConfig | None = None,
    editor: Trainable | None = None,
    resources: Resources | None = None,
    text: Sequence[str] = (),
    budget_seconds: float | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_minutes: float = CHECKPOINT_MINUTES,
    track: Sequence[str] = (),
    allow_shared: Sequence[str] = (),
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> Trainable:
    """Train an editor for ``model`` and return its best state by validation loss.

    With ``out``, the run can be interrupted at any moment and gone on with: its checkpoints lie beside that folder
    until it ends. On the CPU a run that ends by its steps then ends with the very editor that it would have ended
    with; one that ends by its seconds makes more steps or fewer, as the machine is slower or faster. Started in several
    processes by ``accelerate launch`` or ``torchrun``, it shares each batch among them; all return the same editor.
    With ``accelerate launch --use_fsdp`` they share the model's weights too, and it stays so.

    Args:
        task: the base model.
        requests: what to learn from; ``paraphrases`` teach generality, ``locality`` what must stay.
        validation: requests about other subjects; by default a tenth of the subjects is held out.
        preset: ``paper`` or ``default``: network and training settings.
        config: training settings, instead of the preset's.
        editor: an untrained editor, instead of the preset's.
        resources: how the run uses memory and precision.
        text: passages of ordinary text, over whose tokens the inputs' second moments for whitening are taken; by
            default over those of the requests' own prompts and targets.
        budget_seconds: end after this time at the latest (of all sessions of the run together).
        out: a new folder in which the best state is kept up to date while training (for
            :func:`remend.editors.load_trained`).
        resume: go on with the run that was to fill ``out``; a run that left no checkpoint begins anew.
        checkpoint_minutes: how often the whole state is saved; it also is at SIGINT (Ctrl-C) and SIGTERM.
        track: ``tensorboard``, ``wandb`` or ``trackio``: log every step and validation; in ``<out>.logs``, beside
            ``out``.
        allow_shared: ``subjects``, ``prompts`` or ``facts`` that training and validation may have in common; what they
            share is an error otherwise.
        on_progress: called after every step.

    Raises:
        ConfigError: there is no such tracker, or a package that it needs is missing; ``allow_shared`` names no kind.
        TrainingError: training and validation share a subject, a prompt or a fact, no gradient reaches some tensor, or
            the checkpoint is of another run.
        FileError: something stands at ``out`` already.
        NonFiniteError: something became NaN or infinite; the message names layer and batch.
        KeyboardInterrupt: the run was interrupted; the checkpoint is written.
    """
    started = time.monotonic()
    if preset not in PRESETS:
        raise TrainingError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    if budget_seconds is not None and not budget_seconds > 0:
        raise TrainingError(f"budget_seconds is how long to train and must be positive, not {budget_seconds}")
    settings = config or PRESETS[preset][1]
    resources = resources or Resources()
    sharded = sharding.fsdp_requested()
    workers = ProcessGroup(choose_device("auto") if sharded else task.device)
    with (
        workers.one_voice(),
        resources.products(),
        tracked(track, out, workers, to_json(settings)) as log,
        interruptible(out is not None) as interrupted,
    ):
        finished = _prepare_out(out, resume)
        workers.wait()  # until all have looked, nobody writes
        if finished is not None:
            return finished
        requests, validation = split(requests, validation, settings, allow_shared)
        chosen: Trainable = editor or Mend.create(task, PRESETS[preset][0], seed=settings.seed)
        _check_fresh(chosen, task.model)
        if sharded:  # only now: to know its base, the editor must see the whole weights
            sharding.shard_model(task.model, workers.device)
            chosen.to(workers.device)
        task = task.with_autocast(resources.autocast)
        kind = DirectTrainer if isinstance(chosen, TrainableEditor) else Trainer
        trainer: Trainer = kind(task, chosen, requests, settings, resources, workers, text)  # type: ignore[arg-type]
        unseen = Episodes(task, validation[: settings.validation_size], settings.seed, settings.near)
        run = _Run(trainer, unseen.fixed(settings.batch_size), started, budget_seconds, out)
        if not (resume and run.restore()):
            trainer.calibrate()
            log(0, _named(run.validate()))
            run.save()
        _steps(run, lambda: workers.largest(bool(interrupted)) > 0, checkpoint_minutes, log, on_progress)
        return run.finish()


def _steps(
    run: _Run,
    interrupted: Callable[[], bool],
    checkpoint_minutes: float,
    log: Log,
    on_progress: Callable[[TrainingProgress], None],
) -> None:
    """Step after step, to the end of the run or an interruption."""
    trainer, workers = run.trainer, run.trainer.workers
    over = run.share() >= 1 or run.out_of_patience()
    if over and run.measured_at() < trainer.step:  # stopped just before its end
        log(trainer.step, _named(run.validate()))
    if over and trainer.step == 0:
        raise TrainingError(
            f"the {run.budget:.0f} s were over before the first step: measuring statistics and the start took "
            f"{run.seconds():.0f} s. Give a larger budget; with resume (--resume), what was measured is kept"
        )
    while not over:
        loss = trainer.train_step(run.share())
        share = run.share()
        due = share >= 1 or trainer.step % trainer.config.validate_every == 0
        measured = run.validate() if due else None
        over = share >= 1 or run.out_of_patience()
        log(trainer.step, {"loss": loss, "learning_rate": trainer.optimiser.learning_rate, **_named(measured or {})})
        on_progress(TrainingProgress(trainer.step, share, loss, measured))
        if interrupted():
            run.save()
            raise KeyboardInterrupt
        if workers.largest(time.monotonic() - run.saved >= 60 * checkpoint_minutes):
            run.save()


def _prepare_out(out: str | Path | None, resume: bool) -> Trainable | None:
    """Check that ``out`` may be written; the editor in it if the run to go on with is finished already."""
    if out is None:
        if resume:
            raise TrainingError("resume goes on with the run that was to fill a folder: say which, with out")
        return None
    check_out(out, resume)
    left = checkpoint.folder_of(out).is_dir()
    if not resume or left:
        return None
    if (Path(out) / MANIFEST).exists() and read_manifest(out, EDITOR_FORMAT).get("trained", {}).get("finished"):
        return load_trained(out)
    warnings.warn(f"no checkpoint was written for {out} yet: the run begins anew", stacklevel=3)
    return None


def check_out(out: str | Path, resume: bool) -> None:
    """Refuse a folder that a run may not be written to.

    Raises:
        FileError: something stands there already, and ``resume`` does not go on with it.
    """
    check_replaceable(out)
    has_editor = (Path(out) / MANIFEST).exists()
    left = checkpoint.folder_of(out).is_dir()
    if not resume and (has_editor or left):
        what = "an editor or an edit" if has_editor else "the checkpoints of an unfinished run"
        where = out if has_editor else checkpoint.folder_of(out)
        advice = "go on with it (resume=True, --resume), " if left else ""
        raise FileError(f"{where} holds {what} already; {advice}choose another folder, or delete it first")


def _named(measured: Mapping[str, float]) -> dict[str, float]:
    """What a validation measured, as it is called in logs."""
    return {f"validation/{name}": value for name, value in measured.items()}


def _check_fresh(editor: Trainable, model: PreTrainedModel) -> None:
    """An editor to train must be for this very model, and not have been fitted before."""
    editor.base.check(model, "this editor")
    if editor.fitted:
        raise TrainingError(
            "this editor was trained already: its networks belong to the statistics it has. Train a new one (create)"
        )


class _Run:
    """The bookkeeping of :func:`train`: time, validation history, the best state so far, checkpoints."""

    def __init__(
        self,
        trainer: Trainer,
        held_out: Sequence[EpisodeBatch],
        started: float,
        budget: float | None,
        out: str | Path | None,
    ) -> None:
        self.trainer, self.held_out, self.started, self.budget, self.out = trainer, held_out, started, budget, out
        self.standing = checkpoint.TrainingState(seconds=0.0, history=[], best={}, best_step=0)
        self.saved = started

    def seconds(self) -> float:
        """How long the run has taken, over all its sessions."""
        return self.standing.seconds + time.monotonic() - self.started

    def share(self) -> float:
        """How much of the run is done, 0 to 1."""
        by_steps = self.trainer.step / self.trainer.config.max_steps
        return min(1.0, max(by_steps, self._clock() / self.budget if self.budget else 0.0))

    def out_of_patience(self) -> bool:
        """Whether the validation loss has not fallen for as many steps as the settings allow."""
        return self.trainer.step - self.standing.best_step >= self.trainer.config.patience

    def measured_at(self) -> int:
        """The step of the last validation."""
        return int(self.standing.history[-1]["step"])

    def validate(self) -> dict[str, float]:
        """Measure, remember, and keep the state if it is the best so far."""
        measured = self.trainer.validate(self.held_out)
        history = self.standing.history
        history.append({"step": self.trainer.step, "seconds": round(self.seconds(), 1), **measured})
        if measured["loss"] <= min(entry["loss"] for entry in history):
            parameters = self.trainer.editor.named_parameters()
            best = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters}
            self.standing = replace(self.standing, best=best, best_step=self.trainer.step)
            self._save_editor()
        return measured

    def save(self) -> None:
        """Write a checkpoint, if there is a place for it; when this returns in any process, it is there."""
        if self.out is not None and self.trainer.workers.first:
            now = replace(self.standing, seconds=self.seconds())
            checkpoint.save(checkpoint.folder_of(self.out), self.trainer, now)
        self.trainer.workers.wait()
        self.saved = time.monotonic()

    def restore(self) -> bool:
        """Go back to the last checkpoint, if there is one, with the stores as they were then."""
        assert self.out is not None
        standing = checkpoint.load(checkpoint.folder_of(self.out), self.trainer)
        if standing is None:
            return False
        self.standing = standing
        self.trainer.warm(self.held_out)
        self.started = time.monotonic()  # getting ready again is not counted: the budget is for going on
        return True

    def finish(self) -> Trainable:
        """The best state, loaded into the editor and saved with the whole history."""
        editor = self.trainer.editor
        editor.load_state_dict({**editor.state_dict(), **self.standing.best})
        self._save_editor(finished=True)
        if self.out is not None and self.trainer.workers.first:
            checkpoint.delete(checkpoint.folder_of(self.out))
        self.trainer.workers.wait()
        return editor

    def _clock(self) -> float:
        return self.trainer.workers.largest(self.seconds())

    def _save_editor(self, finished: bool = False) -> None:
        self.trainer.editor.trained = {
            "config": to_json(self.trainer.config),
            "requests": len(self.trainer.episodes),
            "validation_requests": sum(map(len, self.held_out)),
            "seconds": round(self.seconds(), 1),
            "steps": self.trainer.step,
            "best_step": self.standing.best_step,
            "finished": finished,
            "history": self.standing.history,
        }
        self.trainer.constants.flush()
        # What was not trained must not look like an editor.
        if self.out is not None and self.trainer.step > 0 and self.trainer.workers.first:
            self.trainer.editor.save(self.out)
