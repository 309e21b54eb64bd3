"""``train``: a whole training run with its splits, time limit, validation, logs and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from remend.config import to_json
from remend.core.distributed import ProcessGroup
from remend.editors.mend.editor import Mend
from remend.editors.trainable import TrainableEditor
from remend.errors import TrainingError
from remend.models import fsdp
from remend.request import EditRequest
from remend.tasks.base import Task
from remend.training.config import PRESETS, Resources, TrainingConfig
from remend.training.episodes import Episodes
from remend.training.interrupts import defer_interrupts
from remend.training.splits import split
from remend.training.tracking import Log, open_trackers
from remend.training.trainer import Trainer
from remend.training.training_run import TrainingRun, exclusive_run, find_finished

CHECKPOINT_MINUTES = 5.0


@dataclass(frozen=True)
class TrainingProgress:
    """The progress of a run after a step.

    Attributes:
        step: the number of steps made.
        share: the share of the run that is done, by its steps or its seconds, whichever is larger.
        loss: the outer loss of this step's batch.
        validation: the values of a validation, after a step that was followed by one.
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
    editor: TrainableEditor | None = None,
    resources: Resources | None = None,
    text: Sequence[str] = (),
    budget_seconds: float | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_minutes: float = CHECKPOINT_MINUTES,
    track: Sequence[str] = (),
    allow_shared: Sequence[str] = (),
    on_progress: Callable[[TrainingProgress], None] = lambda progress: None,
) -> TrainableEditor:
    """Train an editor for a model and return its best state by validation loss.

    With ``out``, the run can be interrupted at any moment and resumed: its checkpoints are in a folder beside ``out``
    until it ends. On the CPU, a run that ends by its steps then gives bit for bit the editor that it would have given;
    one that ends by its seconds makes more or fewer steps, depending on the machine's speed. Started in several
    processes by ``accelerate launch`` or ``torchrun``, it divides each batch among them, and all return the same
    editor. With ``accelerate launch --use_fsdp`` they also share the model's weights, which stay sharded afterwards.

    Args:
        task: the base model.
        requests: the training set; ``paraphrases`` teach generality, ``locality`` what must not change.
        validation: requests about other subjects; by default a tenth of the subjects is held out.
        preset: ``paper`` or ``default``: network and training settings.
        config: training settings, in place of the preset's.
        editor: an untrained editor, in place of the preset's.
        resources: how the run uses memory and precision.
        text: passages of ordinary text over whose tokens inputs are whitened, and which edits are to leave alone
            (:class:`~remend.editors.MendConfig`, ``ordinary``); by default what a decoder writes by itself or, where
            that does not count, the requests' prompts and targets.
        budget_seconds: the time after which the run ends at the latest (of all its sessions together).
        out: a new folder that always holds the best state so far (for :func:`remend.editors.load_trained`).
        resume: continue the interrupted run of ``out``; a run without a checkpoint starts from the beginning.
        checkpoint_minutes: the time between checkpoints; one is also written at SIGINT (Ctrl-C) and SIGTERM.
        track: ``tensorboard``, ``wandb`` or ``trackio``: log every step and validation; in ``<out>.logs``, beside
            ``out``.
        allow_shared: ``subjects``, ``prompts`` or ``facts`` that training and validation may have in common; shared
            ones are an error otherwise.
        on_progress: called after every step.

    Raises:
        ConfigError: there is no such tracker, or a package that it needs is missing; ``allow_shared`` names no kind.
        TrainingError: training and validation share a subject, a prompt or a fact, no gradient reaches some tensor, or
            the checkpoint is of another run.
        FileError: something exists at ``out`` already, or another run trains to it now.
        NonFiniteError: something became NaN or infinite; the message names layer and batch.
        KeyboardInterrupt: the run was interrupted; the checkpoint is written.
    """
    started = time.monotonic()
    if preset not in PRESETS:
        raise TrainingError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    if budget_seconds is not None and not budget_seconds > 0:
        raise TrainingError(f"budget_seconds is how long to train and must be positive, not {budget_seconds}")
    config = config or PRESETS[preset][1]
    resources = resources or Resources()
    sharded = fsdp.fsdp_requested()
    process_group = ProcessGroup(fsdp.process_device() if sharded else task.device)
    with (
        process_group.warn_once(),
        exclusive_run(out, process_group),
        resources.matmul_precision(),
        open_trackers(track, out, process_group, to_json(config)) as log,
        defer_interrupts(out is not None) as interrupts,
    ):
        finished = find_finished(out, resume)
        process_group.wait()  # nobody writes until all have looked
        if finished is not None:
            return finished
        requests, validation = split(requests, validation, config, allow_shared)
        editor = editor or Mend.create(task, PRESETS[preset][0], seed=config.seed)
        _check_untrained(editor, task)
        # Only now: the editor's fingerprint of the model needs its whole weights.
        if sharded:
            fsdp.shard_model(task.model, process_group.device)
            editor.to(process_group.device)
        task = task.with_autocast(resources.autocast)
        trainer = Trainer(task, editor, requests, config, resources, process_group, text)
        held_out = Episodes(task, validation[: config.validation_size], config.seed, config.near, editor=editor)
        run = TrainingRun(trainer, held_out.fixed(config.batch_size), started, budget_seconds, out)
        if not (resume and run.restore()):
            trainer.calibrate()
            log(0, _log_names(run.validate()))
            run.save()
        _make_steps(run, lambda: process_group.largest(bool(interrupts)) > 0, checkpoint_minutes, log, on_progress)
        return run.finish()


def _make_steps(
    run: TrainingRun,
    interrupted: Callable[[], bool],
    checkpoint_minutes: float,
    log: Log,
    on_progress: Callable[[TrainingProgress], None],
) -> None:
    """Make steps until the run ends or is interrupted."""
    trainer, process_group = run.trainer, run.trainer.process_group
    over = run.share() >= 1 or run.out_of_patience()
    # A resumed run whose time is over may have made steps after its last validation.
    if over and run.validated_step() < trainer.step:
        log(trainer.step, _log_names(run.validate()))
    if over and trainer.step == 0:
        raise TrainingError(
            f"the {run.budget:.0f} s were over before the first step: measuring statistics and the start took "
            f"{run.seconds():.0f} s. Give a larger budget; with resume (--resume), what was measured is kept"
        )
    while not over:
        loss = trainer.train_step(run.share())
        share = run.share()
        validate = share >= 1 or trainer.step % trainer.config.validate_every == 0
        values = run.validate() if validate else None
        over = share >= 1 or run.out_of_patience()
        logged = {"loss": loss, "learning_rate": trainer.optimizer.learning_rate, **_log_names(values or {})}
        log(trainer.step, logged)
        on_progress(TrainingProgress(trainer.step, share, loss, values))
        if interrupted():
            run.save()
            raise KeyboardInterrupt
        if process_group.largest(time.monotonic() - run.saved >= 60 * checkpoint_minutes):
            run.save()


def _log_names(validation: Mapping[str, float]) -> dict[str, float]:
    """Return the values of a validation by their names in logs."""
    return {f"validation/{name}": value for name, value in validation.items()}


def _check_untrained(editor: TrainableEditor, task: Task) -> None:
    """Check that an editor is for this very model and was not fitted before.

    Raises:
        TrainingError: it was.
        WrongBaseError: it is for another model.
    """
    editor.base.check(task.model, "this editor")
    if editor.fitted:
        raise TrainingError(
            "this editor was trained already: its networks belong to the statistics it has. Train a new one (create)"
        )
