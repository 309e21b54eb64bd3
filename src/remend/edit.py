"""``Edit``: a change of a model, of low rank or of hidden units, to apply, merge, revert, add, scale, save and load."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remend.core.exclusive_execution import forget_compiled, lock_of
from remend.core.layers import dimensions, execution_device, expert_count
from remend.core.low_rank import LowRank, add_up, concatenate, in_one_dtype, layer_names, without_pairs
from remend.core.low_rank_hooks import attach_hooks, remove_hooks
from remend.core.response import LINEAR, Response
from remend.core.weight_merge import MergedEdit, merge_changes
from remend.errors import EditError, FileError, RequestError
from remend.fingerprint import HasModel, ModelFingerprint, find_modules, module_of
from remend.request import SEPARATOR_NAMES, EditRequest
from remend.saved_folders import get_field, read_folder, write_folder

EDIT_FORMAT = "remend.edit/1"
"""The format in the manifest of a saved edit."""

RESPONSES_FORMAT = "remend.edit/2"
"""That of an edit with responses that are not linear: releases that would take them for linear refuse it."""

KEYS_FORMAT = "remend.edit/3"
"""That of an edit with keys: releases that would add it up without looking at them refuse it."""

EDIT_FORMATS = (EDIT_FORMAT, RESPONSES_FORMAT, KEYS_FORMAT)
"""The formats of saved edits."""

NORM_TOLERANCE = 1e-3
"""How far, as a share, a stored norm may be from the one of the factors: the order of sums differs between machines."""
ALIGNMENT = 64
"""Bytes: the addresses of torch's own tensors are multiples of it."""


