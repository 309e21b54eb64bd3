"""``make_or_load``: editors that measure a model before their first edit, without measuring it again in every run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from remend.config import to_json
from remend.disk_cache import load_or_measure
from remend.editors.base import Editor
from remend.editors.loading import editor_class, make
from remend.errors import FileError, ModelError
from remend.fingerprint import ModelFingerprint
from remend.tasks.base import Task
from remend.tasks.identity import hash_task


def make_or_load(
    name: str,
    task: Task,
    text: Sequence[str] = (),
    seed: int = 0,
    config: Any = None,
    *,
    modules: Sequence[str] = (),
    layers: str | None = None,
    announce: Callable[[str], None] = lambda message: None,
) -> Editor:
    """Return an editor as :func:`make` does, with what an earlier run measured of the same model where it can.

    What is kept on disk, and where, says :mod:`remend.disk_cache`. An entry is used if the model with its tokenizer
    (:func:`remend.tasks.identity.hash_task`), the text, the seed, the edited matrices and the settings that statistics
    depend on are the same.

    Args:
        name: a name of :data:`remend.registries.EDITORS`.
        task: the model.
        text: passages of ordinary text, for editors that measure the model's activations.
        seed: of every random draw.
        config: the editor's configuration; by default its own default.
        modules: globs of the matrices to edit, for editors that let one choose.
        layers: the blocks to edit.
        announce: told whether statistics are measured or read, and where they are kept.

    Raises:
        ConfigError: as :func:`make`.
        ModelError: as :func:`make`.
    """
    kind = editor_class(name)
    if kind.info.needs == "training" or "text" not in kind.info.options or not task.reads_text:
        return make(name, task, text, seed, config, modules=modules, layers=layers)
    config = kind.check_config(config, seed)
    selected = list(kind.check_model(task, config, text=text, modules=modules, layers=layers))

    def measure() -> Editor:
        return make(name, task, text, seed, config, modules=modules, layers=layers)

    def load(path: Path) -> Editor:
        editor = kind.load(path)
        if editor.base != ModelFingerprint.of(task.model, selected) or list(editor.shapes) != selected:
            raise FileError(f"{path} holds an editor of another model")
        editor.config = config  # settings that statistics do not depend on may be others
        return editor

    try:
        depends_on = {
            "editor": name,
            "task": hash_task(task),
            "settings": _measured_settings(kind, config),
            "matrices": selected,
            "text": list(text),
            "seed": seed,
        }
    except ModelError:  # some weights are offloaded, and nothing tells the model from others
        return measure()
    return load_or_measure(depends_on, load, measure, lambda editor, path: editor.save(path), announce)


def _measured_settings(kind: type[Editor], config: Any) -> dict[str, Any]:
    """Return the settings of an editor that its statistics depend on."""
    settings = {} if config is None else to_json(config)
    counted = settings if kind.measured_settings is None else kind.measured_settings
    return {name: settings[name] for name in counted}
