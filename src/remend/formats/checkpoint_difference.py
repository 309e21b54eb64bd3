"""What was done to a model, as an edit: the difference of two checkpoints of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from remend.core.layers import editable_layers, expert_count, is_quantized, weight_as_matrix, weight_of
from remend.core.low_rank import LowRank
from remend.edit import Edit
from remend.errors import EditError, ModelError
from remend.fingerprint import ModelFingerprint

EXACT = 1e-6
"""Singular values below this share of the largest one are what float32 leaves of zero."""


@dataclass(frozen=True)
class CheckpointDifference:
    """What :func:`diff_checkpoints` found.

    Attributes:
        edit: the change of the model's matrices.
        lost: of each matrix, the share of its change (Frobenius norm) that the edit's rank leaves out.
        rest: parameters that were changed and that no edit can change: embeddings, biases, norms.
    """

    edit: Edit
    lost: dict[str, float]
    rest: tuple[str, ...]


@torch.no_grad()
def diff_checkpoints(before: PreTrainedModel, after: PreTrainedModel, rank: int | None = None) -> CheckpointDifference:
    """The change that makes ``after`` of ``before``, as an edit of the latter.

    Each changed matrix's difference is decomposed (singular values): what fine-tuning did is rarely of low rank, what
    was merged into a model is.

    Args:
        before: the base model.
        after: the same model, changed.
        rank: the most factor pairs that a matrix's change may have; as many as it needs by default.

    Raises:
        EditError: the models differ in more than their weights, in nothing, or in no matrix; or the rank is no number
            of pairs.
        ModelError: weights are quantised or not at hand.
    """
    if rank is not None and rank < 1:
        raise EditError(f"an edit needs a rank of at least 1, not {rank}")
    ModelFingerprint.of(before, ()).check_architecture(after, "the model before")
    matrices = {name: module for name, module in editable_layers(before) if not expert_count(module)}
    changed = dict(editable_layers(after))
    heads = _outputs(before)
    changes: dict[str, LowRank] = {}
    lost: dict[str, float] = {}
    for name, module in matrices.items():
        old, new = weight_of(module), weight_of(changed[name])
        if is_quantized(module) or is_quantized(changed[name]) or old.is_meta or new.is_meta:
            raise ModelError(f"{name} is quantised or offloaded: load both models whole, on one device")
        if name in heads or _equal(old, new):
            continue
        dense = new.to(old.device).float() - old.float()
        changes[name], lost[name] = _decomposed(weight_as_matrix(module, dense), rank)
    rest = _rest(before, after, [f"{name}.weight" for name in matrices if name not in heads])
    if not changes:
        what = f"only in {', '.join(rest[:3])}, which no edit changes" if rest else "in nothing"
        raise EditError(f"the two models differ {what}: there is no edit to be made of that")
    editor = {"name": "difference", **({"max_rank": rank} if rank else {})}
    return CheckpointDifference(Edit(changes, ModelFingerprint.of(before, changes), (), editor), lost, rest)


def _decomposed(dense: Float[Tensor, "d_out d_in"], rank: int | None) -> tuple[LowRank, float]:
    """The nearest change of some rank, and the share that is lost."""
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    kept = int((values > EXACT * values[0]).sum())
    kept = max(1, min(kept, rank or kept))
    root = values[:kept].sqrt()
    lost = float(values[kept:].square().sum().sqrt() / values.square().sum().sqrt())
    return LowRank((root[:, None] * right[:kept]).contiguous(), (root[:, None] * left[:, :kept].T).contiguous()), lost


def _equal(old: Tensor, new: Tensor) -> bool:
    """Whether all values are the same, in whatever dtypes and wherever they are kept."""
    return torch.equal(old.float(), new.to(old.device).float())


def _outputs(model: PreTrainedModel) -> set[str]:
    """The names of output layers that are an embedding's matrix too: a change of one would be one of the other."""
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(head, "weight", None) is getattr(words, "weight", None)
    return {name for name, module in editable_layers(model) if module is head and tied}


def _rest(before: PreTrainedModel, after: PreTrainedModel, covered: Sequence[str]) -> tuple[str, ...]:
    """Parameters and buffers that differ beside the covered ones."""
    old, new = before.state_dict(), after.state_dict()
    known = set(covered)
    return tuple(n for n in old if n not in known and not _equal(old[n], new[n]))