def utc_now() -> str:
    """Return the current time as files give it: ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of some of a model's layers, with the requests that it answers.

    There are two kinds of change, which may stand in one edit: a change of a weight matrix of low rank, and hidden
    units that are added to an MLP (:class:`LowRank <remend.core.low_rank.LowRank>` is the class of both). An edit
    leaves nothing on the model but the hooks of :meth:`apply` or the weights of :meth:`merge`, until reverted.

    Attributes:
        changes: for each layer whose output changes, the change, step size and sign included. The key of units is the
            MLP's narrowing projection.
        base: the model that it was made for, with respect to the layers that are changed or read; others are refused.
        requests: the edit requests that it was made from.
        editor: the editor's name and settings, such as ``{"name": "mend", "rank": 256}``; with ``scale`` if the edit
            was scaled.
        created: the time of its creation, ISO 8601, UTC.
        separators: of each request, what stood between its prompt and its target when the edit was made; None where
            they were not one text. Empty where nothing is known.
        ends: of each request, whether its target was closed with the end token, as by a model that ends its answers
            itself; None where targets have no end. Empty where nothing is known.
        taken: whether the model gave all targets when it was asked with this very edit; None where nobody asked.
    """

    changes: Mapping[str, LowRank]
    base: ModelFingerprint
    requests: tuple[EditRequest, ...] = ()
    editor: Mapping[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=utc_now)
    separators: tuple[str | None, ...] = ()
    ends: tuple[bool | None, ...] = ()
    taken: bool | None = None

    def __post_init__(self) -> None:
        changes = {name: _checked_change(name, change) for name, change in self.changes.items()}
        object.__setattr__(self, "changes", MappingProxyType(changes))
        if missing := {change.reads for change in changes.values() if change.reads} - self.base.weights.keys():
            raise EditError(
                f"the edit reads {min(missing)}, which its base does not cover: make the fingerprint of all layers "
                "that it changes or reads (layer_names)"
            )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {change.describe}" for name, change in self.changes.items())
        between = dict.fromkeys(SEPARATOR_NAMES[text] for text in self.separators if text is not None)
        after = f", targets after {' or '.join(between)}" if between else ""
        taken = {None: "not checked", True: "taken", False: "not taken"}[self.taken]
        return f"Edit({len(self.requests)} requests for {self.base.name!r}{after}; {taken}; {sizes})"

    # -- on a model ----------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module | HasModel) -> AppliedEdit:
        """Add the edit to ``model`` as forward hooks and return the handle that removes it.

        No weight is written. Several edits can be applied at once, and reverted in any order. What ``torch.compile``
        compiled is compiled anew at its next call, with the edit in it. The model's first forward pass checks that it
        calls every layer that the edit changes, and raises an :class:`EditError` if it does not.

        Raises:
            WrongBaseError: the edit was made for another model; nothing is applied.
        """
        module = module_of(model)
        with lock_of(module):
            modules = self._modules(module)
            changes = {name: change.to(execution_device(modules[name])) for name, change in self.changes.items()}
            return AppliedEdit(attach_hooks(modules, changes, checked=module))

    @contextmanager
    def applied(self, model: nn.Module | HasModel) -> Iterator[nn.Module]:
        """Apply the edit within the context, and revert it afterwards, also after an exception."""
        handle = self.apply(model)
        try:
            yield model if isinstance(model, nn.Module) else module_of(model)
        finally:
            handle.revert()

    def merge(self, model: nn.Module | HasModel) -> MergedEdit:
        """Write the edit into the weights and return the handle that restores the original weights, bit for bit.

        MLPs that units are added to get wider: their layers hold other parameters until the edit is reverted, and the
        model is no checkpoint of one width (:func:`remend.formats.save_merged` writes one). All weights are written, or
        none.

        Raises:
            WrongBaseError: the edit was made for another model, or another edit is merged into its matrices.
            PrecisionError: rounding to the weights' dtype would lose more than a quarter of the edit
                (:data:`MERGE_TOLERANCE <remend.core.weight_checks.MERGE_TOLERANCE>`), or a weight is quantised.
            EditError: a weight is offloaded between calls, or is also another module's (tied embeddings); or a change
                is neither one of a weight nor such units as its MLP has.
            ModelError: the MLP that units are for computes in another way than units can be added to.
        """
        module = module_of(model)
        with lock_of(module):
            return merge_changes(module, self._modules(module), self.changes)

    def _modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules to change, after checking that ``model`` is the one that the edit is for."""
        self.base.check(model, "this edit")
        modules = find_modules(model, layer_names(self.changes))
        names = {modules[name]: name for name in self.changes}
        if aliases := [name for name in self.changes if names[modules[name]] != name]:
            raise EditError(
                f"{aliases[0]} and {names[modules[aliases[0]]]} are one module, which the model calls several times: "
                "an edit changes it under one name"
            )
        for name, change in self.changes.items():
            module, read = modules[name], modules[change.reads or name]
            if (dimensions(read)[0], dimensions(module)[1]) != (change.u.shape[-1], change.delta.shape[-1]):
                raise EditError(
                    f"{name} has shape {dimensions(module)}, the edit {change.u.shape}, {change.delta.shape}"
                    + (f", whose first reads {change.reads} of shape {dimensions(read)}" if change.reads else "")
                )
            if change.reads and (expert_count(module) or expert_count(read)):
                raise EditError(
                    f"{name if expert_count(module) else change.reads} holds several experts' matrices, to which no "
                    "hidden units can be added: edit a block without experts, or make a change of low rank"
                )
            count = (
                0 if change.experts is None else int(torch.cat([change.experts, change.experts.new_zeros(1)]).max()) + 1
            )
            if (change.experts is None) != (expert_count(module) == 0) or count > expert_count(module):
                raise EditError(f"{name} has {expert_count(module)} experts, the edit changes {count}")
        return modules

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def __add__(self, other: Edit) -> Edit:
        """Return the sum of both: :meth:`sum`."""
        if not isinstance(other, Edit):
            return NotImplemented
        return Edit.sum([self, other])

    @staticmethod
    def sum(edits: Sequence[Edit]) -> Edit:
        """Return one edit of several that were made of the same unedited model, each by itself.

        What each adds is the sum of all (paper, section 3.1). Edits that know the inputs they were made for
        (:attr:`LowRank.keys`) also answer at those of the others: each of them still adds there what it adds by itself
        (:func:`remend.core.low_rank.add_up`). So the sum is the same in whichever steps it is made, up to rounding, and
        bit for bit that of the same edits in the same order: an edit is reverted by adding up all the others.

        Where the editors differ, or what was done to the edits since (scale, rank), the manifest of the sum holds all
        under ``parts``.

        Raises:
            EditError: there is no edit, or they are for different bases, or several hold what their editor adds to
                every edit, which would count twice; or one changes by low rank what another one adds units to, or units
                respond differently.
        """
        if not edits:
            raise EditError("there is no edit to add up: give at least one")
        first, *others = edits
        if not others:
            return first
        for other in others:
            if not first.base.is_compatible(other.base):
                raise EditError(
                    f"these edits are for different bases ({first.base.name!r}, {other.base.name!r}) and cannot be "
                    "added; make both from the same unedited model"
                )
        if len(shared := [edit for edit in edits if edit.editor.get("shared")]) > 1:
            raise EditError(
                f"each of two edits of {shared[0].editor['name']!r} holds what training changed in the model, which "
                "would count twice: have the editor make one edit of all requests"
            )
        changes: dict[str, LowRank] = {}
        before = list(itertools.accumulate((len(edit.requests) for edit in edits), initial=0))
        for name in dict.fromkeys(name for edit in edits for name in edit.changes):
            parts = [
                _renumbered(edit.changes[name], partial(operator.add, first))
                for edit, first in zip(edits, before, strict=False)
                if name in edit.changes
            ]
            try:
                changes[name] = add_up(parts) if len(parts) > 1 else parts[0]
            except EditError as error:
                raise EditError(f"{name}: {error}") from None
        base, editor = first.base, first.editor
        for other in others:
            base, editor = base.union(other.base), _editor_of_sum(editor, other.editor)
        total = Edit(changes, base, tuple(request for edit in edits for request in edit.requests), editor)
        separators = tuple(separator for edit in edits for separator in edit.separators_by_request())
        ends = tuple(end for edit in edits for end in edit.ends_by_request())
        return replace(total, separators=separators, ends=ends)

    def without(self, *numbers: int) -> Edit:
        """Return the edit without some of its requests: all others still add what they did, as :meth:`sum` has it.

        Args:
            numbers: which of :attr:`requests`, counted from 0.

        Raises:
            EditError: there is no such request or no other one, it is not known what of the edit is of them, or that is
                of other requests, too, such as those about the same subject.
        """
        count, left_out = len(self.requests), set(numbers)
        if unknown := sorted(number for number in left_out if not 0 <= number < count):
            raise EditError(f"the edit has {count} requests, of which request {unknown[0]} cannot be left out")
        if not left_out:
            return self
        if len(left_out) == count:
            raise EditError(f"the edit has {count} request{'s' * (count > 1)}, which cannot all be left out")
        new_number = {old: new for new, old in enumerate(n for n in range(count) if n not in left_out)}
        changes = {}
        for name, change in self.changes.items():
            if change.owners is None or change.keys is None:
                raise EditError(
                    f"of {name} it is not known what each request changes: make an edit of all the other requests"
                )
            own = [pair for pair, owners in enumerate(change.owners) if left_out.intersection(owners)]
            if shared := sorted({other for pair in own for other in change.owners[pair]} - left_out):
                prompts = ", ".join(repr(str(self.requests[other].prompt)[:60]) for other in shared[:3])
                listed = ", ".join(
                    str(n) for n in sorted({n for pair in own for n in change.owners[pair]} & left_out)[:3]
                )
                raise EditError(
                    f"request {listed} shares what it adds with {prompts}: leave that out, too, or make an edit of all "
                    "the other requests"
                )
            changes[name] = _renumbered(without_pairs(change, own), new_number.__getitem__)
        rest: dict[str, Any] = {
            key: tuple(value for index, value in enumerate(of_requests) if index not in left_out)
            for key, of_requests in (("requests", self.requests), ("separators", self.separators), ("ends", self.ends))
        }
        return replace(self, changes=changes, taken=None, created=utc_now(), **rest)

    def beside(self, active: Sequence[Edit]) -> Edit:
        """Return what this edit changes of a model in which the sum of others acts: :meth:`sum` with it less without.

        Raises:
            EditError: they do not add up.
        """
        if not active:
            return self
        without, total = Edit.sum(active), Edit.sum([*active, self])
        changes = dict(self.changes)
        for name, change in self.changes.items():
            acting, all_of_it = without.changes.get(name), total.changes[name]
            # Where keys are known, pairs that act already add other values than before; the last ones are its own.
            if acting is not None and all_of_it.keys is not None and change.rank:
                delta = all_of_it.delta.clone()
                delta[: acting.rank] -= acting.delta
                changes[name] = replace(all_of_it, delta=delta, keys=None, owners=None)
        return replace(self, changes=changes)

    def scaled(self, factor: float) -> Edit:
        """Return the edit with its changes times ``factor``, which the manifest records; 0 changes nothing."""
        changes = {name: change.scaled(factor) for name, change in self.changes.items()}
        scale = factor * self.editor.get("scale", 1.0)
        return replace(self, changes=changes, editor={**self.editor, "scale": scale}, taken=None)

    def compressed(self, rank: int) -> Edit:
        """Return the nearest edit whose changes have at most ``rank`` factor pairs each.

        The manifest records the rank and, under ``lost``, the share ‖ΔW − ΔW'‖ / ‖ΔW‖ of each change that is lost.

        Raises:
            EditError: ``rank`` is less than 1, or a change of more factor pairs is no change of a weight (units).
        """
        if rank < 1:
            raise EditError(f"an edit needs a rank of at least 1, not {rank}")
        cut = {name: change.recompress(rank) for name, change in self.changes.items() if change.rank > rank}
        lost = dict.fromkeys(self.changes, 0.0)
        lost |= {name: _relative_difference(self.changes[name], change) for name, change in cut.items()}
        editor = {**self.editor, "max_rank": rank, "lost": lost}
        return replace(self, changes={**self.changes, **cut}, editor=editor, taken=None)

    def separators_by_request(self) -> tuple[str | None, ...]:
        """Return what stood between prompt and target of each request; None where nothing is known."""
        return self.separators or (None,) * len(self.requests)

    def ends_by_request(self) -> tuple[bool | None, ...]:
        """Return whether each target was closed with the end token; None where nothing is known."""
        return self.ends or (None,) * len(self.requests)

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing: every ΔW is zero."""
        return not any(self.norms().values())

    def norms(self) -> dict[str, float]:
        """Return ‖ΔW‖ (Frobenius) of each changed layer; of a unit, ‖delta‖ ‖u‖."""
        return {name: float(change.norm()) for name, change in self.changes.items()}

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the edit to a folder, as factors (safetensors) and a readable manifest (JSON); return the folder."""
        tensors, ranks, responses, reads, owners = {}, {}, {}, {}, {}
        for name, change in self.changes.items():
            tensors[f"{name}.u"], tensors[f"{name}.delta"] = change.u, change.delta
            ranks[name] = change.rank
            if change.experts is not None:
                tensors[f"{name}.experts"] = change.experts
            if change.keys is not None:
                tensors[f"{name}.keys"] = change.keys
            if change.owners is not None:
                owners[name] = [list(of_pair) for of_pair in change.owners]
            if not change.response.linear:
                responses[name] = change.response.to_json()
            if change.reads:
                reads[name] = change.reads
        manifest = {
            "created": self.created,
            "base": asdict(self.base),
            "editor": dict(self.editor),
            "requests": [request.to_json() for request in self.requests],
            "ranks": ranks,
            "norms": self.norms(),
            **({"responses": responses} if responses else {}),
            **({"reads": reads} if reads else {}),
            **({"owners": owners} if owners else {}),
            **({"separators": list(self.separators)} if self.separators else {}),
            **({"ends": list(self.ends)} if self.ends else {}),
            "taken": self.taken,
        }
        file_format = RESPONSES_FORMAT if responses or reads else EDIT_FORMAT
        if any(change.keys is not None for change in self.changes.values()):
            file_format = KEYS_FORMAT
        return write_folder(path, file_format, manifest, tensors)

    @staticmethod
    def load(path: str | Path) -> Edit:
        """Read an edit that :meth:`save` wrote, from a folder or the hub (``hf:owner/name``).

        Raises:
            FileError: it is missing, damaged, altered, or of a version that this release does not know.
        """
        manifest, tensors = read_folder(path, *EDIT_FORMATS)
        base = ModelFingerprint.from_manifest(get_field(manifest, "base", dict, path), path)
        ranks = get_field(manifest, "ranks", dict, path)
        responses, reads = _read_responses(manifest, path), _read_reads(manifest, path)
        changes = {
            name: _read_change(tensors, name, responses.get(name, LINEAR), reads.get(name, ""), path) for name in ranks
        }
        optional = [part for change in changes.values() for part in (change.experts, change.keys)]
        tensor_count = 2 * len(changes) + sum(part is not None for part in optional)
        if len(tensors) != tensor_count or any(changes[name].rank != rank for name, rank in ranks.items()):
            raise FileError(f"{path}: the factors are not those that the manifest lists; it was altered")
        if {*layer_names(changes)} - base.weights.keys() or {*responses, *reads} - changes.keys():
            raise FileError(f"{path}: the base does not cover every changed module, or more is listed; it was altered")
        try:
            requests = tuple(
                EditRequest.from_json(json.dumps(request), saved=True)
                for request in get_field(manifest, "requests", list, path)
            )
        except ValidationError as error:
            raise FileError(f"{path}: a request in the manifest is malformed ({error.errors()[0]['msg']})") from None
        except RequestError as error:
            raise FileError(f"{path}: a request in the manifest is malformed ({error})") from None
        if "owners" in manifest:
            for name, listed in get_field(manifest, "owners", dict, path).items():
                if name not in changes:
                    raise FileError(f"{path}: 'owners' lists {name!r}, which is not changed; it was altered")
                changes[name] = _read_owners(listed, changes[name], len(requests), str(path))
        created = get_field(manifest, "created", str, path)
        separators = tuple(get_field(manifest, "separators", list, path)) if "separators" in manifest else ()
        if separators and (len(separators) != len(requests) or not set(separators) <= {None, "", " ", "\n"}):
            raise FileError(f"{path}: separators should hold one for each request (nothing, a space or a line break)")
        ends = tuple(get_field(manifest, "ends", list, path)) if "ends" in manifest else ()
        if ends and (len(ends) != len(requests) or not all(end is None or isinstance(end, bool) for end in ends)):
            raise FileError(f"{path}: ends should hold true, false or null for each request")
        taken = manifest.get("taken")
        if taken is not None and not isinstance(taken, bool):
            raise FileError(f"{path}: 'taken' should be true, false or null, it is {taken!r}")
        edit = Edit(changes, base, requests, _read_editor(manifest, path), created, separators, ends, taken)
        _check_norms(edit, manifest, path)
        return edit


def _renumbered(change: LowRank, new: Callable[[int], int]) -> LowRank:
    """Return a change whose owners have other numbers."""
    if change.owners is None:
        return change
    return replace(change, owners=tuple(tuple(map(new, owners)) for owners in change.owners))


def _read_owners(listed: object, change: LowRank, requests: int, where: str) -> LowRank:
    """Return a change with the requests that its factor pairs are of, as a manifest lists them."""
    if not (
        isinstance(listed, list)
        and len(listed) == change.rank
        and all(isinstance(of_pair, list) and of_pair for of_pair in listed)
        and all(type(n) is int and 0 <= n < requests for of_pair in listed for n in of_pair)
    ):
        raise FileError(f"{where}: 'owners' should list the requests of each factor pair, by number; it was altered")
    return replace(change, owners=tuple(map(tuple, listed)))


def _checked_change(name: str, change: LowRank) -> LowRank:
    """Return the change of one module as an edit holds it: in float32 at least, in memory of its own layout.

    In half precision the side branch would round the layer's whole output. The products of a matrix depend, in their
    last bits, on how it lies in memory. Factors that always lie in the same way act bit for bit the same before they
    are saved and after they are loaded.

    Raises:
        EditError: a factor is not made of real numbers, is empty, or is not finite.
    """
    try:
        factors = in_one_dtype(change.u, change.delta)
    except EditError as error:
        raise EditError(f"the factors of the change of {name} {error}") from None
    if not all(factor.shape[-1] for factor in factors):
        raise EditError(f"{name} would be a matrix of {' → '.join(str(factor.shape[-1]) for factor in factors)}")
    u, delta = (_in_own_layout(factor.to(torch.promote_types(factor.dtype, torch.float32))) for factor in factors)
    # The product of the factors' norms bounds the norm of the change, whose square has to be finite too.
    squares = [torch.linalg.vector_norm(factor.float()).square() for factor in (u, delta)]
    if not (squares[0] * squares[1]).isfinite():
        raise EditError(
            f"the change of {name} holds NaN or infinity, or is too large for any number; it would ruin the model and "
            "is refused"
        )
    keys = None if change.keys is None else _in_own_layout(change.keys.detach().to(u))
    if keys is not None and (keys.shape != u.shape or not keys.isfinite().all()):
        raise EditError(f"the keys of the change of {name} are no finite inputs, one for each of its factor pairs")
    return replace(change, u=u, delta=delta, reads="" if change.reads == name else change.reads, keys=keys)


def _in_own_layout(factor: Tensor) -> Tensor:
    """Return the same values row after row without gaps, at an address where torch itself would put them."""
    plain = torch.empty_like(factor, memory_format=torch.contiguous_format, device="meta").stride()
    fits = factor.stride() == plain and factor.data_ptr() % ALIGNMENT == 0
    return factor if fits else factor.clone(memory_format=torch.contiguous_format)


def _editor_of_sum(one: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the manifest of a sum says of the editors: theirs if they are the same, or else both as parts."""
    if one == other:
        return one
    of_one_edit = {"scale", "max_rank", "lost", "parts"}
    parts: list[Mapping[str, Any]] = []
    for editor in (one, other):
        # A sum's parts are listed one by one, unless the sum as a whole was scaled or compressed.
        parts += editor["parts"] if editor.keys() & of_one_edit == {"parts"} else [dict(editor)]
    common = {key: one[key] for key in one if key in other and one[key] == other[key] and key not in of_one_edit}
    shared = {"shared": True} if one.get("shared") or other.get("shared") else {}
    return {"name": "sum", **common, **shared, "parts": parts}


