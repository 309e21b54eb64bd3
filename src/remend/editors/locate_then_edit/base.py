"""What the editors that locate a fact have in common: which matrices they edit, statistics of text, and files."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from remend.core.layers import dimensions, expert_count
from remend.core.low_rank import LowRank
from remend.core.operators import pack_symmetric, unpack_symmetric
from remend.edit import Edit
from remend.editors.calibration_data import second_moments
from remend.editors.info import EditorInfo, checked, refuse_unused
from remend.editors.locate_then_edit.subject_prompts import Reading, beginnings, reading
from remend.editors.locate_then_edit.value_optimization import LocateConfig
from remend.editors.serialization import FORMAT, described, read_editor
from remend.errors import ConfigError, FileError, ModelError
from remend.fingerprint import ModelFingerprint, find_modules
from remend.models.blocks import find_stacks, select_blocks
from remend.models.structure import is_down_projection, mlp_layer_names
from remend.request import EditRequest
from remend.serialization import get_field, write_folder
from remend.tasks.base import Task

WIDEST = 32_768
"""Dimensions of keys up to which C is inverted: 4 GB in float32, 9 in the float64 that its inverse needs."""
ROWS_AT_ONCE = 64
"""Texts that go through the model together."""


class LocateThenEdit:
    """What both editors have in common: which matrices they edit, their statistics, and where they are kept.

    Attributes:
        config: its settings.
        base: the model it is for.
        covariances: C of each edited matrix's keys, with a floor that lets it be inverted.
        begun: the random beginnings behind which prompts are read.
        shapes: (d_in, d_out) of each edited matrix.
    """

    traits: ClassVar[EditorInfo]
    configuration: ClassVar[type[LocateConfig]]

    def __init__(
        self,
        config: Any,
        base: ModelFingerprint,
        covariances: Mapping[str, Float[Tensor, "d d"]],
        shapes: Mapping[str, tuple[int, int]],
        begun: Sequence[str] = (),
    ) -> None:
        self.config, self.base = config, base
        self.covariances, self.shapes, self.begun = dict(covariances), dict(shapes), tuple(begun)
        self._roots: dict[str, Tensor] = {}

    @staticmethod
    @abstractmethod
    def places(count: int) -> list[int]:
        """Which of so many blocks are edited where none are named."""

    @abstractmethod
    def _apart(self, task: Task, readings: Sequence[Reading]) -> list[dict[str, LowRank]]:
        """The changes that each request makes by itself."""

    @abstractmethod
    def _together(self, task: Task, readings: Sequence[Reading]) -> dict[str, LowRank]:
        """The changes that all requests make together."""

    # -- making and keeping --------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        task: Task,
        config: Any | None = None,
        *,
        text: Sequence[str] = (),
        seed: int = 0,
        modules: Sequence[str] = (),
        layers: str | None = None,
    ) -> Any:
        """The editor for ``model``, of the stack that reads prompts: of an encoder-decoder, the encoder.

        Args:
            task: the base model.
            modules: not used: the MLPs of the chosen blocks are edited.
            text: passages of ordinary text, over whose tokens C is taken: more than the keys have dimensions; of a long
                text 65,536 are drawn.
            config: settings.
            layers: the blocks to edit; by default of the middle.
            seed: of the random beginnings.

        Raises:
            ConfigError: the text is empty, a matrix belongs to several experts or is too wide (:data:`WIDEST`), or
                ``layers`` makes no sense.
            ModelError: there is nothing to edit.
        """
        refuse_unused(cls.traits.name, modules=modules)
        if not any(passage.strip() for passage in text):
            raise ConfigError(
                f"{cls.traits.name} keeps what the model makes of ordinary text, and was given none: give passages of "
                "text like those that the model meets"
            )
        config = config or cls.configuration()
        chosen = cls._matrices(task.model, layers)
        if wide := [name for name, module in chosen.items() if dimensions(module)[0] > WIDEST]:
            raise ConfigError(
                f"the keys of {wide[0]} have {dimensions(chosen[wide[0]])[0]} dimensions, and {cls.traits.name} "
                f"inverts their second moment, which can be done up to {WIDEST}: use mend or ridge"
            )
        moments = second_moments(task, chosen, task.ordinary_examples(text, seed))
        for name, moment in moments.items():
            if moment.tokens < (d := dimensions(chosen[name])[0]):
                warnings.warn(
                    f"the text has {moment.tokens} tokens and the keys of {name} have {d} dimensions, most of which "
                    "are not seen there: edits may be worse. Give a longer text",
                    stacklevel=2,
                )
                break
        found = {name: moment.covariance(config.floor).cpu() for name, moment in moments.items()}
        shapes = {name: dimensions(module) for name, module in chosen.items()}
        return cls(
            config, ModelFingerprint.of(task.model, chosen), found, shapes, beginnings(text, config.beginnings, seed)
        )

    @classmethod
    def _matrices(cls, model: PreTrainedModel, layers: str | None) -> dict[str, nn.Module]:
        """The narrowing MLP matrices to edit, in the order in which they run."""
        stack = find_stacks(model)[0][1]
        if layers is None:
            blocks = [stack[place] for place in cls.places(len(stack))]
        else:
            own = {prefix for prefix, _ in stack}
            blocks = [(prefix, block) for prefix, block in select_blocks(model, layers) if prefix in own]
        chosen: dict[str, nn.Module] = {}
        for prefix, block in blocks:
            found = [
                name for name in mlp_layer_names(prefix, block) if is_down_projection(find_modules(model, [name])[name])
            ]
            if not found:
                raise ModelError(f"{prefix} has no MLP whose narrowing matrix {cls.traits.name} could edit")
            chosen |= find_modules(model, found[-1:])
        if several := [name for name, module in chosen.items() if expert_count(module)]:
            raise ConfigError(
                f"{several[0]} holds several experts' matrices: a subject's key goes to some of them only, and "
                f"{cls.traits.name} knows one memory for each block. Name blocks without experts with layers, or use "
                "MEND"
            )
        return chosen

    def save_pretrained(self, path: str | Path) -> Path:
        """Write the editor to a folder (safetensors and a JSON manifest), so that C is taken only once."""
        manifest = {**described(self), "beginnings": list(self.begun)}
        tensors = {f"covariance_{place}": pack_symmetric(own) for place, own in enumerate(self.covariances.values())}
        return write_folder(path, FORMAT, manifest, tensors)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Any:
        """Load an editor that :meth:`save_pretrained` wrote.

        Raises:
            FileError: the folder is missing, damaged, altered, of an unknown version, or of another kind of editor.
        """
        path = Path(path)
        own = read_editor(path, cls.traits.name, cls.configuration)
        begun = get_field(own.manifest, "beginnings", list, path)
        found = {
            name: unpack_symmetric(own.tensors.get(f"covariance_{place}", torch.zeros(0)))
            for place, name in enumerate(own.shapes)
        }
        wrong = [name for name, (d_in, _) in own.shapes.items() if found[name].shape != (d_in, d_in)]
        if wrong or len(own.tensors) != len(own.shapes) or not all(isinstance(text, str) for text in begun):
            raise FileError(f"{path}: the tensors do not fit the shapes that the manifest lists; it was altered")
        return cls(own.config, own.base, found, own.shapes, begun)

    # -- editing -------------------------------------------------------------------------------------------------

    def edit(self, task: Task, requests: Sequence[EditRequest]) -> Edit:
        """One edit for all ``requests``; ``model`` is not changed.

        Raises:
            RequestError: there is no request, one names no subject that its prompt holds, or does not fit the context.
            WrongBaseError: the editor is for another kind of model.
            NonFiniteError: the model's weights or activations hold NaN or infinity.
        """
        base = checked(self.base, task.model, requests)
        changes = self._together(task, [reading(task, request, self.begun) for request in requests])
        return Edit(changes, base, tuple(requests), self._signature())

    def edit_each(self, task: Task, requests: Sequence[EditRequest]) -> list[Edit]:
        """One edit for each request, each made from the unedited model; tuned together. Errors as :meth:`edit`."""
        base = checked(self.base, task.model, requests)
        parts = self._apart(task, [reading(task, request, self.begun) for request in requests])
        return [Edit(part, base, (request,), self._signature()) for part, request in zip(parts, requests, strict=True)]

    def _block(self, model: PreTrainedModel, name: str) -> nn.Module:
        """The block that an edited matrix lies in."""
        return next(block for prefix, block in find_stacks(model)[0][1] if name.startswith(f"{prefix}."))

    def _signature(self) -> dict[str, Any]:
        return {"name": self.traits.name, **asdict(self.config)}

    @torch.no_grad()
    def _inverse(self, name: str, keys: Float[Tensor, "request d_in"]) -> Float[Tensor, "request d_in"]:
        """C⁻¹k of each key, in float64: C's smallest eigenvalues are a small part of its largest."""
        if name not in self._roots:
            self._roots[name] = torch.linalg.cholesky(self.covariances[name].double())
        return torch.cholesky_solve(keys.double().cpu().mT, self._roots[name]).mT


def chunks(readings: Sequence[Reading]) -> list[Sequence[Reading]]:
    """Requests that go through the model together."""
    size = max(1, ROWS_AT_ONCE // len(readings[0].all_pairs))
    return [readings[start : start + size] for start in range(0, len(readings), size)]
