"""``GradientStepEditor``: the base of KE and ENN, which edit by one gradient step with a learned size or direction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from remend.core.capture import GradientFactors
from remend.core.distributed import ProcessGroup
from remend.core.editor_gradients import FactoredGradients
from remend.core.layers import weight_rms
from remend.core.low_rank import LowRank
from remend.editors.saved_editor import SavedEditor
from remend.editors.trainable import ActivationSource, CalibrationData, TrainableEditor
from remend.fingerprint import ModelFingerprint
from remend.models.frozen_prefix import FrozenPrefix
from remend.request import EditRequest
from remend.tasks.base import Example, Task

UNIT_BATCHES = 4
"""The number of batches over which the units of the steps are measured."""


class GradientStepEditor(TrainableEditor):
    """An editor that makes its changes from the edit pairs themselves, in a pass through the base model.

    Attributes:
        unit: for each matrix, the step at which a token's edit changes its own output by about the output's size.
    """

    unit: Tensor

    def __init__(self, config: Any, base: ModelFingerprint, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(config, base, shapes)
        self.register_buffer("unit", torch.zeros(len(self.shapes)))

    # -- create --------------------------------------------------------------------------------------------------

    def prepare(self, task: Task, text: Sequence[str], seed: int) -> None:
        """Build what depends on the model, and move the editor to its device."""
        self.build(task)
        self.to(task.device)

    def build(self, task: Task) -> None:
        """Build what depends on the model; by default nothing."""
        return

    def build_for(self, tensors: Mapping[str, Tensor]) -> None:
        """Build what depends on the model, with the sizes of saved tensors; by default nothing."""
        return

    def restore(self, saved: SavedEditor) -> None:
        """Take over parameters, buffers and what training recorded."""
        self.build_for(saved.tensors)
        super().restore(saved)

    # -- training ------------------------------------------------------------------------------------------------

    @property
    def fitted(self) -> bool:
        """Whether the units were measured, or the editor trained."""
        return bool(self.trained) or bool((self.unit > 0).any())

    def calibrate(self, source: ActivationSource, data: CalibrationData, process_group: ProcessGroup) -> None:
        """Measure the units of the steps; every process measures them over the same edit pairs."""
        task = source.task
        batch = task.collate([example for examples in data.edits[:UNIT_BATCHES] for example in examples])
        self.measure_units(task, self.capture(task, batch))

    @torch.no_grad()
    def measure_units(self, task: Task, factors: Mapping[str, GradientFactors]) -> None:
        """Set the units of the steps from the gradient factors of some edit pairs."""
        modules = self.edited_modules(task)
        for index, (name, factor) in enumerate(factors.items()):
            u, delta = factor.u[factor.active], factor.delta[factor.active]
            output = u.norm(dim=1).mean() * weight_rms(modules[name])
            response = u.square().sum(1).mean() * delta.square().mean().sqrt()
            self.unit[index] = (output / response).to(self.unit.device) if response > 0 else 1.0

    @abstractmethod
    def step_changes(
        self, task: Task, examples: Sequence[Example], prefix: FrozenPrefix, states: Tensor | None
    ) -> dict[str, LowRank]:
        """Return what each edit pair, as an episode of its own, changes; differentiable in the editor's parameters.

        The first :meth:`shared_rank` factor pairs are the same for all episodes, those of the edit pair follow.

        Args:
            task: the base model.
            examples: the edit pairs.
            prefix: the blocks below the edited ones.
            states: the input of the lowest edited block; None to run the whole model.
        """

    def shared_rank(self, name: str) -> int:
        """Return the number of factor pairs of a matrix's change that all edits share."""
        return 0

    def episode_changes(
        self, source: ActivationSource, examples: Sequence[Example], factored_gradients: FactoredGradients | None = None
    ) -> dict[str, LowRank]:
        """Return what each edit pair changes; only the input of the lowest edited block is taken from the cache."""
        return self.step_changes(source.task, examples, source.prefix, source.prefix_states(examples))

    # -- edit ----------------------------------------------------------------------------------------------------

    def combine(self, task: Task, requests: Sequence[EditRequest]) -> dict[str, LowRank]:
        """Return the sum of what each request changes; what all edits share is in it once."""
        parts = self._changes_of_each(task, requests)
        changes = {}
        for name in self.shapes:
            of_requests, shared = [part[name] for part in parts], self.shared_rank(name)
            u = torch.cat([of_requests[0].u[:shared], *(change.u[shared:] for change in of_requests)])
            delta = torch.cat([of_requests[0].delta[:shared], *(change.delta[shared:] for change in of_requests)])
            changes[name] = LowRank(u, delta)
        return changes

    @torch.enable_grad()
    def changes(self, task: Task, requests: Sequence[EditRequest]) -> list[dict[str, LowRank]]:
        """Return what each request changes by itself."""
        examples = [task.encode(request.prompt, request.target) for request in requests]
        prefix = FrozenPrefix(task.model, self.shapes)
        batched = {n: change.detach() for n, change in self.step_changes(task, examples, prefix, None).items()}
        return [
            {name: _without_padding(change, episode, self.shared_rank(name)) for name, change in batched.items()}
            for episode in range(len(examples))
        ]


def _without_padding(change: LowRank, episode: int, shared_rank: int) -> LowRank:
    """Return one episode's change without the factor pairs of padding, whose delta is zero."""
    selected = change.select(torch.tensor([episode], device=change.u.device))
    nonzero = (selected.delta[0] != 0).any(1)
    nonzero[:shared_rank] = True
    return replace(selected, u=selected.u[0, nonzero], delta=selected.delta[0, nonzero])
