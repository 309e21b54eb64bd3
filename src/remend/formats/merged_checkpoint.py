"""Save the edited model as a checkpoint that loads wherever the base model loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from remend.core.example_inputs import example_inputs
from remend.core.low_rank_hooks import frozen
from remend.edit import Edit
from remend.errors import FileError, ModelError, naming
from remend.fingerprint import HasModel
from remend.formats.base import EditFormat, ImportedEdit
from remend.formats.checkpoint_difference import diff_checkpoints
from remend.formats.checkpoint_width import of_one_width
from remend.saved_folders import atomic_folder

SHARD = "5GB"
"""The largest file of a checkpoint."""

OUTPUT_TOLERANCE, COARSE_OUTPUT_TOLERANCE = 1e-3, 0.1
"""How far the outputs of a model with wider MLPs may be off (Frobenius norm), and the same in half precision."""


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

    Where the edit adds units to MLPs, all MLPs of the checkpoint are as wide as the widest: the others get units whose
    weights are zero. The wider model is run, and has to give what the model gives with the edit beside it, before
    anything is written.

    Args:
        edit: the edit.
        path: a folder that is not there yet, or is empty.
        task: the base model.
        shard: the largest size of one file.

    Raises:
        WrongBaseError, PrecisionError, EditError: as :meth:`remend.Edit.merge`.
        ModelError: no setting of the model's configuration is the width of its MLPs.
        FileError: ``path`` holds something, or cannot be written.
    """
    with ExitStack() as contexts:
        staged = contexts.enter_context(atomic_folder(path, lambda existing: False))
        wanted = _outputs(edit, task) if any(change.reads for change in edit.changes.values()) else None
        merged = contexts.enter_context(edit.merge(task))
        if wanted is not None:
            contexts.enter_context(of_one_width(task.model, merged.widening.mlps))
            _check_outputs(task.model, wanted)
        try:
            task.model.save_pretrained(staged, max_shard_size=shard)
            task.processor.save_pretrained(staged)
        except (RuntimeError, ValueError) as error:
            raise FileError(f"cannot write {path}: {str(error).splitlines()[0]}") from None
        return Merged(Path(path), dict(merged.lost))


def _outputs(edit: Edit, task: HasModel) -> Tensor:
    """Return what a model gives on an arbitrary input with an edit beside it."""
    with edit.applied(task) as model:
        return _run(model)


@torch.no_grad()
def _run(model: nn.Module) -> Tensor:
    with frozen(model):
        outputs = model(**example_inputs(model))
    tensor: Tensor = next(iter(outputs.values()))
    return tensor.cpu().double()


def _check_outputs(model: nn.Module, wanted: Tensor) -> None:
    """Raise :class:`ModelError` unless a model gives on an arbitrary input what is wanted."""
    error = float((_run(model) - wanted).norm() / wanted.norm().clamp(min=1e-30))
    if not error <= (OUTPUT_TOLERANCE if _is_fine(model) else COARSE_OUTPUT_TOLERANCE):
        raise ModelError(
            f"with wider MLPs, this {type(model).__name__} gives other outputs ({error:.1%} off) than with the edit "
            "beside it: keep the edit as it is (a folder)"
        )


def _is_fine(model: nn.Module) -> bool:
    return all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())


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
