"""``Edit``: a low-rank change of a model's weights, to apply, revert, merge, add, scale, compress, save and load."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remend.core.layers import (
    dense_in_weight_layout,
    dimensions,
    execution_device,
    expert_count,
    is_quantized,
    weight_of,
)
from remend.core.low_rank import LowRank, concatenate, in_one_dtype
from remend.core.low_rank_hooks import attach_hooks, remove_hooks
from remend.errors import EditError, FileError, PrecisionError, RequestError
from remend.fingerprint import HasModel, ModelFingerprint, find_modules, module_of
from remend.request import EditRequest
from remend.serialization import get_field, read_folder, write_folder

EDIT_FORMAT = "remend.edit/1"
"""The format in the manifest of a saved edit."""

MERGE_TOLERANCE = 0.25
"""The largest share of an edit (Frobenius norm) that merging may lose to rounding before it refuses."""


def utc_now() -> str:
    """Return the current time as files give it: ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, eq=False)
class Edit:
    """A low-rank change of some of a model's weight matrices, with the requests that it answers.

    An edit leaves nothing on the model but the hooks of :meth:`apply` or the weights of :meth:`merge`, until reverted.

    Attributes:
        changes: for each module, the change ΔW = deltaᵀu of its weight, step size and sign included.
        base: the model that it was made for; other models are refused.
        requests: the edit requests that it was made from.
        editor: the editor's name and settings, such as ``{"name": "mend", "rank": 256}``; with ``scale`` if the edit
            was scaled.
        created: the time of its creation, ISO 8601, UTC.
    """

    changes: Mapping[str, LowRank]
    base: ModelFingerprint
    requests: tuple[EditRequest, ...] = ()
    editor: Mapping[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        changes: dict[str, LowRank] = {}
        for name, change in self.changes.items():
            try:
                u, delta = in_one_dtype(change.u, change.delta)
            except EditError as error:
                raise EditError(f"the factors of the change of {name} {error}") from None
            changes[name] = replace(change, u=u, delta=delta)
            # The product of the factors' norms bounds the norm of the change, whose square has to be finite too.
            norms = [torch.linalg.vector_norm(factor.float()) for factor in (u, delta)]
            if not (norms[0].square() * norms[1].square()).isfinite():
                raise EditError(
                    f"the change of {name} holds NaN or infinity, or is too large for any number; it would ruin the "
                    "model and is refused"
                )
        object.__setattr__(self, "changes", MappingProxyType(changes))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: rank {change.rank}" for name, change in self.changes.items())
        return f"Edit({len(self.requests)} requests for {self.base.name!r}; {sizes})"

    # -- on a model ----------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module | HasModel) -> AppliedEdit:
        """Add the edit to ``model`` as forward hooks and return the handle that removes it.

        No weight is written. Several edits can be applied at once, and reverted in any order.

        Raises:
            WrongBaseError: the edit was made for another model; nothing is applied.
        """
        modules = self._modules(module_of(model))
        changes = {name: change.to(execution_device(modules[name])) for name, change in self.changes.items()}
        return AppliedEdit(attach_hooks(modules, changes))

    @contextmanager
    def applied(self, model: nn.Module | HasModel) -> Iterator[nn.Module]:
        """Apply the edit within the context, and revert it afterwards, also after an exception."""
        handle = self.apply(model)
        try:
            yield module_of(model)
        finally:
            handle.revert()

    @torch.no_grad()
    def merge(self, model: nn.Module | HasModel) -> MergedEdit:
        """Write the edit into the weights and return the handle that restores the original weights, bit for bit.

        All weights are written, or none.

        Raises:
            WrongBaseError: the edit was made for another model.
            PrecisionError: rounding to the weights' dtype would lose more than :data:`MERGE_TOLERANCE` of the edit, or
                a weight is quantised.
            EditError: a weight is offloaded between calls.
        """
        modules = self._modules(module_of(model))
        _refuse_unwritable(modules)
        merged: dict[str, Tensor] = {}
        lost: dict[str, float] = {}
        for name, module in modules.items():
            weight = weight_of(module)
            dense = dense_in_weight_layout(module, self.changes[name].to(weight.device, torch.float32))
            # Rounded once: in the weight's dtype, the change would be rounded before it is added.
            merged[name] = (weight.float() + dense).to(weight.dtype)
            rounded = (merged[name].float() - weight.float() - dense).norm()
            lost[name] = float(rounded / dense.norm().clamp(min=1e-30))
            if lost[name] > MERGE_TOLERANCE and dense.norm() > 0:
                raise PrecisionError(
                    f"{name}: {weight.dtype} would round away {lost[name]:.0%} of the edit. Keep it as a side branch "
                    "(apply), or load the model in float32 and merge there; no weight was changed"
                )
        # Every weight is checked before the first is written, so that a refusal leaves the model as it was.
        originals = {name: weight_of(module).detach().clone() for name, module in modules.items()}
        handle = MergedEdit({name: weight_of(module) for name, module in modules.items()}, originals, lost)
        try:
            for name, module in modules.items():
                weight_of(module).copy_(merged[name])
        except BaseException:
            handle.revert()
            raise
        return handle

    def _modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules to change, after checking that ``model`` is the one that the edit is for."""
        self.base.check(model, "this edit")
        modules = find_modules(model, self.changes)
        for name, module in modules.items():
            change = self.changes[name]
            if dimensions(module) != (change.u.shape[-1], change.delta.shape[-1]):
                raise EditError(
                    f"{name} has shape {dimensions(module)}, the edit {change.u.shape}, {change.delta.shape}"
                )
            count = (
                0 if change.experts is None else int(torch.cat([change.experts, change.experts.new_zeros(1)]).max()) + 1
            )
            if (change.experts is None) != (expert_count(module) == 0) or count > expert_count(module):
                raise EditError(f"{name} has {expert_count(module)} experts, the edit changes {count}")
        return modules

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def __add__(self, other: Edit) -> Edit:
        """Return an edit whose ΔW is the sum of both (paper, section 3.1).

        Raises:
            EditError: they are for different bases, or each holds what its editor adds to every edit, which would count
                twice.
        """
        if not isinstance(other, Edit):
            return NotImplemented
        if not self.base.is_compatible(other.base):
            raise EditError(
                f"these edits are for different bases ({self.base.name!r}, {other.base.name!r}) and cannot be added; "
                "make both from the same unedited model"
            )
        if self.editor.get("shared") and other.editor.get("shared"):
            raise EditError(
                f"each of two edits of {self.editor['name']!r} holds what training changed in the model, which would "
                "count twice: have the editor make one edit of all requests"
            )
        changes = dict(self.changes)
        for name, change in other.changes.items():
            changes[name] = concatenate([changes[name], change]) if name in changes else change
        return Edit(changes, self.base.union(other.base), self.requests + other.requests, self.editor)

    def scaled(self, factor: float) -> Edit:
        """Return the edit with its changes times ``factor``, which the manifest records; 0 changes nothing."""
        changes = {name: change.scaled(factor) for name, change in self.changes.items()}
        return replace(self, changes=changes, editor={**self.editor, "scale": factor * self.editor.get("scale", 1.0)})

    def compressed(self, rank: int) -> Edit:
        """Return the nearest edit whose changes have at most ``rank`` factor pairs each.

        The manifest records the rank and, under ``lost``, the share ‖ΔW − ΔW'‖ / ‖ΔW‖ of each change that is lost.

        Raises:
            EditError: ``rank`` is less than 1.
        """
        if rank < 1:
            raise EditError(f"an edit needs a rank of at least 1, not {rank}")
        cut = {name: change.recompress(rank) for name, change in self.changes.items() if change.rank > rank}
        lost = dict.fromkeys(self.changes, 0.0)
        lost |= {name: _relative_difference(self.changes[name], change) for name, change in cut.items()}
        return replace(self, changes={**self.changes, **cut}, editor={**self.editor, "max_rank": rank, "lost": lost})

    def norms(self) -> dict[str, float]:
        """Return ‖ΔW‖ (Frobenius) of each module."""
        return {name: float(change.norm()) for name, change in self.changes.items()}

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the edit to a folder, as factors (safetensors) and a readable manifest (JSON); return the folder."""
        tensors, ranks, gates = {}, {}, {}
        for name, change in self.changes.items():
            tensors[f"{name}.u"], tensors[f"{name}.delta"] = change.u, change.delta
            ranks[name] = change.rank
            if change.experts is not None:
                tensors[f"{name}.experts"] = change.experts
            if change.gate:
                gates[name] = change.gate
        manifest = {
            "created": self.created,
            "base": asdict(self.base),
            "editor": dict(self.editor),
            "requests": [request.to_json() for request in self.requests],
            "ranks": ranks,
            "norms": self.norms(),
            **({"gates": gates} if gates else {}),
        }
        return write_folder(path, EDIT_FORMAT, manifest, tensors)

    @staticmethod
    def load(path: str | Path) -> Edit:
        """Read an edit that :meth:`save` wrote, from a folder or the hub (``hf:owner/name``).

        Raises:
            FileError: it is missing, damaged, altered, or of a version that this release does not know.
        """
        manifest, tensors = read_folder(path, EDIT_FORMAT)
        base = ModelFingerprint.from_manifest(get_field(manifest, "base", dict, path), path)
        ranks = get_field(manifest, "ranks", dict, path)
        gates = get_field(manifest, "gates", dict, path) if "gates" in manifest else {}
        changes = {name: _read_change(tensors, name, gates.get(name, 0.0), path) for name in ranks}
        tensor_count = sum(2 if change.experts is None else 3 for change in changes.values())
        if len(tensors) != tensor_count or any(changes[name].rank != rank for name, rank in ranks.items()):
            raise FileError(f"{path}: the factors are not those that the manifest lists; it was altered")
        if changes.keys() - base.weights.keys():
            raise FileError(f"{path}: the base does not cover every changed module; it was altered")
        try:
            requests = tuple(
                EditRequest.from_json(json.dumps(request)) for request in get_field(manifest, "requests", list, path)
            )
        except ValidationError as error:
            raise FileError(f"{path}: a request in the manifest is malformed ({error.errors()[0]['msg']})") from None
        except RequestError as error:
            raise FileError(f"{path}: a request in the manifest is malformed ({error})") from None
        created = get_field(manifest, "created", str, path)
        return Edit(changes, base, requests, _read_editor(manifest, path), created)


def _relative_difference(change: LowRank, approximation: LowRank) -> float:
    """Return ‖ΔW − ΔW'‖ / ‖ΔW‖."""
    # In float64: the difference of nearly equal changes cancels most of float32's digits.
    exact, near = (replace(c, u=c.u.double(), delta=c.delta.double()) for c in (change, approximation))
    return float(concatenate([exact, near.scaled(-1.0)]).norm() / exact.norm().clamp(min=1e-30))


def _read_editor(manifest: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return what a manifest says of the editor, after checking the types of what is read of it later."""
    editor: dict[str, Any] = get_field(manifest, "editor", dict, path)
    for key, kind in {"name": str, "shared": bool, "max_rank": int, "lost": dict}.items():
        if key in editor:
            get_field(editor, key, kind, path)
    if isinstance(scale := editor.get("scale", 1.0), bool) or not isinstance(scale, int | float):
        raise FileError(f"{path}: 'scale' of the editor should be a number, it is {type(scale).__name__}")
    return editor


def _read_change(tensors: Mapping[str, Tensor], name: str, gate: object, path: str | Path) -> LowRank:
    """Return the change of one module from a file's tensors.

    Raises:
        FileError: factors are missing or do not fit together, or the gate is out of range.
    """
    u, delta = tensors.get(f"{name}.u"), tensors.get(f"{name}.delta")
    if u is None or delta is None or u.dim() != 2 or delta.dim() != 2 or u.shape[0] != delta.shape[0]:
        raise FileError(f"{path}: the factors of {name} are missing or do not fit together; it was altered")
    if not u.shape[1] or not delta.shape[1]:
        raise FileError(f"{path}: {name} would be a matrix of {u.shape[1]} → {delta.shape[1]}; it was altered")
    if isinstance(gate, bool) or not isinstance(gate, int | float) or not 0 <= gate < 1:
        raise FileError(f"{path}: the gate of {name} should be a number from 0 to below 1, it is {gate!r}")
    experts = tensors.get(f"{name}.experts")
    if experts is not None and (
        experts.dtype not in (torch.int32, torch.int64) or experts.shape != u.shape[:1] or bool((experts < 0).any())
    ):
        raise FileError(f"{path}: the experts of {name} do not fit its factors; it was altered")
    try:
        return LowRank(*in_one_dtype(u, delta), float(gate), experts)
    except EditError as error:
        raise FileError(f"{path}: the factors of {name} {error}; it was altered") from None


def _refuse_unwritable(modules: Mapping[str, nn.Module]) -> None:
    """Raise where a layer's weight cannot be written: it is quantized (PrecisionError) or offloaded (EditError)."""
    for name, module in modules.items():
        if is_quantized(module):
            raise PrecisionError(
                f"{name} is quantised ({type(module).__name__}), and requantising would alter more than the edit does. "
                "Keep it as a side branch (apply), or make the edit on the unquantised model and merge there; no "
                "weight was changed"
            )
        if weight_of(module).is_meta:
            raise EditError(
                f"{name} is offloaded: what is written to it now would be gone at the next call. Keep the edit as a "
                "side branch (apply), or load the model on one device and merge there; no weight was changed"
            )


class AppliedEdit:
    """An edit that is applied to a model as hooks; :meth:`revert` removes it. Reverting twice does no harm."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        self._handles = list(handles)

    def revert(self) -> None:
        """Remove the edit's hooks from the model. The weights were never touched."""
        remove_hooks(self._handles)
        self._handles.clear()


class MergedEdit:
    """An edit that is merged into a model's weights; :meth:`revert` restores the originals. Also a context manager.

    Attributes:
        lost: for each matrix, the share of its change (Frobenius norm) that was lost to rounding.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], originals: Mapping[str, Tensor], lost: Mapping[str, float]
    ) -> None:
        self._weights, self._originals = dict(weights), dict(originals)
        self.lost = lost

    @torch.no_grad()
    def revert(self) -> None:
        """Restore the original weights bit for bit."""
        # Copied back, not subtracted: (w + ΔW) - ΔW is not w in floating point.
        for name, original in self._originals.items():
            self._weights[name].copy_(original)
        self._originals.clear()

    def __enter__(self) -> MergedEdit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()
