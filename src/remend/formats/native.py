"""remend's own format of an edit, a folder of safetensors and a JSON manifest, as one of the registered formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from remend.edit import EDIT_FORMAT, RESPONSES_FORMAT, Edit
from remend.errors import FileError
from remend.fingerprint import HasModel
from remend.formats.base import EditFormat, ImportedEdit
from remend.saved_folders import is_saved_by_remend, read_format


class NativeFormat(EditFormat):
    """Edits as remend saves them, with their requests and the model's fingerprint."""

    def write(self, edit: Edit, path: Path, task: Any) -> Mapping[str, float]:
        """Write an edit to a folder. See :meth:`EditFormat.write`."""
        edit.save(path)
        return {}

    def replaceable(self, path: Path) -> bool:
        """Return whether remend wrote the folder."""
        return is_saved_by_remend(path)

    def detect(self, path: Path) -> bool:
        """Return whether the folder is a saved edit."""
        return read_format(path) in (EDIT_FORMAT, RESPONSES_FORMAT)

    def read(
        self, path: Path, task: HasModel, load: Callable[[Path], HasModel], rank: int | None = None
    ) -> ImportedEdit:
        """Refuse the folder, which needs no import.

        Raises:
            FileError: always.
        """
        raise FileError(f"{path} is an edit of remend already: there is nothing to import")
