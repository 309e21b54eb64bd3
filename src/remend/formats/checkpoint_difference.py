"""Make an edit of the difference between two checkpoints of a model, for example before and after fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.core.layers import editable_layers, expert_count, is_quantized, weight_as_matrix, weight_of
from remend.core.low_rank import LowRank
from remend.edit import Edit
from remend.errors import EditError, ModelError
from remend.fingerprint import HasModel, ModelFingerprint, module_of
from remend.formats.base import ImportedEdit

ZERO = 1e-6
"""Singular values below this share of the largest one are zero but for float32's rounding."""


@torch.no_grad()
def diff_checkpoints(
    before: HasModel | nn.Module, after: HasModel | nn.Module, rank: int | None = None
) -> ImportedEdit:
    """Return the change from ``before`` to ``after`` as an edit of ``before``.

    The difference of each changed matrix is factored by a singular value decomposition. The change of fine-tuning is
    rarely of low rank; that of a merged edit or adapter is.

    Args:
        before: the base model.
        after: the same model, changed.
        rank: the largest rank of a matrix's change; by default, as large as the change needs.

    Raises:
        EditError: ``rank`` is less than 1, or the weights of the models do not differ, or not in a matrix.
        WrongBaseError: the models have different classes or configurations.
        ModelError: weights are quantized or offloaded.
    """
    if rank is not None and rank < 1:
        raise EditError(f"an edit needs a rank of at least 1, not {rank}")
    before, after = module_of(before), module_of(after)
    ModelFingerprint.of(before, ()).check_architecture(after, "the model before")
    matrices = {name: module for name, module in editable_layers(before) if not expert_count(module)}
    matrices_after = dict(editable_layers(after))
    tied_heads = _tied_output_layers(before)
    changes: dict[str, LowRank] = {}
    lost: dict[str, float] = {}
    for name, module in matrices.items():
        old, new = weight_of(module), weight_of(matrices_after[name])
        if is_quantized(module) or is_quantized(matrices_after[name]) or old.is_meta or new.is_meta:
            raise ModelError(f"{name} is quantised or offloaded: load both models whole, on one device")
        if name in tied_heads or _equal(old, new):
            continue
        dense = new.to(old.device).float() - old.float()
        changes[name], lost[name] = _factorize(weight_as_matrix(module, dense), rank)
    other_names = _other_differences(before, after, [f"{name}.weight" for name in matrices if name not in tied_heads])
    if not changes:
        where = f"only in {', '.join(other_names[:3])}, which no edit changes" if other_names else "in nothing"
        raise EditError(f"the two models differ {where}: no edit can be made of that")
    editor = {"name": "difference", **({"max_rank": rank} if rank else {})}
    return ImportedEdit(Edit(changes, ModelFingerprint.of(before, changes), (), editor), lost, other_names)


def _factorize(dense: Float[Tensor, "d_out d_in"], rank: int | None) -> tuple[LowRank, float]:
    """Return the nearest change of at most ``rank``, and the share (Frobenius norm) that it leaves out."""
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    nonzero = int((values > ZERO * values[0]).sum())
    size = max(1, min(nonzero, rank or nonzero))
    root = values[:size].sqrt()
    lost = float(values[size:].square().sum().sqrt() / values.square().sum().sqrt())
    return LowRank((root[:, None] * right[:size]).contiguous(), (root[:, None] * left[:, :size].T).contiguous()), lost


def _equal(old: Tensor, new: Tensor) -> bool:
    """Return whether all values are equal, whatever the dtypes and devices."""
    return torch.equal(old.float(), new.to(old.device).float())


def _tied_output_layers(model: Any) -> set[str]:
    """Return the name of the output layer if it shares its matrix with the embeddings, which an edit cannot change."""
    if not hasattr(model, "get_output_embeddings"):
        return set()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(head, "weight", None) is getattr(embeddings, "weight", None)
    return {name for name, module in editable_layers(model) if module is head and tied}


def _other_differences(before: nn.Module, after: nn.Module, compared: Sequence[str]) -> tuple[str, ...]:
    """Return the names of parameters and buffers that differ, apart from those that were ``compared`` already."""
    old, new = before.state_dict(), after.state_dict()
    skipped = set(compared)
    return tuple(name for name in old if name not in skipped and not _equal(old[name], new[name]))
