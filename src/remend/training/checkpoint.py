"""Checkpoints of a training run: folders with all that it needs to resume bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import re
import warnings
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt, ValidationError, field_validator
from torch import Tensor

from remend.config import to_json
from remend.errors import FileError, TrainingError
from remend.saved_folders import get_field, read_folder, remove_saved, write_folder
from remend.staging import remove_abandoned
from remend.tasks.base import Example
from remend.training.trainer import Trainer

CHECKPOINT_FORMAT = "remend.checkpoint/1"
SHA256_DIGITS = 64
ADAM_KEYS = ("step", "exp_avg", "exp_avg_sq")
"""What the optimizer keeps of each parameter."""


@dataclass(frozen=True, eq=False)
class TrainingState:
    """The state of a run beside its trainer's.

    Attributes:
        seconds: how long it has run, over all its sessions.
        history: the values of each validation.
        best: the editor's parameters at the best validation so far, on the CPU.
        best_step: the step of that validation.
    """

    seconds: float
    history: list[dict[str, int | float]]
    best: dict[str, Tensor]
    best_step: int


def checkpoints_folder(out: str | Path) -> Path:
    """Return the folder of the checkpoints of the run that trains ``out``: a folder beside it."""
    out = Path(out)
    return out.with_name(f"{out.name}.checkpoints")


def save(folder: Path, trainer: Trainer, state: TrainingState) -> Path:
    """Write a checkpoint and then delete the ones before, so that a complete one exists at any moment."""
    tensors = {f"editor.{name}": tensor for name, tensor in trainer.editor.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    for parameter, name in trainer.optimizer.names.items():
        moments = trainer.optimizer.adam.state.get(parameter, {})  # empty before the first step
        tensors |= {f"adam.{name}.{key}": value for key, value in moments.items()}
    manifest = {
        "run": run_identity(trainer),
        "step": trainer.step,
        "micro_batch": trainer.micro_batch,
        "seconds": state.seconds,
        "history": state.history,
        "best_step": state.best_step,
    }
    written = write_folder(_step_folder(folder, trainer.step), CHECKPOINT_FORMAT, manifest, tensors)
    for path in _steps(folder):
        if path != written:
            remove_saved(path)
    return written


def load(folder: Path, trainer: Trainer) -> TrainingState | None:
    """Restore a trainer from its run's newest checkpoint; return None if there is no checkpoint.

    The first process selects the checkpoint, and the others read the same one.

    Raises:
        TrainingError: the checkpoint is of a run with other settings, data, editor or base model.
        FileError: a process cannot read what the first one could.
    """
    process_group = trainer.process_group
    newest = _newest(folder) if process_group.first else None
    step = process_group.largest(-1.0 if newest is None else float(newest.name.removeprefix("step-")))
    if step < 0:
        return None
    path = _step_folder(folder, int(step))
    manifest, tensors = read_folder(path, CHECKPOINT_FORMAT)
    check_identity(trainer, get_field(manifest, "run", dict, path), path)
    parts: dict[str, dict[str, Tensor]] = {"editor": {}, "best": {}, "adam": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        parts.setdefault(kind, {})[rest] = tensor
    try:
        _check_tensors(trainer, parts)
        progress = _Progress.model_validate({key: manifest.get(key) for key in _Progress.model_fields})
    except ValueError as error:
        reason: object = error
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_input=False)[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise FileError(
            f"{path} is damaged or was altered ({reason}): delete it, and the run goes on from the one before it, or "
            "begins anew"
        ) from None
    _restore(trainer, parts)
    trainer.step, trainer.micro_batch = int(step), progress.micro_batch
    process_group.wait()  # before the first process writes the next checkpoint, and deletes this one
    return TrainingState(progress.seconds, progress.history, parts["best"], progress.best_step)


_StepNumber = Annotated[int, Field(ge=0)]


class _Progress(BaseModel):
    """What a manifest says of how far its run had come."""

    model_config = ConfigDict(strict=True)

    micro_batch: PositiveInt
    seconds: Annotated[FiniteFloat, Field(ge=0)]
    history: Annotated[list[dict[str, _StepNumber | FiniteFloat]], Field(min_length=1)]
    best_step: _StepNumber

    @field_validator("history")
    @classmethod
    def _whole(cls, history: list[dict[str, int | float]]) -> list[dict[str, int | float]]:
        if not all({"step", "loss", "taken", "kept"} <= values.keys() for values in history):
            raise ValueError("a validation lacks its step, its loss, or its shares")
        return history


def _check_tensors(trainer: Trainer, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise ValueError unless the tensors of a checkpoint are those of the trainer's editor and optimizer."""
    parameters = dict(trainer.editor.named_parameters())
    found = {f"{kind}.{name}": tensor for kind, tensors in parts.items() for name, tensor in tensors.items()}
    expected = {f"editor.{name}": tensor for name, tensor in trainer.editor.state_dict().items()}
    expected |= {f"best.{name}": parameter for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        if any(f"adam.{name}.{key}" in found for key in ADAM_KEYS):  # none before the first step
            expected |= {f"adam.{name}.{key}": torch.zeros(()) if key == "step" else parameter for key in ADAM_KEYS}
    for name in sorted(expected.keys() ^ found.keys()):
        raise ValueError(f"the tensor {name[:80]!r} is {'missing' if name in expected else 'unknown'}")
    for name, tensor in expected.items():
        kinds = [(tuple(one.shape), str(one.dtype).removeprefix("torch.")) for one in (found[name], tensor)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"the tensor {name!r} is of {kinds[0]}, not {kinds[1]}")


def exist(out: str | Path) -> bool:
    """Return whether the run that trains ``out`` has written checkpoints, damaged ones included."""
    return bool(_steps(checkpoints_folder(out)))


def delete(folder: Path) -> None:
    """Delete the checkpoints of a run that is finished; their folder stays if it holds anything else."""
    remove_abandoned(folder)
    for path in _steps(folder):
        remove_saved(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _steps(folder: Path) -> list[Path]:
    """Return the folders of all checkpoints, the newest first."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)), reverse=True)


def _newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint."""
    remove_abandoned(folder)
    for path in _steps(folder):
        try:
            read_folder(path, CHECKPOINT_FORMAT)
        except FileError as error:
            warnings.warn(f"a damaged checkpoint is passed over: {error}", stacklevel=4)
            continue
        return path
    return None


def _step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


@torch.no_grad()
def _restore(trainer: Trainer, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    trainer.editor.load_state_dict(dict(parts["editor"]))
    for parameter, name in trainer.optimizer.names.items():
        saved = {key: parts["adam"].get(f"{name}.{key}") for key in ADAM_KEYS}
        moments = {key: value.to(parameter.device) for key, value in saved.items() if value is not None}
        if moments:
            trainer.optimizer.adam.state[parameter] = moments


def run_identity(trainer: Trainer) -> dict[str, Any]:
    """Return what must be the same for a run to resume bit for bit."""
    data = hashlib.sha256()
    for example in trainer.episodes.pairs():
        data.update(_example_bytes(example))
    return {
        "training settings": to_json(trainer.config),
        "editor settings": to_json(trainer.editor.config),
        "edited matrices": list(trainer.editor.shapes),
        "base model": trainer.editor.base.digest(),
        "training data": data.hexdigest(),
        "cache": trainer.resources.cache,
        "precision": trainer.resources.precision,
        "number of processes": trainer.process_group.count,
    }


def _example_bytes(example: Example) -> bytes:
    if all(isinstance(value, int) for value in (*example.input, *example.target)):
        return array("q", (len(example.input), *example.input, *example.target)).tobytes()
    return repr((example.input, example.target)).encode()


def check_identity(trainer: Trainer, saved: Mapping[str, Any], path: Path) -> None:
    """Check that a checkpoint is of the trainer's run.

    Args:
        trainer: the trainer.
        saved: :func:`run_identity` in the checkpoint.
        path: the checkpoint, for the message.

    Raises:
        TrainingError: it is of another run.
    """
    expected = run_identity(trainer)
    # A setting that did not exist yet in the release that wrote the checkpoint had its default value.
    defaults = {
        "training settings": to_json(type(trainer.config)()),
        "editor settings": to_json(type(trainer.editor.config)()),
    }
    settings = {key: saved.get(key, {}) for key in defaults}
    whole = {key: {**defaults[key], **values} for key, values in settings.items() if isinstance(values, dict)}
    saved = {**saved, **whole}
    if differences := [text for key in expected for text in _differences(key, saved.get(key), expected[key])]:
        raise TrainingError(
            f"{path} is a checkpoint of another run: {'; '.join(differences)}. A run goes on as it began: give the "
            "same options and data, or another --out to begin anew"
        )


def _differences(name: str, saved: Any, current: Any) -> list[str]:
    """Describe what differs between a checkpoint and this run; of several settings, each by itself."""
    if saved == current:
        return []
    if isinstance(saved, dict) and isinstance(current, dict):
        return [text for key in current for text in _differences(key, saved.get(key), current[key])]
    if isinstance(current, str) and len(current) == SHA256_DIGITS:  # a digest tells a reader nothing
        return [f"the {name} was another"]
    shown = (", ".join(map(str, value)) if isinstance(value, list) else value for value in (saved, current))
    return ["{}: {} then, {} now".format(name, *shown)]
