"""Make an edit of the difference between two checkpoints of a model, for example before and after fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.core.layers import (
    dimensions,
    editable_layers,
    expert_count,
    is_quantized,
    shared_weights,
    weight_as_matrix,
    weight_of,
)
from remend.core.low_rank import LowRank
from remend.edit import Edit
from remend.errors import EditError, ModelError, NonFiniteError
from remend.fingerprint import HasModel, ModelFingerprint, module_of
from remend.formats.base import ImportedEdit

ZERO = 1e-6
"""Singular values below this share of the largest one are zero but for float32's rounding."""


COARSE = (torch.bfloat16, torch.float16)
"""Dtypes in which checkpoints are saved that were computed in float32."""

HALF_STEP = 0.75
"""The largest rounding error of a value, in units of the dtype's step there: half a step, and room for what was added
to it in coarse numbers before."""

DEVIATIONS = 6
"""How many standard deviations the error of a factored change, which rounding disturbs, may have at any value."""


@torch.no_grad()
def diff_checkpoints(
    before: HasModel | nn.Module, after: HasModel | nn.Module, rank: int | None = None
) -> ImportedEdit:
    """Return the change from ``before`` to ``after`` as an edit of ``before``.

    The difference of each changed matrix is factored by a singular value decomposition. The change of fine-tuning is
    rarely of low rank; that of a merged edit or adapter is. Where ``after`` was stored in a coarser dtype than
    ``before``, whatever its dtype is now, only what that dtype can tell apart counts as changed, and a change of low
    rank that rounding hides is found again.

    Args:
        before: the base model.
        after: the same model, changed.
        rank: the largest rank of a matrix's change; by default, as large as the change needs.

    Raises:
        EditError: ``rank`` is less than 1, or the weights of the models do not differ, or not in a matrix.
        WrongBaseError: the models have different classes or configurations.
        NonFiniteError: a weight holds NaN or infinity.
        ModelError: weights are quantized or offloaded.
    """
    if rank is not None and rank < 1:
        raise EditError(f"an edit needs a rank of at least 1, not {rank}")
    before, after = module_of(before), module_of(after)
    _refuse_wider(before, after)
    ModelFingerprint.of(before, ()).check_architecture(after, "the model before")
    matrices = {name: module for name, module in editable_layers(before) if not expert_count(module)}
    matrices_after = dict(editable_layers(after))
    for name, module in matrices.items():
        for checked in (module, matrices_after[name]):
            if is_quantized(checked) or weight_of(checked).is_meta:
                raise ModelError(f"{name} is quantised or offloaded: load both models whole, on one device")
    _check_finite(before, "the model before")
    _check_finite(after, "the changed model")
    coarse = _stored_dtype(after)
    shared = shared_weights(before)
    changes: dict[str, LowRank] = {}
    lost: dict[str, float] = {}
    for name, module in matrices.items():
        old, new = weight_of(module).float(), weight_of(matrices_after[name]).to(weight_of(module).device).float()
        if name in shared or _equal(old, new, coarse):
            continue
        step = None if coarse is None else weight_as_matrix(module, _step(new, coarse))
        changes[name], lost[name] = _factorize(weight_as_matrix(module, new - old), step, rank)
    compared = [f"{name}.weight" for name in matrices if name not in shared]
    other_names = _other_differences(before, after, compared, coarse)
    if not changes:
        where = f"only in {', '.join(other_names[:3])}, which no edit changes" if other_names else "in nothing"
        raise EditError(f"the two models differ {where}: no edit can be made of that")
    editor = {"name": "difference", **({"max_rank": rank} if rank else {})}
    edit = Edit(changes, ModelFingerprint.of(before, changes), (), editor)
    return ImportedEdit(edit, lost, other_names, coarse if _stored_dtype(before) != coarse else None)


def _refuse_wider(before: nn.Module, after: nn.Module) -> None:
    """Raise :class:`EditError` where the changed model is the same but for more hidden units in its MLPs."""
    old, new = (
        {name: dimensions(layer) for name, layer in editable_layers(model) if not expert_count(layer)}
        for model in (before, after)
    )
    if type(before) is not type(after) or old.keys() != new.keys():
        return
    wider = [name for name, (d_in, d_out) in old.items() if new[name][0] > d_in and new[name][1] == d_out]
    narrower = [name for name in old if any(n < o for n, o in zip(new[name], old[name], strict=True))]
    if wider and not narrower:
        more = new[wider[0]][0] - old[wider[0]][0]
        raise EditError(
            f"the MLPs of the changed model are wider ({wider[0]} reads {more} hidden unit{'s' * (more > 1)} more): an "
            "edit that adds units is not read from a checkpoint. Use the folder of the edit itself, which has its "
            "requests too"
        )


