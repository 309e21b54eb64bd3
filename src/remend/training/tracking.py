"""Logs of a run's losses for TensorBoard, Weights & Biases or Trackio, through Accelerate's trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from remend.core.distributed import ProcessGroup
from remend.errors import ConfigError, nearest
from remend.staging import readable_write_errors

TRACKERS = ("tensorboard", "trackio", "wandb")
PROJECT = "remend"

Log = Callable[[int, Mapping[str, float]], None]
"""Logs the values of a step."""


def logs_folder(out: str | Path) -> Path:
    """Return the folder of the logs of the run that trains ``out``: a folder beside it."""
    out = Path(out)
    return out.with_name(f"{out.name}.logs")


@contextmanager
def open_trackers(
    names: Sequence[str], out: str | Path | None, process_group: ProcessGroup, settings: Mapping[str, Any]
) -> Iterator[Log]:
    """Yield a function that logs to the named trackers; they start with the first entry.

    Args:
        names: some of :data:`TRACKERS`; with none, nothing is logged.
        out: the folder beside which the logs are written.
        process_group: the processes of the run, of which only the first logs.
        settings: the run's settings, written with the logs.

    Raises:
        ConfigError: there is no such tracker, a package that it needs is missing, or there is no ``out``.
    """
    _check(names, out)
    trackers: list[Any] = []

    def log(step: int, values: Mapping[str, float]) -> None:
        if out is None or not names or not process_group.first:
            return
        # Not before: a run that fails in its checks must leave no folder behind.
        if not trackers:
            trackers.extend(_start(names, logs_folder(out), process_group, settings))
        for tracker in trackers:
            tracker.log(dict(values), step=step)

    try:
        yield log
    finally:
        for tracker in trackers:
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
        raise ConfigError(
            f"logs for {', '.join(names)} are kept beside the editor's folder, and there is none: give out"
        )


def _start(names: Sequence[str], folder: Path, process_group: ProcessGroup, settings: Mapping[str, Any]) -> list[Any]:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # The trackers themselves, not an Accelerator: that one would destroy the process group when it finishes its logs.
    PartialState(cpu=process_group.device.type == "cpu")
    with readable_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    trackers = []
    for name in dict.fromkeys(names):
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        options = {"logging_dir": folder} if tracker_class.requires_logging_directory else {}
        tracker = tracker_class(PROJECT, **options, **({"dir": str(folder)} if name == "wandb" else {}))
        tracker.start()
        tracker.store_init_configuration(dict(settings))
        trackers.append(tracker)
    return trackers
