"""A cache of edits: nothing is learned, the answer is looked up (Mitchell et al., arXiv 2110.11309, App. G)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import PositiveFloat
from torch import Tensor, nn
from transformers import PreTrainedModel

from remend.config import Config
from remend.core.hooks import frozen, remove_hooks
from remend.edit import AppliedEdit
from remend.editors.info import EditorInfo, checked, refuse_unused
from remend.errors import EditError, FileError, ModelError
from remend.fingerprint import HasModel, ModelFingerprint, module_of
from remend.request import EditRequest, parse_request
from remend.serialization import get_field, read_folder, write_folder
from remend.tasks.base import Example, Task, in_batches
from remend.tasks.generative import GenerativeTask

FORMAT = "remend.cache/1"


@dataclass(frozen=True)
class LookupConfig(Config):
    """Settings of a cache.

    Attributes:
        radius: how near a final hidden state must be to a cached one to be answered from the cache, as a share of the
            usual distance between those of unrelated texts.
    """

    radius: PositiveFloat = 0.5


@dataclass(frozen=True, eq=False)
class LookupEdit:
    """What a cache holds: final hidden states, and what follows each. No weight is changed.

    Attributes:
        keys: the states before the output layer at which a target token is predicted.
        values: these tokens (or labels).
        reach: how near a state must be.
        base: the model it was made for; it refuses any other.
        requests: what it was made to do.
        editor: what made it.
        created: when, ISO 8601, UTC.
    """

    keys: Float[Tensor, "row d"]
    values: Int[Tensor, " row"]
    reach: float
    base: ModelFingerprint
    requests: tuple[EditRequest, ...] = ()
    editor: Mapping[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if not self.keys.isfinite().all():
            raise EditError("a key of the cache is NaN or infinite; it would answer nothing and is refused")

    def apply(self, model: nn.Module | HasModel) -> AppliedEdit:
        """Put the cache before the model's answers and return the handle that takes it away again.

        Raises:
            WrongBaseError: it was made for another model; nothing is applied.
        """
        model = module_of(model)
        self.base.check(model, "this cache")
        keys, values = self.keys, self.values

        def answer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            states = args[0].float()
            distance, nearest = torch.cdist(states.flatten(0, -2), keys.to(states.device)).min(1)
            hits = (distance <= self.reach).view(states.shape[:-1])
            found = values.to(output.device)[nearest.to(output.device)].view(states.shape[:-1])
            room = 2 * (output.max() - output.min()) + 1
            if output.shape[-1] == 1:  # a single logit speaks for label 1, and against label 0
                return torch.where(hits[..., None], room * (2 * found[..., None] - 1), output).to(output.dtype)
            sure = torch.nn.functional.one_hot(found, output.shape[-1]) * room
            return output + (hits[..., None] * sure).to(output.dtype)

        return AppliedEdit([head_of(model).register_forward_hook(answer)])

    @contextmanager
    def applied(self, model: nn.Module | HasModel) -> Iterator[nn.Module]:
        """Within the block, ``model`` answers from the cache where it holds something; afterwards as before."""
        handle = self.apply(model)
        try:
            yield module_of(model)
        finally:
            handle.revert()

    def __add__(self, other: LookupEdit) -> LookupEdit:
        """Both caches as one."""
        if not isinstance(other, LookupEdit):
            return NotImplemented
        if not self.base.is_compatible(other.base):
            raise EditError("these caches are of different models and cannot be one")
        keys, values = torch.cat([self.keys, other.keys]), torch.cat([self.values, other.values])
        return replace(self, keys=keys, values=values, requests=self.requests + other.requests)

    def save(self, path: str | Path) -> Path:
        """Write the cache to a folder: keys and values (safetensors) and a manifest (JSON)."""
        manifest = {
            "created": self.created,
            "base": asdict(self.base),
            "editor": dict(self.editor),
            "reach": self.reach,
            "requests": [request.to_json() for request in self.requests],
        }
        return write_folder(path, FORMAT, manifest, {"keys": self.keys, "values": self.values})

    @staticmethod
    def load(path: str | Path) -> LookupEdit:
        """Read a cache that :meth:`save` wrote.

        Raises:
            FileError: it is missing, damaged, altered, or of a version that this release does not know.
        """
        manifest, tensors = read_folder(path, FORMAT)
        keys, values = tensors.get("keys"), tensors.get("values")
        if keys is None or values is None or keys.dim() != 2 or values.shape != keys.shape[:1]:
            raise FileError(f"{path}: keys and values are missing or do not fit together; it was altered")
        requests = tuple(
            parse_request(json.dumps(own), f"{path}, request {number}")
            for number, own in enumerate(get_field(manifest, "requests", list, path), start=1)
        )
        base = ModelFingerprint.from_manifest(get_field(manifest, "base", dict, path), path)
        reach, editor = get_field(manifest, "reach", float, path), get_field(manifest, "editor", dict, path)
        return LookupEdit(keys, values, reach, base, requests, editor, get_field(manifest, "created", str, path))


class Lookup:
    """Keeps edits as pairs of a final hidden state and an answer.

    Attributes:
        config: its settings.
        base: the model it is for.
        usual: the usual distance between final hidden states of unrelated texts.
    """

    traits: ClassVar[EditorInfo] = EditorInfo(
        "cache", "Mitchell et al. (arXiv 2110.11309), App. G", "nothing", "outside", True
    )

    def __init__(self, config: LookupConfig, base: ModelFingerprint, usual: float) -> None:
        self.config, self.base, self.usual = config, base, usual

    @classmethod
    def create(
        cls,
        task: Task,
        config: LookupConfig | None = None,
        *,
        text: Sequence[str] = (),
        seed: int = 0,
        modules: Sequence[str] = (),
        layers: str | None = None,
    ) -> Lookup:
        """The editor for ``model``.

        Args:
            task: the base model.
            text: passages over which usual distances are measured; by default the model writes some itself.
            config: settings.
            modules: not used.
            layers: not used.
            seed: of what the model writes.

        Raises:
            ModelError: the model has no output layer that answers.
            ConfigError: the text is empty.
        """
        refuse_unused(cls.traits.name, modules=modules, layers=layers)
        pairs = task.ordinary_examples(text, seed)
        states = torch.cat(_states(task, [Example(task.tokens_read(pair), pair.target[-1:]) for pair in pairs]))
        usual = float(torch.pdist(states).median()) if len(states) > 1 else 1.0
        return cls(config or LookupConfig(), ModelFingerprint.of(task.model, _blocks(task.model)), usual)

    def edit(self, task: Task, requests: Sequence[EditRequest]) -> LookupEdit:
        """One cache for all ``requests``.

        Raises:
            RequestError: there is no request, or one does not fit the model's context.
            WrongBaseError: the editor is for another kind of model.
        """
        first, *rest = self.edit_each(task, requests)
        keys = torch.cat([first.keys, *(own.keys for own in rest)])
        values = torch.cat([first.values, *(own.values for own in rest)])
        return replace(first, keys=keys, values=values, requests=tuple(requests))

    def edit_each(self, task: Task, requests: Sequence[EditRequest]) -> list[LookupEdit]:
        """A cache for each request. Errors as :meth:`edit`."""
        base = checked(self.base, task.model, requests)
        pairs = [task.encode(request.prompt, request.target) for request in requests]
        reach, about = self.config.radius * self.usual, {"name": self.traits.name, **asdict(self.config)}
        return [
            LookupEdit(keys, torch.tensor(pair.target), reach, base, (request,), about)
            for keys, pair, request in zip(_states(task, pairs), pairs, requests, strict=True)
        ]


def head_of(model: Any) -> nn.Module:
    """The layer that answers: over a vocabulary, or over a classifier's labels.

    Raises:
        ModelError: there is none.
    """
    head = model.get_output_embeddings()
    if isinstance(head, nn.Module):
        return head
    labels = getattr(model.config, "num_labels", None)
    found = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == labels]
    if not found:
        raise ModelError(f"{type(model).__name__} has no linear layer over labels, so nothing can be cached before it")
    return found[-1]


@torch.no_grad()
def _states(task: Task, pairs: Sequence[Example]) -> list[Float[Tensor, "target d"]]:
    """What the answering layer reads where each pair's targets are predicted."""
    found: list[Tensor] = []
    head = head_of(task.model)
    for some in in_batches(pairs):
        batch = task.collate(some)
        seen: list[Tensor] = []
        handle = head.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(args[0].detach().float())
        )
        try:
            with frozen(task.model):
                task.outputs(batch)
        finally:
            remove_hooks([handle])
        states = seen[-1]
        if states.shape[:-1] == (batch.rows, batch.inputs["input_ids"].shape[1]) and not isinstance(
            task, GenerativeTask
        ):
            states = states[batch.row, batch.position]  # a classifier that reads every token and answers at one
        states = states.reshape(-1, states.shape[-1]).cpu()
        found += states.split(torch.bincount(batch.row, minlength=batch.rows).tolist())
    return found


def _blocks(model: PreTrainedModel) -> list[str]:
    """Some matrices of the model by which it is known again: those that edits change by default."""
    from remend.models.structure import editable_modules

    return list(editable_modules(model))
