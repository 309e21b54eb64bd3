"""Save the edited model as a checkpoint that loads wherever the base model loads."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.edit import Edit
from remend.errors import FileError
from remend.serialization import atomic_folder

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


def save_merged(
    edit: Edit, path: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shard: str = SHARD
) -> Merged:
    """Write the edited model, in the dtype in which it is loaded, as sharded safetensors with its tokenizer.

    The edit is merged into the model while it is written, and reverted bit for bit afterwards, so that beside the model
    only the edited matrices are copied.

    Args:
        edit: the edit.
        path: a folder that is not there yet, or is empty.
        model: the model that the edit is for.
        tokenizer: the model's.
        shard: the largest size of one file.

    Raises:
        WrongBaseError, PrecisionError, EditError: as :meth:`remend.Edit.merge`.
        FileError: ``path`` holds something, or cannot be written.
    """
    with atomic_folder(path, lambda there: False) as staged, edit.merge(model) as merged:
        try:
            model.save_pretrained(staged, max_shard_size=shard)
            tokenizer.save_pretrained(staged)
        except (RuntimeError, ValueError) as error:
            raise FileError(f"cannot write {path}: {str(error).splitlines()[0]}") from None
        return Merged(Path(path), dict(merged.lost))