def _check_finite(model: nn.Module, which: str) -> None:
    """Raise NonFiniteError where a weight of a model holds NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NonFiniteError(f"{name} of {which} holds NaN or infinity: no edit can be made of that")


def _stored_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the coarse dtype that holds all of a model's numbers, whatever their dtype is now; None if none does."""
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    for dtype in COARSE:
        if all(torch.equal(parameter.to(dtype).to(parameter.dtype), parameter) for parameter in parameters):
            return dtype
    return None


def _step(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Return the distance to the next number of a dtype at each value."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(values).exponent - 1
    return torch.ldexp(torch.full_like(values, limits.eps), exponent).clamp(min=limits.smallest_normal * limits.eps)


def _factorize(
    dense: Float[Tensor, "d_out d_in"], step: Float[Tensor, "d_out d_in"] | None, rank: int | None
) -> tuple[LowRank, float]:
    """Return the nearest change of at most ``rank``, and the share (Frobenius norm) that it leaves out.

    Args:
        dense: the change.
        step: the resolution in which the changed values were stored, where it was coarser than float32.
        rank: the largest rank.
    """
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    needed = max(1, int((values > ZERO * values[0]).sum()))
    if step is not None:
        needed = min(needed, _rank_above_rounding(dense, step, left, values, right))
    size = min(needed, rank or needed)
    root = values[:size].sqrt()
    lost = float(values[size:].square().sum().sqrt() / values.square().sum().sqrt())
    return LowRank((root[:, None] * right[:size]).contiguous(), (root[:, None] * left[:, :size].T).contiguous()), lost


def _rank_above_rounding(
    dense: Float[Tensor, "d_out d_in"],
    step: Float[Tensor, "d_out d_in"],
    left: Float[Tensor, "d_out rank"],
    values: Float[Tensor, " rank"],
    right: Float[Tensor, "rank d_in"],
) -> int:
    """Return the rank of the change if what is left out of it is no more than rounding, else the full rank.

    Rounding errors are like noise: uniform in a step, so that the largest singular value of a matrix of them is about
    their deviation times the sum of the roots of its dimensions. What is left out is then compared value by value with
    the step there; the noise also disturbs what is kept, by as much as the rows of the factors are long.
    """
    deviation = (step.square().mean() / 12).sqrt()
    noise = deviation * (dense.shape[0] ** 0.5 + dense.shape[1] ** 0.5)
    # Steps differ, so the noise of some rows is stronger: the lowest rank that explains all values is taken.
    for threshold in (2.0, 1.5, 1.1):
        size = max(1, int((values > threshold * noise).sum()))
        if size > len(values) // 4:  # no low rank
            break
        rest = dense - (left[:, :size] * values[:size]) @ right[:size]
        share = left[:, :size].square().sum(1)[:, None] + right[:size].square().sum(0)
        rounding = HALF_STEP * step + DEVIATIONS * deviation * share.sqrt()
        if bool((rest.abs() <= rounding).all()) and bool(rest.square().mean().sqrt() <= 1.3 * deviation):
            return size
    return len(values)


def _equal(old: Tensor, new: Tensor, coarse: torch.dtype | None) -> bool:
    """Return whether all values are equal, as far as the dtype in which the new ones were stored can tell."""
    new = new.to(old.device)
    if coarse is None or not old.is_floating_point():
        return torch.equal(old.float(), new.float())
    return torch.equal(old.to(coarse), new.to(coarse))


def _other_differences(
    before: nn.Module, after: nn.Module, compared: Sequence[str], coarse: torch.dtype | None
) -> tuple[str, ...]:
    """Return the names of parameters and buffers that differ, apart from those that were ``compared`` already."""
    old, new = before.state_dict(), after.state_dict()
    skipped = set(compared)
    return tuple(name for name in old if name not in skipped and not _equal(old[name], new[name], coarse))
