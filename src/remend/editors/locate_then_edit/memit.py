"""``Memit``: mass-editing memory in a transformer (Meng et al., ICLR 2023, arXiv 2210.07229)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor, nn

from remend.config import Config
from remend.core.low_rank import LowRank
from remend.core.low_rank_hooks import changes_applied, frozen
from remend.editors.info import EditorInfo
from remend.editors.locate_then_edit.base import TASK_REQUIREMENTS, LocateThenEdit, in_prompt_batches
from remend.editors.locate_then_edit.subject_prompts import PromptContexts
from remend.editors.locate_then_edit.value_optimization import (
    DescentConfig,
    SubjectBatch,
    add_at_subject,
    optimize_values,
    subject_batches,
)
from remend.models.frozen_prefix import FrozenPrefix
from remend.request import EditRequest
from remend.tasks.base import Task


@dataclass(frozen=True)
class MemitConfig(DescentConfig):
    """Settings of MEMIT; chosen on the atlas's validation split.

    Attributes:
        weight: λ, how much the keys of ordinary text count against those of the requests, as a share of the number of
            dimensions: an ordinary key's kᵀC⁻¹k.
    """

    largest: PositiveFloat = 1.5  # the offsets of many requests add up where their keys are alike
    weight: PositiveFloat = 0.2


class Memit(LocateThenEdit):
    """MEMIT: several consecutive matrices, each of which takes its share of what all requests need.

    The output of the last block at each subject is optimized first. Then, from the lowest block on and with the lower
    changes applied, R is what is still missing there, spread over the blocks that are left, K holds the keys as
    columns, and ΔW = R Kᵀ (λC + K Kᵀ)⁻¹ (Eq. 14), in its dual form R (I + Kᵀ(λC)⁻¹K)⁻¹ Kᵀ (λC)⁻¹, whose rank is the
    number of requests.
    """

    info: ClassVar[EditorInfo] = EditorInfo(
        "memit",
        "Meng et al., ICLR 2023 (arXiv 2210.07229)",
        "text",
        batches=True,
        options=("text", "layers"),
        requires=TASK_REQUIREMENTS,
    )
    config_class: ClassVar[type[Config]] = MemitConfig

    @staticmethod
    def default_blocks(count: int) -> list[int]:
        """Return the blocks from 0.11 to 0.28 of the depth: numbers 3 to 8 of 32."""
        return list(range(math.floor(0.11 * count), math.ceil(0.28 * count)))

    def changes(self, task: Task, requests: Sequence[EditRequest]) -> list[dict[str, LowRank]]:
        """Return the changes that solve Eq. 14 for each request by itself."""
        changes: list[dict[str, LowRank]] = []
        for contexts in in_prompt_batches(self.encode(task, requests)):
            batched = self._spread(task, [contexts], together=False)
            changes += [
                {name: change.single_episode(i, 1) for name, change in batched.items()} for i in range(len(contexts))
            ]
        return changes

    def combine(self, task: Task, requests: Sequence[EditRequest]) -> dict[str, LowRank]:
        """Return the changes that solve Eq. 14 for all requests together."""
        return self._spread(task, list(in_prompt_batches(self.encode(task, requests))), together=True)

    def _spread(self, task: Task, parts: Sequence[Sequence[PromptContexts]], together: bool) -> dict[str, LowRank]:
        """Return the changes of all parts' requests together, or of one part's, each by itself (as episodes)."""
        modules = self.edited_modules(task)
        prefix, last = FrozenPrefix(task.model, self.shapes), list(self.shapes)[-1]
        block = self.block_of(task, last)
        goals = torch.cat(
            [_goals(*subject_batches(task, contexts, prefix), modules[last], block, self.config) for contexts in parts]
        )
        changes: dict[str, LowRank] = {}
        for index, name in enumerate(self.shapes):
            keys, outputs = [], []
            for contexts in parts:
                batch = SubjectBatch(task, [of_request.examples for of_request in contexts], prefix)
                with changes_applied(modules, changes), add_at_subject(block, batch, None) as recorded:
                    keys.append(batch.keys(name, modules[name], until=block))
                outputs.append(batch.prompts_alone(recorded[0]))
            # Each block adds its share; what the lower ones did not reach is spread over those that are left.
            missing = (goals - torch.cat(outputs)) / (len(self.shapes) - index)
            changes[name] = self._solve(name, torch.cat(keys), missing, together)
        return changes

    def _solve(
        self, name: str, keys: Float[Tensor, "request d_in"], missing: Float[Tensor, "request d_out"], together: bool
    ) -> LowRank:
        """Return the change that adds to each key's value what is missing: of all requests, or of each by itself."""
        lam = self.config.weight * self.shapes[name][0]
        whitened = self.whiten_keys(name, keys) / lam
        if together:
            system = keys.to(whitened) @ whitened.mT + torch.eye(len(keys), dtype=whitened.dtype)
            return LowRank(whitened.to(keys), torch.linalg.solve(system, missing.to(whitened)).to(keys))
        # The system of one request is one number.
        system = 1 + (keys.to(whitened) * whitened).sum(1, keepdim=True)
        return LowRank(whitened[:, None].to(keys), (missing.to(whitened) / system)[:, None].to(keys))


def _goals(
    batch: SubjectBatch, kept: Sequence[SubjectBatch], module: nn.Module, block: nn.Module, config: DescentConfig
) -> Float[Tensor, "request d"]:
    """Return z: the output that the last block should have at the subject of each prompt by itself (Eq. 16)."""
    offsets = optimize_values(batch, kept, module, block, config)
    # The block's hook runs after the module's, so that it records the output with the offset.
    with (
        frozen(batch.task.model),
        add_at_subject(block, batch, None) as recorded,
        add_at_subject(module, batch, offsets),
    ):
        batch.outputs_resumed()
    return batch.prompts_alone(recorded[0])
