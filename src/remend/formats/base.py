"""``EditFormat``: the interface of a format in which edits are written and read. Come here to add one.

A subclass goes into a file of its own, with one line for it in :data:`remend.registries.FORMATS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from remend.edit import Edit
from remend.errors import FileError
from remend.fingerprint import HasModel
from remend.registries import FORMATS
from remend.saved_folders import check_path


@dataclass(frozen=True, eq=False)
class ImportedEdit:
    """An edit that was made of something else, and what of that it leaves out.

    Attributes:
        edit: the change of the model's matrices.
        lost: for each matrix, the share of its change (Frobenius norm) that the edit's rank leaves out.
        other_parameters: parameters that are changed too, but that no edit can change: embeddings, biases, norms.
        compared_in: the dtype in which the changed model was stored, where it is coarser than the base's: smaller
            differences than it can hold are no changes.
    """

    edit: Edit
    lost: Mapping[str, float]
    other_parameters: tuple[str, ...] = ()
    compared_in: torch.dtype | None = None


class EditFormat(ABC):
    """A format of edits: writes them to a folder, and may read them from one.

    Attributes:
        needs: what :meth:`write` reads of the model: nothing, its structure (:func:`remend.models.skeleton` is enough)
            or its weights.
        low_rank: whether what is written has the ranks of the edit.
    """

    needs: ClassVar[Literal["nothing", "structure", "weights"]] = "nothing"
    low_rank: ClassVar[bool] = True

    @abstractmethod
    def write(self, edit: Edit, path: Path, task: Any) -> Mapping[str, float]:
        """Write an edit to a folder.

        Args:
            edit: the edit.
            path: the folder.
            task: the model that the edit is for: a task for a format that needs weights, a task or a module without
                weights for one that needs the structure, and perhaps None for one that needs nothing.

        Returns:
            For each matrix, the share of its change (Frobenius norm) that was lost to rounding; empty if nothing was.
        """

    def replaceable(self, path: Path) -> bool:
        """Return whether a folder that is not empty may be replaced by :meth:`write`; by default it may not."""
        return False

    def usage(self, edit: Edit) -> Sequence[str]:
        """Return lines that tell a user what to do with the folder that was written."""
        return ()

    def detect(self, path: Path) -> bool:
        """Return whether a folder holds this format; False for formats that are only written."""
        return False

    def read(
        self, path: Path, task: HasModel, load: Callable[[Path], HasModel], rank: int | None = None
    ) -> ImportedEdit:
        """Read an edit from a folder.

        Args:
            path: the folder, for which :meth:`detect` is true.
            task: the model that the edit is for.
            load: loads another model as ``task`` was loaded, for formats that are whole models.
            rank: the largest rank of a matrix's change.
        """
        raise FileError(f"{path} is in a format that is written, but not read")


def detect_format(path: Path) -> EditFormat:
    """Return the first registered format that recognizes a folder.

    Raises:
        FileError: there is no such folder, or no format recognizes it.
    """
    check_path(path)
    if not path.is_dir():
        raise FileError(f"there is no folder {path}: give an adapter's, or that of a changed model's checkpoint")
    for name in FORMATS.names():
        edit_format: EditFormat = FORMATS.load(name)()
        if edit_format.detect(path):
            return edit_format
    gguf = "It holds files of llama.cpp (GGUF), which are not read. " if next(path.glob("*.gguf"), None) else ""
    raise FileError(
        f"{path} is in none of the formats {', '.join(FORMATS.names())}. {gguf}Give an adapter's folder, or that of a "
        "changed model's checkpoint"
    )