def _check_norms(edit: Edit, manifest: Mapping[str, Any], path: str | Path) -> None:
    """Compare the norms of an edit's changes with those that its manifest lists.

    Raises:
        FileError: they differ by more than rounding does, or some are missing.
    """
    norms, listed = edit.norms(), get_field(manifest, "norms", dict, path)
    if listed.keys() != norms.keys():
        raise FileError(f"{path}: 'norms' lists other matrices than 'ranks'; it was altered")
    for name, norm in norms.items():
        value = listed[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FileError(f"{path}: the norm of {name} should be a number, it is {value!r}")
        # Of factor pairs that cancel each other, all that is left is the rounding of their products.
        largest = float(edit.changes[name].u.norm() * edit.changes[name].delta.norm())
        if not math.isclose(norm, value, rel_tol=NORM_TOLERANCE, abs_tol=NORM_TOLERANCE * largest):
            raise FileError(
                f"{path}: the change of {name} has the norm {norm:g}, the manifest lists {value:g}; one of them was "
                "altered"
            )


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


def _read_responses(manifest: Mapping[str, Any], path: str | Path) -> dict[str, Response]:
    """Return the responses that a manifest lists by layer; in older files they are thresholds under ``gates``."""
    responses = {}
    for key, read in (("gates", _response_of_gate), ("responses", Response.from_json)):
        for name, described in (get_field(manifest, key, dict, path) if key in manifest else {}).items():
            try:
                responses[name] = read(described)
            except EditError as error:
                raise FileError(f"{path}: the response of {name} is malformed ({error})") from None
    return responses


def _response_of_gate(gate: object) -> Response:
    if isinstance(gate, bool) or not isinstance(gate, int | float):
        raise EditError(f"the gate should be a number from 0 to below 1, it is {gate!r}")
    return Response.from_gate(float(gate))


def _read_reads(manifest: Mapping[str, Any], path: str | Path) -> dict[str, str]:
    """Return the layers that changes read, by the layer that they change."""
    reads: dict[str, str] = get_field(manifest, "reads", dict, path) if "reads" in manifest else {}
    if not all(isinstance(name, str) and name for name in reads.values()):
        raise FileError(f"{path}: 'reads' should hold a layer's name for each changed layer")
    return reads


def _read_change(tensors: Mapping[str, Tensor], name: str, response: Response, reads: str, path: str | Path) -> LowRank:
    """Return the change of one module from a file's tensors.

    Raises:
        FileError: factors are missing or do not fit together.
    """
    u, delta = tensors.get(f"{name}.u"), tensors.get(f"{name}.delta")
    if u is None or delta is None or u.dim() != 2 or delta.dim() != 2 or u.shape[0] != delta.shape[0]:
        raise FileError(f"{path}: the factors of {name} are missing or do not fit together; it was altered")
    if not u.numel() or not delta.numel():
        sizes = f"{len(u)} factor pairs of a matrix of {u.shape[1]} → {delta.shape[1]}"
        raise FileError(f"{path}: {name} has {sizes}, which is nothing; it was altered")
    experts = tensors.get(f"{name}.experts")
    if experts is not None and (
        experts.dtype not in (torch.int32, torch.int64) or experts.shape != u.shape[:1] or bool((experts < 0).any())
    ):
        raise FileError(f"{path}: the experts of {name} do not fit its factors; it was altered")
    keys = tensors.get(f"{name}.keys")
    if keys is not None and (keys.shape != u.shape or not keys.is_floating_point() or not keys.isfinite().all()):
        raise FileError(f"{path}: the keys of {name} do not fit its factors; it was altered")
    try:
        return LowRank(*in_one_dtype(u, delta), response, experts, reads, keys)
    except EditError as error:
        raise FileError(f"{path}: the factors of {name} {error}; it was altered") from None


class AppliedEdit:
    """An edit that is applied to a model as hooks; :meth:`revert` removes it. Reverting twice does no harm."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        self._handles = list(handles)
        forget_compiled()

    def revert(self) -> None:
        """Remove the edit's hooks from the model. The weights were never touched."""
        remove_hooks(self._handles)
        self._handles.clear()
        forget_compiled()
