"""What the trained editors beside MEND have in common: how they are made, kept, and asked for edits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from remend.core.capture import GradientFactors
from remend.core.layers import dimensions, expert_count, weight_rms
from remend.core.low_rank import LowRank
from remend.edit import Edit
from remend.editors.info import EditorInfo, checked, refuse_unused
from remend.editors.serialization import FORMAT, described, read_editor
from remend.errors import ConfigError, FileError
from remend.fingerprint import ModelFingerprint, find_modules
from remend.models.frozen_prefix import FrozenPrefix
from remend.models.structure import editable_modules
from remend.request import EditRequest
from remend.serialization import get_field, write_folder
from remend.tasks.base import Example, Task, in_batches


class TrainableEditor(nn.Module):
    """An editor whose changes are a differentiable function of the pairs, through which it is trained as MEND is.

    Attributes:
        config: its settings.
        base: the model it is for.
        shapes: (d_in, d_out) of each edited module, by name.
        trained: what its training recorded; empty before.
        networks: what learns with the editor networks' rate.
        alpha: what learns with the step sizes' rate.
        unit: of each matrix, the step at which a token's edit changes its own output by about the output's size.
    """

    traits: ClassVar[EditorInfo]
    configuration: ClassVar[type[Any]]
    alpha: nn.Parameter
    unit: Tensor

    def __init__(self, config: Any, base: ModelFingerprint, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.config, self.base, self.shapes = config, base, dict(shapes)
        self.trained: dict[str, Any] = {}
        self.register_buffer("unit", torch.zeros(len(self.shapes)))

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
        """An untrained editor for ``model``; by default of the MLPs' matrices of the last blocks, as MEND's.

        Args:
            task: the base model.
            config: settings.
            text: not used: training measures it.
            modules: globs of the matrices to edit.
            seed: of the networks' initial weights; the global random state is left alone.
            layers: the blocks to edit.

        Raises:
            ModelError: there is nothing to edit, or nothing matches.
            ConfigError: a matrix belongs to several experts.
        """
        refuse_unused(cls.traits.name, text=text)
        chosen = editable_modules(task.model, modules, layers=layers)
        if several := [name for name, module in chosen.items() if expert_count(module)]:
            raise ConfigError(f"{several[0]} holds several experts' matrices, which only MEND can edit")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(
                config or cls.configuration(),
                ModelFingerprint.of(task.model, chosen),
                {n: dimensions(m) for n, m in chosen.items()},
            )
            made.prepare(task.model)
        return made.to(task.device)

    def prepare(self, model: PreTrainedModel) -> None:
        """Look at the model before training; by default there is nothing to see."""

    @abstractmethod
    def changes(
        self, task: Task, pairs: Sequence[Example], prefix: FrozenPrefix, states: Tensor | None
    ) -> dict[str, LowRank]:
        """What each pair, as an episode of its own, changes; differentiable in the editor's parameters.

        The first :meth:`shared` factor pairs are the same for all episodes, those of the pair follow.

        Args:
            task: the base model.
            pairs: the edit pairs.
            prefix: where the model is cut.
            states: what enters it there, or None.
        """

    def shared(self, name: str) -> int:
        """How many factor pairs of a matrix's change are every edit's."""
        return 0

    # -- editing -------------------------------------------------------------------------------------------------

    def edit(self, task: Task, requests: Sequence[EditRequest]) -> Edit:
        """One edit for all ``requests``: what each adds is summed; what is every edit's is there once.

        Raises:
            RequestError: there is no request, or one does not fit the model's context.
            WrongBaseError: the editor was trained for another kind of model.
            NonFiniteError: the model's weights or activations hold NaN or infinity.
        """
        base = checked(self.base, task.model, requests)
        parts = self._changes(task, requests)
        changes = {}
        for name in self.shapes:
            own, common = [part[name] for part in parts], self.shared(name)
            u = torch.cat([own[0].u[:common], *(change.u[common:] for change in own)])
            delta = torch.cat([own[0].delta[:common], *(change.delta[common:] for change in own)])
            changes[name] = LowRank(u, delta)
        return Edit(changes, base, tuple(requests), self._signature())

    def edit_each(self, task: Task, requests: Sequence[EditRequest]) -> list[Edit]:
        """One edit for each request, each made from the unedited model; batched inside. Errors as :meth:`edit`."""
        base = checked(self.base, task.model, requests)
        parts = self._changes(task, requests)
        return [Edit(part, base, (request,), self._signature()) for part, request in zip(parts, requests, strict=True)]

    @torch.inference_mode(False)
    def _changes(self, task: Task, requests: Sequence[EditRequest]) -> list[dict[str, LowRank]]:
        pairs = [task.encode(request.prompt, request.target) for request in requests]
        prefix = FrozenPrefix(task.model, self.shapes)
        found: list[dict[str, LowRank]] = []
        for some in in_batches(pairs):
            changes = {n: change.detach() for n, change in self.changes(task, some, prefix, None).items()}
            for e in range(len(some)):
                found.append({name: _without_padding(change, e, self.shared(name)) for name, change in changes.items()})
        return found

    def _signature(self) -> dict[str, Any]:
        return {"name": self.traits.name, **asdict(self.config)}

    # -- fitting and keeping -------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the editor's parameters are."""
        return self.alpha.device

    @property
    def fitted(self) -> bool:
        """Whether it was fitted to a model, or trained."""
        return bool(self.trained) or bool((self.unit > 0).any())

    @torch.no_grad()
    def fit(self, task: Task, factors: Mapping[str, GradientFactors]) -> None:
        """Measure the units of the steps on the gradient factors of some pairs."""
        modules = find_modules(task.model, self.shapes)
        for place, (name, own) in enumerate(factors.items()):
            u, delta = own.u[own.active], own.delta[own.active]
            output, answer = (
                u.norm(dim=1).mean() * weight_rms(modules[name]),
                u.square().sum(1).mean() * delta.square().mean().sqrt(),
            )
            self.unit[place] = (output / answer).to(self.unit.device) if answer > 0 else 1.0

    def save_pretrained(self, path: str | Path) -> Path:
        """Write the editor to a folder (safetensors and a JSON manifest)."""
        manifest = {**described(self), "trained": self.trained}
        return write_folder(path, FORMAT, manifest, self.state_dict())

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Any:
        """Load an editor that :meth:`save_pretrained` wrote.

        Raises:
            FileError: the folder is missing, damaged, altered, of an unknown version, or of another kind of editor.
        """
        path = Path(path)
        found = read_editor(path, cls.traits.name, cls.configuration)
        editor = cls(found.config, found.base, found.shapes)
        try:
            editor.expect(found.tensors)
            editor.load_state_dict({name: tensor.clone() for name, tensor in found.tensors.items()})
        except (RuntimeError, KeyError) as error:
            raise FileError(f"{path}: the tensors do not fit the configuration ({error}); it was altered") from None
        editor.trained = get_field(found.manifest, "trained", dict, path)
        return editor

    def expect(self, tensors: Mapping[str, Tensor]) -> None:
        """Make room for saved tensors whose sizes are the model's."""


def _without_padding(change: LowRank, episode: int, shared: int) -> LowRank:
    """One episode's change without the factor pairs that only fill it up."""
    own = change.select(torch.tensor([episode], device=change.u.device))
    kept = (own.delta[0] != 0).any(1)
    kept[:shared] = True
    return replace(own, u=own.u[0, kept], delta=own.delta[0, kept])
