"""How editors are kept in folders: what all manifests say, and what the names and sizes of MEND's tensors say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from remend.config import from_json, to_json
from remend.editors.info import EditorInfo
from remend.errors import FileError
from remend.fingerprint import ModelFingerprint
from remend.serialization import get_field, read_folder

FORMAT = "remend.editor/1"


@runtime_checkable
class SavableEditor(Protocol):
    """An editor of some matrices of one model, with settings."""

    traits: ClassVar[EditorInfo]
    config: Any
    base: ModelFingerprint
    shapes: dict[str, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class SavedEditor:
    """What was read of an editor's folder.

    Attributes:
        manifest: all that it says.
        tensors: by name.
        config: the settings.
        base: the model that it is for.
        shapes: (d_in, d_out) of each edited module, by name.
    """

    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    config: Any
    base: ModelFingerprint
    shapes: dict[str, tuple[int, int]]


def described(editor: SavableEditor) -> dict[str, Any]:
    """What the manifest of every editor says."""
    return {
        "editor": editor.traits.name,
        "config": to_json(editor.config),
        "base": asdict(editor.base),
        "shapes": {name: list(shape) for name, shape in editor.shapes.items()},
    }


def read_editor(path: Path, name: str, configuration: type[Any]) -> SavedEditor:
    """What a folder holds of the editor ``name``, whose settings are a ``configuration``.

    Raises:
        FileError: the folder is missing, damaged, altered, of an unknown version, or of another kind of editor.
    """
    manifest, tensors = read_folder(path, FORMAT)
    if manifest.get("editor") != name:
        raise FileError(f"{path} holds the editor {manifest.get('editor')!r}, not {name!r}")
    shapes = get_field(manifest, "shapes", dict, path)
    for module, shape in shapes.items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(d) is int and d > 0 for d in shape)):
            raise FileError(f"{path}: the shape of {module} should be [d_in, d_out], it is {shape!r}")
    return SavedEditor(
        manifest,
        tensors,
        from_json(configuration, get_field(manifest, "config", dict, path)),
        ModelFingerprint.from_manifest(get_field(manifest, "base", dict, path), path),
        {module: (d_in, d_out) for module, (d_in, d_out) in shapes.items()},
    )


def symmetric_of(state: Mapping[str, Tensor]) -> set[str]:
    """Which tensors of a MEND editor are symmetric matrices, of which half is stored."""
    return {name for name, t in state.items() if name.startswith(("whitener_", "contrast_")) and t.dim() == 2}


def directions_in(shapes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """In how many directions the whiteners of a saved MEND editor tell inputs apart, where not in all."""
    found = {name: tensors.get(f"basis_{index}") for index, name in enumerate(shapes)}
    return {name: basis.shape[1] for name, basis in found.items() if basis is not None and basis.dim() == 2}
