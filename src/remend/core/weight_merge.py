"""Write changes into a model's weights, with an exact way back."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from remend.core.exclusive_execution import forget_compiled, lock_of
from remend.core.layers import dense_in_weight_layout, raise_if_shared, weight_of
from remend.core.low_rank import LowRank
from remend.core.mlp_widening import Widening, widen
from remend.core.weight_checks import MERGE_TOLERANCE, refuse_unwritable
from remend.errors import PrecisionError


class MergedEdit:
    """An edit that is merged into a model's weights; :meth:`revert` restores the originals. Also a context manager.

    Attributes:
        lost: for each changed layer, the share of its change (Frobenius norm) that was lost to rounding.
        widening: the MLPs that units made wider.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        originals: Mapping[str, Tensor],
        lost: Mapping[str, float],
    ) -> None:
        self._lock, self._weights, self._originals = lock_of(model), dict(weights), dict(originals)
        self.lost = dict(lost)
        self.widening = Widening()

    def widen(self, model: nn.Module, changes: Mapping[str, LowRank]) -> None:
        """Write units too (:func:`remend.core.mlp_widening.widen`)."""
        self.widening = widen(model, changes)
        self.lost |= self.widening.lost

    @torch.no_grad()
    def revert(self) -> None:
        """Restore the original weights bit for bit. Reverting twice does no harm."""
        with self._lock:
            self.widening.restore()
            # Copied back, not subtracted: (w + ΔW) - ΔW is not w in floating point.
            for name, original in self._originals.items():
                self._weights[name].copy_(original)
            self._originals.clear()
        forget_compiled()

    def __enter__(self) -> MergedEdit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()


@torch.no_grad()
def merge_changes(model: nn.Module, modules: Mapping[str, nn.Module], changes: Mapping[str, LowRank]) -> MergedEdit:
    """Write changes into the weights of a model's modules and return the handle that restores the original weights.

    All weights are written, or none. The caller holds the model's lock (:func:`lock_of`) and has checked under it that
    the weights are those of the base, so that no weight that another thread merges is taken for an original.

    Args:
        model: the model.
        modules: its layers by name, at least those that are changed.
        changes: their changes; those that read another layer become hidden units of its MLP.

    Raises:
        PrecisionError: rounding to the weights' dtype would lose more than :data:`MERGE_TOLERANCE` of the edit, or a
            weight is quantised.
        EditError: a weight is offloaded between calls, or is also another module's; or a change is none of a weight.
        ModelError: units cannot be added to their MLP.
    """
    units = {name: change for name, change in changes.items() if change.reads}
    modules = {name: modules[name] for name in changes if name not in units}
    refuse_unwritable(modules)
    raise_if_shared(model, modules, "merging would change that too. Keep the edit as a side branch (apply)")
    merged: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    for name, module in modules.items():
        weight = weight_of(module)
        # In float64 for a weight of float64, whose digits float32 would cut; in float32 for others.
        wide = torch.promote_types(weight.dtype, torch.float32)
        dense = dense_in_weight_layout(module, changes[name].to(weight.device, wide))
        # Rounded once: in the weight's dtype, the change would be rounded before it is added.
        merged[name] = (weight.to(wide) + dense).to(weight.dtype)
        rounded = (merged[name].to(wide) - weight.to(wide) - dense).norm()
        lost[name] = float(rounded / dense.norm().clamp(min=1e-30))
        if not merged[name].isfinite().all():
            raise PrecisionError(
                f"{name}: with the edit, the weight exceeds what {weight.dtype} can hold. Keep it as a side branch "
                "(apply), or load the model in float32 and merge there; no weight was changed"
            )
        if lost[name] > MERGE_TOLERANCE and dense.norm() > 0:
            raise PrecisionError(
                f"{name}: {weight.dtype} would round away {lost[name]:.0%} of the edit. Keep it as a side branch "
                "(apply), or load the model in float32 and merge there; no weight was changed"
            )
    # Every weight is checked before the first is written, so that a refusal leaves the model as it was.
    originals = {name: weight_of(module).detach().clone() for name, module in modules.items()}
    handle = MergedEdit(model, {name: weight_of(module) for name, module in modules.items()}, originals, lost)
    try:
        for name, module in modules.items():
            weight_of(module).copy_(merged[name])
        if units:
            handle.widen(model, units)
    except BaseException:
        handle.revert()
        raise
    forget_compiled()
    return handle
