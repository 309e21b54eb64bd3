"""``default_editor``: which editor is used for a model that none was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from remend.config import from_json, to_json
from remend.editors.loading import editor_class
from remend.errors import ConfigError, ModelError
from remend.registries import DEFAULT_EDITOR
from remend.tasks.base import Task

FALLBACK = "ridge"
"""The editor for models that :data:`DEFAULT_EDITOR` cannot edit."""

KINDS = ("units", "low-rank")
"""What the default editor's edits are made of: hidden units where the model's MLP can have more, else a low rank."""


@dataclass(frozen=True)
class DefaultEditor:
    """The editor for a model that none was trained for: the arguments of :func:`remend.editors.make`.

    Attributes:
        name: its name.
        config: its configuration.
        reason: why it is not the first choice, ``fit`` of kind ``units``; empty where it is.
    """

    name: str
    config: Any
    reason: str = ""


def default_editor(task: Task, settings: Mapping[str, Any] | None = None) -> DefaultEditor:
    """Return which editor suits a model that none was trained for; none of them needs training.

    It is ``fit``: of kind ``units`` where the model reads text and has an MLP that hidden units can be added to, else
    of kind ``low-rank``. Models that it cannot edit at all (images, policies, experts) get ``ridge``.

    Args:
        task: the model; it is run once, up to the edited block.
        settings: those of ``fit``, by name; a ``kind`` among them is the only one that is tried.

    Raises:
        ConfigError: ``fit`` has no such setting, or cannot edit the model with settings that are its own.
    """
    kind, settings = editor_class(DEFAULT_EDITOR), settings or {}
    assert kind.config_class is not None
    reason = ""
    for edits_of in [settings["kind"]] if "kind" in settings else KINDS:
        config = from_json(kind.config_class, {**to_json(kind.default_config()), "kind": edits_of, **settings})
        try:
            kind.check_model(task, config)
        except (ConfigError, ModelError) as error:
            reason = reason or str(error)
        else:
            return DefaultEditor(DEFAULT_EDITOR, config, reason)
    if settings:
        raise ConfigError(
            f"{reason}. The settings are those of {DEFAULT_EDITOR}: leave them away, or name another editor "
            f"(--editor {FALLBACK})"
        )
    return DefaultEditor(FALLBACK, editor_class(FALLBACK).default_config(), reason)
