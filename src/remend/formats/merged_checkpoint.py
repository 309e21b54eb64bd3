"""Save the edited model as a checkpoint that loads wherever the base model loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from remend.edit import Edit
from remend.errors import FileError, naming
from remend.fingerprint import HasModel
from remend.formats.base import EditFormat, ImportedEdit
from remend.formats.checkpoint_difference import diff_checkpoints
from remend.saved_folders import atomic_folder

SHARD = "5GB"
"""The largest file of a checkpoint."""


class Merged(NamedTuple):
    """The result of :func:`save_merged`.

    Attributes:
        path: the folder.
        lost: for each matrix, the share of its change (Frobenius norm) that was lost to rounding.
    """

    path: Path
    lost: dict[str, float]


def save_merged(edit: Edit, path: str | Path, task: HasModel, shard: str = SHARD) -> Merged:
    """Write the edited model, in the dtype in which it is loaded, as sharded safetensors with its tokenizer.

    The edit is merged into the model while it is written, and reverted bit for bit afterwards, so that beside the model
    only the edited matrices are copied.

    Args:
        edit: the edit.
        path: a folder that is not there yet, or is empty.
        task: the base model.
        shard: the largest size of one file.

    Raises:
        WrongBaseError, PrecisionError, EditError: as :meth:`remend.Edit.merge`.
        FileError: ``path`` holds something, or cannot be written.
    """
    with atomic_folder(path, lambda existing: False) as staged, edit.merge(task) as merged:
        try:
            task.model.save_pretrained(staged, max_shard_size=shard)
            task.processor.save_pretrained(staged)
        except (RuntimeError, ValueError) as error:
            raise FileError(f"cannot write {path}: {str(error).splitlines()[0]}") from None
        return Merged(Path(path), dict(merged.lost))


class MergedFormat(EditFormat):
    """The edited model as a checkpoint; also any changed checkpoint of the model."""

    needs: ClassVar[Literal["nothing", "structure", "weights"]] = "weights"
    low_rank: ClassVar[bool] = False

    def write(self, edit: Edit, path: Path, task: Any) -> Mapping[str, float]:
        """Write the edited model. See :meth:`EditFormat.write` and :func:`save_merged`."""
        return save_merged(edit, path, task).lost

    def detect(self, path: Path) -> bool:
        """Return whether the folder is a checkpoint of transformers."""
        return (path / "config.json").is_file()

    def read(
        self, path: Path, task: HasModel, load: Callable[[Path], HasModel], rank: int | None = None
    ) -> ImportedEdit:
        """Make an edit of a changed checkpoint. See :meth:`EditFormat.read` and :func:`diff_checkpoints`."""
        with naming(path):
            return diff_checkpoints(task, load(path), rank)
