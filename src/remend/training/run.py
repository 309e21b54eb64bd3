"""A whole training run: splits, time, validation, the best state so far."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.config import to_json
from remend.editors.mend import Mend
from remend.errors import FileError, TrainingError
from remend.request import EditRequest
from remend.storage import MANIFEST, check_target
from remend.tasks.causal_lm import CausalLM
from remend.training.config import PRESETS, TrainingConfig
from remend.training.episodes import EpisodeBatch, Episodes
from remend.training.trainer import Trainer

HELD_OUT_SHARE = 0.1
"""The share of subjects kept for validation where no validation file is given."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands; ``share`` of it is done (of its steps or its seconds, whichever is further)."""

    step: int
    share: float
    loss: float
    validation: dict[str, float] | None = None


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    validation: Sequence[EditRequest] | None = None,
    *,
    preset: str = "default",
    config: TrainingConfig | None = None,
    editor: Mend | None = None,
    budget_seconds: float | None = None,
    out: str | Path | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Mend:
    """Train a MEND editor for ``model`` and return its best state by validation loss.

    Args:
        model: the base model; frozen, and left as it was.
        tokenizer: the model's.
        requests: what to learn from; ``paraphrases`` teach generality, ``locality`` what must stay.
        validation: requests about other subjects; by default a tenth of the subjects is held out.
        preset: ``paper`` or ``default``: network and training settings.
        config: training settings, instead of the preset's.
        editor: an untrained editor, instead of the preset's.
        budget_seconds: end after this time at the latest.
        out: a new folder in which the best state is kept up to date while training (for ``Mend.from_pretrained``).
        on_progress: called after every step.

    Raises:
        TrainingError: training and validation share a subject, or no gradient reaches some tensor.
        FileError: something stands at ``out`` already.
        NonFiniteError: something became NaN or infinite; the message names layer and batch.
    """
    started = time.monotonic()
    if preset not in PRESETS:
        raise TrainingError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    if budget_seconds is not None and not budget_seconds > 0:
        raise TrainingError(f"budget_seconds is how long to train and must be positive, not {budget_seconds}")
    if out is not None:
        check_target(out)
        if (Path(out) / MANIFEST).exists():
            raise FileError(f"{out} holds an editor or an edit already; choose another folder, or delete it first")
    settings = config or PRESETS[preset][1]
    requests, validation = _split(requests, validation, settings)
    task = CausalLM(model, tokenizer)
    chosen = editor or Mend.for_model(model, PRESETS[preset][0], seed=settings.seed)
    _check_fresh(chosen, model)
    trainer = Trainer(task, chosen, requests, settings)
    held_out = Episodes(task, validation[: settings.validation_size], settings.seed).fixed(settings.batch_size)
    run = _Run(trainer, held_out, started, budget_seconds, out)
    trainer.calibrate()
    run.validate()
    if run.over():
        raise TrainingError(
            f"the {budget_seconds:.0f} s were over before the first step: measuring statistics and the start took "
            f"{run.seconds():.0f} s. Give a larger budget, or fewer validation requests"
        )
    while not run.over():
        loss = trainer.train_step(run.share())
        measured = run.validate() if trainer.step % settings.validate_every == 0 else None
        on_progress(Progress(trainer.step, run.share(), loss, measured))
    if run.history[-1]["step"] != trainer.step:
        on_progress(Progress(trainer.step, 1.0, loss, run.validate()))
    return run.finish()


def _check_fresh(editor: Mend, model: PreTrainedModel) -> None:
    """An editor to train must be for this very model, and not have been fitted before."""
    editor.base.check(model, "this editor")
    if editor.trained or any(int(network.u_statistics.count.sum()) for network in map(editor.network, editor.groups)):
        raise TrainingError(
            "this editor was trained already: its networks belong to the statistics it has. Train a new one "
            "(Mend.for_model)"
        )


class _Run:
    """The bookkeeping of :func:`train`: time, validation history, the best state so far."""

    def __init__(
        self,
        trainer: Trainer,
        held_out: Sequence[EpisodeBatch],
        started: float,
        budget: float | None,
        out: str | Path | None,
    ) -> None:
        self.trainer, self.held_out, self.started, self.budget, self.out = trainer, held_out, started, budget, out
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_step = 0

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def share(self) -> float:
        """How much of the run is done, 0 to 1."""
        by_steps = self.trainer.step / self.trainer.config.max_steps
        return min(1.0, max(by_steps, self.seconds() / self.budget if self.budget else 0.0))

    def over(self) -> bool:
        return self.share() >= 1 or self.trainer.step - self.best_step >= self.trainer.config.patience

    def validate(self) -> dict[str, float]:
        """Measure, remember, and keep the state if it is the best so far."""
        measured = self.trainer.validate(self.held_out)
        self.history.append({"step": self.trainer.step, "seconds": round(self.seconds(), 1), **measured})
        if measured["loss"] <= min(entry["loss"] for entry in self.history):
            self.best = {name: tensor.clone() for name, tensor in self.trainer.editor.state_dict().items()}
            self.best_step = self.trainer.step
            self._save()
        return measured

    def finish(self) -> Mend:
        """The best state, loaded into the editor and saved with the whole history."""
        self.trainer.editor.load_state_dict(self.best)
        self._save()
        return self.trainer.editor

    def _save(self) -> None:
        self.trainer.editor.trained = {
            "config": to_json(self.trainer.config),
            "requests": len(self.trainer.episodes),
            "seconds": round(self.seconds(), 1),
            "steps": self.trainer.step,
            "best_step": self.best_step,
            "history": self.history,
        }
        if self.out is not None and self.trainer.step > 0:  # what was not trained must not look like an editor
            self.trainer.editor.save_pretrained(self.out)


def _split(
    requests: Sequence[EditRequest], validation: Sequence[EditRequest] | None, config: TrainingConfig
) -> tuple[list[EditRequest], list[EditRequest]]:
    """Training and validation requests that share no subject; validation in an order drawn with the seed."""
    if validation is None:
        subjects = sorted({request.key for request in requests})
        random.Random(f"{config.seed} held out").shuffle(subjects)
        held_out = set(subjects[: max(2, round(len(subjects) * HELD_OUT_SHARE))])
        validation = [request for request in requests if request.key in held_out]
        requests = [request for request in requests if request.key not in held_out]
    shared = sorted({request.key for request in requests} & {request.key for request in validation})
    if shared:
        raise TrainingError(
            f"training and validation share {len(shared)} subjects ({', '.join(shared[:3])} …): what is measured there "
            "would be remembered, not learnt. Move each subject to one side"
        )
    if not requests or not validation:
        raise TrainingError(
            f"{len(requests)} training and {len(validation)} validation requests: at least two subjects are needed on "
            "each side (a file of one request cannot teach an editor)"
        )
    shuffled = list(validation)
    random.Random(f"{config.seed} validation").shuffle(shuffled)
    return list(requests), shuffled
