"""What the trained editors beside MEND have in common: how they are made, kept, and asked for edits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from remend.core.capture import GradientFactors
from remend.core.layers import weight_rms
from remend.core.low_rank import LowRank
from remend.editors.base import WeightEditor
from remend.editors.serialization import SavedEditor
from remend.fingerprint import ModelFingerprint, find_modules
from remend.models.frozen_prefix import FrozenPrefix
from remend.request import EditRequest
from remend.tasks.base import Example, Task


class TrainableEditor(nn.Module, WeightEditor):
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

    alpha: nn.Parameter
    unit: Tensor

    def __init__(self, config: Any, base: ModelFingerprint, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.config, self.base, self.shapes = config, base, dict(shapes)
        self.trained: dict[str, Any] = {}
        self.register_buffer("unit", torch.zeros(len(self.shapes)))

    def prepare(self, task: Task, text: Sequence[str], seed: int) -> None:
        """Build what depends on the model, and move to its device."""
        self.build(task)
        self.to(task.device)

    def build(self, task: Task) -> None:
        """Build what depends on the model; by default nothing."""
        return

    @abstractmethod
    def episode_changes(
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

    def combine(self, task: Task, requests: Sequence[EditRequest]) -> dict[str, LowRank]:
        """Return the sum of what each request changes, with what is every edit's once."""
        parts = self._changes_of_each(task, requests)
        changes = {}
        for name in self.shapes:
            of_requests, common = [part[name] for part in parts], self.shared(name)
            u = torch.cat([of_requests[0].u[:common], *(change.u[common:] for change in of_requests)])
            delta = torch.cat([of_requests[0].delta[:common], *(change.delta[common:] for change in of_requests)])
            changes[name] = LowRank(u, delta)
        return changes

    @torch.enable_grad()
    def changes(self, task: Task, requests: Sequence[EditRequest]) -> list[dict[str, LowRank]]:
        """Return what each request changes by itself."""
        examples = [task.encode(request.prompt, request.target) for request in requests]
        prefix = FrozenPrefix(task.model, self.shapes)
        batched = {n: change.detach() for n, change in self.episode_changes(task, examples, prefix, None).items()}
        return [
            {name: _without_padding(change, episode, self.shared(name)) for name, change in batched.items()}
            for episode in range(len(examples))
        ]

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

    def saved_fields(self) -> dict[str, Any]:
        """Return what training recorded."""
        return {"trained": self.trained}

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers."""
        return self.state_dict()

    def restore(self, saved: SavedEditor) -> None:
        """Take over parameters, buffers and what training recorded."""
        self.expect(saved.tensors)
        self.load_state_dict({name: tensor.clone() for name, tensor in saved.tensors.items()})
        self.trained = saved.field("trained", dict)

    def expect(self, tensors: Mapping[str, Tensor]) -> None:
        """Make room for saved tensors whose sizes are the model's."""


def _without_padding(change: LowRank, episode: int, shared: int) -> LowRank:
    """One episode's change without the factor pairs that only fill it up."""
    own = change.select(torch.tensor([episode], device=change.u.device))
    kept = (own.delta[0] != 0).any(1)
    kept[:shared] = True
    return replace(own, u=own.u[0, kept], delta=own.delta[0, kept])
