"""Read the folders of saved editors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from remend.assets import ATLAS, ATLAS_FOLDER
from remend.errors import FileError
from remend.fingerprint import ModelFingerprint
from remend.saved_folders import get_field, read_folder

EDITOR_FORMAT = "remend.editor/1"
"""The format in the manifest of a saved editor."""
MOST_DIMENSIONS = 2**31
"""A bound on d_in and d_out: the square of a damaged number would not fit into 64 bits."""


@dataclass(frozen=True, eq=False)
class SavedEditor:
    """The content of an editor's folder.

    Attributes:
        path: the folder.
        manifest: the whole manifest.
        tensors: the tensors by name.
        config: the configuration, as JSON.
        base: the model that the editor is for.
        shapes: (d_in, d_out) of each edited matrix, by name.
    """

    path: str | Path
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    base: ModelFingerprint
    shapes: dict[str, tuple[int, int]]

    def field(self, key: str, kind: type[Any]) -> Any:
        """Return a field of the manifest.

        Raises:
            FileError: it is missing, or not a ``kind``.
        """
        return get_field(self.manifest, key, kind, self.path)


def editor_folder(path: str | Path) -> str | Path:
    """Return the folder of an editor; ``atlas`` names the one that ships with remend."""
    return ATLAS_FOLDER / "editor" if path == ATLAS else path


def read_editor(path: str | Path, name: str) -> SavedEditor:
    """Read the folder of the editor ``name``.

    Raises:
        FileError: the folder is missing, damaged, altered, of an unknown version, or of another editor.
    """
    path = editor_folder(path)
    manifest, tensors = read_folder(path, EDITOR_FORMAT)
    if manifest.get("editor") != name:
        raise FileError(f"{path} holds the editor {manifest.get('editor')!r}, not {name!r}")
    shapes = get_field(manifest, "shapes", dict, path)
    for module, shape in shapes.items():
        if not (
            isinstance(shape, list)
            and len(shape) == 2
            and all(type(d) is int and 0 < d < MOST_DIMENSIONS for d in shape)
        ):
            raise FileError(f"{path}: the shape of {module} should be [d_in, d_out], it is {shape!r}")
    return SavedEditor(
        path,
        manifest,
        tensors,
        get_field(manifest, "config", dict, path),
        ModelFingerprint.from_manifest(get_field(manifest, "base", dict, path), path),
        {module: (d_in, d_out) for module, (d_in, d_out) in shapes.items()},
    )
