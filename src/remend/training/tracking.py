"""What a run measures, shown by TensorBoard, Weights & Biases or Trackio, through Accelerate's trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from remend.errors import ConfigError, nearest
from remend.training.distributed import ProcessGroup

TRACKERS = ("tensorboard", "trackio", "wandb")
PROJECT = "remend"

Log = Callable[[int, Mapping[str, float]], None]
"""Takes a step and what was measured there."""


def logs_of(out: str | Path) -> Path:
    """Where the logs of the run that trains ``out`` are: a folder beside it."""
    out = Path(out)
    return out.with_name(f"{out.name}.logs")


@contextmanager
def tracked(
    names: Sequence[str], out: str | Path | None, workers: ProcessGroup, settings: Mapping[str, Any]
) -> Iterator[Log]:
    """Within the block, what the first process logs goes to the named trackers; they start with the first entry.

    Args:
        names: some of :data:`TRACKERS`; with none, nothing is logged.
        out: the folder beside which the logs are kept.
        workers: of whom only the first logs.
        settings: the run's, kept with the logs.

    Raises:
        ConfigError: there is no such tracker, a package that it needs is missing, or there is no ``out``.
    """
    _check(names, out)
    started: list[Any] = []

    def log(step: int, found: Mapping[str, float]) -> None:
        if out is None or not names or not workers.first:
            return
        if not started:
            started.extend(_start(names, logs_of(out), workers, settings))
        for tracker in started:
            tracker.log(dict(found), step=step)

    try:
        yield log
    finally:
        for tracker in started:
            tracker.finish()


def _check(names: Sequence[str], out: str | Path | None) -> None:
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"there is no tracker {name!r}; {nearest(name, TRACKERS)}")
        if missing := [package for package in ("accelerate", name) if find_spec(package) is None]:
            raise ConfigError(
                f"tracking with {name} needs {' and '.join(missing)}: pip install 'remend[big]' {name}, or leave it out"
            )
    if names and out is None:
        raise ConfigError(f"logs for {', '.join(names)} are kept beside the editor's folder: say which, with out")


def _start(names: Sequence[str], folder: Path, workers: ProcessGroup, settings: Mapping[str, Any]) -> list[Any]:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # The trackers themselves, not an Accelerator: that one would end the process group of all with its logs.
    PartialState(cpu=workers.device.type == "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for name in dict.fromkeys(names):
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": folder} if kind.requires_logging_directory else {}
        tracker = kind(PROJECT, **place, **({"dir": str(folder)} if name == "wandb" else {}))
        tracker.start()
        tracker.store_init_configuration(dict(settings))
        started.append(tracker)
    return started
