"""remend changes what a trained model says about one thing, leaves the rest, and keeps the change as a small file.

The names below are the public interface; they are imported when first used, so that ``import remend`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remend.data import read_source
    from remend.data.request_files import read_requests
    from remend.edit import Edit
    from remend.editors import Editor, Mend, MendConfig
    from remend.errors import RemendError
    from remend.evaluation import Report, evaluate
    from remend.expansion import expand
    from remend.request import Chat, EditRequest, Probe, TextPair
    from remend.tasks import Task, answers, as_the_model_says, load, wrap
    from remend.training import TrainingConfig, train

__version__ = "0.1.0"

_ROOMS = {
    "Chat": "request",
    "Edit": "edit",
    "EditRequest": "request",
    "Editor": "editors",
    "Mend": "editors",
    "MendConfig": "editors",
    "Probe": "request",
    "RemendError": "errors",
    "Report": "evaluation",
    "TextPair": "request",
    "TrainingConfig": "training",
    "Task": "tasks",
    "answers": "tasks",
    "as_the_model_says": "tasks",
    "evaluate": "evaluation",
    "expand": "expansion",
    "load": "tasks",
    "read_requests": "data.request_files",
    "read_source": "data",
    "train": "training",
    "wrap": "tasks",
}

__all__ = [
    "Chat",
    "Edit",
    "EditRequest",
    "Editor",
    "Mend",
    "MendConfig",
    "Probe",
    "RemendError",
    "Report",
    "Task",
    "TextPair",
    "TrainingConfig",
    "answers",
    "as_the_model_says",
    "evaluate",
    "expand",
    "load",
    "read_requests",
    "read_source",
    "train",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'remend' has no attribute {name!r}")
    return getattr(import_module(f"remend.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
