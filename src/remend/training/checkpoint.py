"""Where a training run stands, as a folder: everything it needs to go on as if it had never stopped."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remend.config import to_json
from remend.errors import FileError, TrainingError
from remend.serialization import get_field, read_folder, remove_temporary_folders, write_folder
from remend.training.trainer import Trainer

FORMAT = "remend.checkpoint/1"
SHA256_DIGITS = 64


@dataclass(frozen=True, eq=False)
class TrainingState:
    """What a run remembers beside its trainer's state.

    Attributes:
        seconds: how long it has run, over all its sessions.
        history: one entry for each validation.
        best: the editor's parameters at the best validation so far, on the CPU.
        best_step: when that was.
    """

    seconds: float
    history: list[dict[str, int | float]]
    best: dict[str, Tensor]
    best_step: int


def folder_of(out: str | Path) -> Path:
    """Where the checkpoints of the run that trains ``out`` are: a folder beside it."""
    out = Path(out)
    return out.with_name(f"{out.name}.checkpoints")


def save(folder: Path, trainer: Trainer, standing: TrainingState) -> Path:
    """Write a checkpoint under a name of its own, then delete the ones before: at any moment a whole one is there."""
    tensors = {f"editor.{name}": tensor for name, tensor in trainer.editor.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in standing.best.items()}
    for parameter, name in trainer.optimiser.names.items():
        state = trainer.optimiser.adam.state.get(parameter, {})  # nothing before the first step
        tensors |= {f"adam.{name}.{key}": value for key, value in state.items()}
    manifest = {
        "run": _identity(trainer),
        "step": trainer.step,
        "micro_batch": trainer.micro_batch,
        "seconds": standing.seconds,
        "history": standing.history,
        "best_step": standing.best_step,
    }
    written = write_folder(_place(folder, trainer.step), FORMAT, manifest, tensors)
    for other in folder.iterdir():
        if other != written:
            shutil.rmtree(other, ignore_errors=True)
    return written


def load(folder: Path, trainer: Trainer) -> TrainingState | None:
    """Bring a trainer to where its run stood; ``None`` if no checkpoint was written yet.

    Of several processes the first one chooses, and the others read the same one.

    Raises:
        TrainingError: the checkpoint is of a run with other settings, data, editor or base model.
        FileError: a process cannot read what the first one could.
    """
    workers = trainer.workers
    path = _newest(folder) if workers.first else None
    step = workers.largest(-1.0 if path is None else float(path.name.removeprefix("step-")))
    if step < 0:
        return None
    path = _place(folder, int(step))
    manifest, tensors = read_folder(path, FORMAT)
    _check(trainer, get_field(manifest, "run", dict, path), path)
    parts: dict[str, dict[str, Tensor]] = {"editor": {}, "best": {}, "adam": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = tensor.clone()  # not a view of a file that will be deleted
    _restore(trainer, parts)
    trainer.step = get_field(manifest, "step", int, path)
    trainer.micro_batch = get_field(manifest, "micro_batch", int, path)
    workers.wait()  # before the first one writes the next, and deletes this one
    return TrainingState(
        seconds=float(manifest["seconds"]),
        history=get_field(manifest, "history", list, path),
        best=parts["best"],
        best_step=get_field(manifest, "best_step", int, path),
    )


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole."""
    if not folder.is_dir():
        return None
    remove_temporary_folders(folder)
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            read_folder(path, FORMAT)
        except FileError as error:
            warnings.warn(f"a damaged checkpoint is passed over: {error}", stacklevel=4)
            continue
        return path
    return None


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def delete(folder: Path) -> None:
    """Delete the checkpoints of a run that is finished."""
    shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def _restore(trainer: Trainer, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    trainer.editor.load_state_dict(dict(parts["editor"]))
    for parameter, name in trainer.optimiser.names.items():
        state = {key: parts["adam"].get(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
        found = {key: value.to(parameter.device) for key, value in state.items() if value is not None}
        if found:
            trainer.optimiser.adam.state[parameter] = found


def _identity(trainer: Trainer) -> dict[str, Any]:
    """What must be the same for a run to go on bit by bit."""
    base, data = trainer.editor.base, hashlib.sha256()
    for pair in trainer.episodes.pairs():
        data.update(array("q", (len(pair.input), *pair.input, *pair.target)).tobytes())
    return {
        "training settings": to_json(trainer.config),
        "editor settings": to_json(trainer.editor.config),
        "edited matrices": list(trainer.editor.shapes),
        "base model": base.digest(),
        "training data": data.hexdigest(),
        "cache": trainer.resources.cache,
        "precision": trainer.resources.precision,
        "number of processes": trainer.workers.count,
    }


def _check(trainer: Trainer, found: Mapping[str, Any], path: Path) -> None:
    expected = _identity(trainer)
    # A setting that the release which wrote it did not have yet was what it is by default.
    defaults = {
        "training settings": to_json(type(trainer.config)()),
        "editor settings": to_json(type(trainer.editor.config)()),
    }
    found = {**found, **{key: {**values, **found.get(key, {})} for key, values in defaults.items()}}
    if differ := [said for key in expected for said in _differences(key, found.get(key), expected[key])]:
        raise TrainingError(
            f"{path} is a checkpoint of another run: {'; '.join(differ)}. A run goes on as it began: give the same "
            "options and data, or another --out to begin anew"
        )


def _differences(name: str, before: Any, now: Any) -> list[str]:
    """What differs between a checkpoint and this run, in words; a setting each, where there are several."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        return [said for key in now for said in _differences(key, before.get(key), now[key])]
    if isinstance(now, str) and len(now) == SHA256_DIGITS:
        return [f"the {name} was another"]
    shown = (", ".join(value) if isinstance(value, list) else value for value in (before, now))
    return ["{}: {} then, {} now".format(name, *shown)]
