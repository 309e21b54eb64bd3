"""``LookupEdit``: an edit that answers from a table of hidden states, and changes no weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from remend.edit import AppliedEdit, utc_now
from remend.errors import EditError, FileError, ModelError
from remend.fingerprint import HasModel, ModelFingerprint, module_of
from remend.request import EditRequest, parse_request
from remend.saved_folders import get_field, read_folder, write_folder

LOOKUP_EDIT_FORMAT = "remend.cache/1"
"""The format in the manifest of a saved lookup edit. It keeps the editor's earlier name, so that old files load."""


@dataclass(frozen=True, eq=False)
class LookupEdit:
    """Final hidden states, and the target that follows each. No weight is changed.

    Attributes:
        keys: the states before the output layer at which a target is predicted.
        values: these targets: tokens or labels.
        reach: the distance up to which a state is answered from the table.
        base: the model that it was made for; other models are refused.
        requests: the edit requests that it was made from.
        editor: the editor's name and configuration.
        created: the time of its creation, ISO 8601, UTC.
    """

    keys: Float[Tensor, "row d"]
    values: Int[Tensor, " row"]
    reach: float
    base: ModelFingerprint
    requests: tuple[EditRequest, ...] = ()
    editor: Mapping[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        if not self.keys.isfinite().all():
            raise EditError("a key of the lookup edit is NaN or infinite; it would answer nothing and is refused")

    def apply(self, model: nn.Module | HasModel) -> AppliedEdit:
        """Answer from the table where a state is near enough, and return the handle that removes it again.

        Raises:
            WrongBaseError: it was made for another model; nothing is applied.
        """
        model = module_of(model)
        self.base.check(model, "this lookup edit")
        keys, values = self.keys, self.values

        def answer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            states = args[0].float()
            distance, nearest = torch.cdist(states.flatten(0, -2), keys.to(states.device)).min(1)
            hits = (distance <= self.reach).view(states.shape[:-1])
            targets = values.to(output.device)[nearest.to(output.device)].view(states.shape[:-1])
            # More than the range of all logits, so that a hit is the first choice whatever the model says.
            margin = 2 * (output.max() - output.min()) + 1
            if output.shape[-1] == 1:  # a single logit speaks for label 1, and against label 0
                return torch.where(hits[..., None], margin * (2 * targets[..., None] - 1), output).to(output.dtype)
            bonus = torch.nn.functional.one_hot(targets, output.shape[-1]) * margin
            return output + (hits[..., None] * bonus).to(output.dtype)

        return AppliedEdit([output_layer(model).register_forward_hook(answer)])

    @contextmanager
    def applied(self, model: nn.Module | HasModel) -> Iterator[nn.Module]:
        """Apply the edit within the context, and revert it afterwards, also after an exception."""
        handle = self.apply(model)
        try:
            yield module_of(model)
        finally:
            handle.revert()

    def __add__(self, other: LookupEdit) -> LookupEdit:
        """Return one edit with the tables of both.

        Raises:
            EditError: they are for different models.
        """
        if not isinstance(other, LookupEdit):
            return NotImplemented
        if not self.base.is_compatible(other.base):
            raise EditError("these lookup edits are for different models and cannot be added")
        keys, values = torch.cat([self.keys, other.keys]), torch.cat([self.values, other.values])
        return replace(self, keys=keys, values=values, requests=self.requests + other.requests)

    def save(self, path: str | Path) -> Path:
        """Write the edit to a folder: keys and values (safetensors) and a manifest (JSON); return the folder."""
        manifest = {
            "created": self.created,
            "base": asdict(self.base),
            "editor": dict(self.editor),
            "reach": self.reach,
            "requests": [request.to_json() for request in self.requests],
        }
        return write_folder(path, LOOKUP_EDIT_FORMAT, manifest, {"keys": self.keys, "values": self.values})

    @staticmethod
    def load(path: str | Path) -> LookupEdit:
        """Read an edit that :meth:`save` wrote.

        Raises:
            FileError: it is missing, damaged, altered, or of a version that this release does not know.
        """
        manifest, tensors = read_folder(path, LOOKUP_EDIT_FORMAT)
        keys, values = tensors.get("keys"), tensors.get("values")
        if keys is None or values is None or keys.dim() != 2 or values.shape != keys.shape[:1]:
            raise FileError(f"{path}: keys and values are missing or do not fit together; it was altered")
        if not keys.is_floating_point() or values.dtype != torch.int64 or bool((values < 0).any()):
            raise FileError(f"{path}: keys should be floating point numbers, and values numbers from 0; it was altered")
        requests = tuple(
            parse_request(json.dumps(request), f"{path}, request {number}", saved=True)
            for number, request in enumerate(get_field(manifest, "requests", list, path), start=1)
        )
        base = ModelFingerprint.from_manifest(get_field(manifest, "base", dict, path), path)
        reach, editor = get_field(manifest, "reach", float, path), get_field(manifest, "editor", dict, path)
        return LookupEdit(keys, values, reach, base, requests, editor, get_field(manifest, "created", str, path))


def output_layer(model: Any) -> nn.Module:
    """Return the layer whose output is the logits: over a vocabulary, or over a classifier's labels.

    Raises:
        ModelError: there is none.
    """
    embeddings = getattr(model, "get_output_embeddings", None)
    head = None if embeddings is None else embeddings()
    if isinstance(head, nn.Module):
        return head
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == labels]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no linear layer over labels, whose input lookup could compare: use another "
            "editor"
        )
    return layers[-1]
