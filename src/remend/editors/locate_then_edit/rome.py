"""``Rome``: rank-one model editing (Meng et al., NeurIPS 2022, arXiv 2202.05262)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from remend.config import Config
from remend.core.low_rank import LowRank
from remend.editors.info import EditorInfo
from remend.editors.locate_then_edit.base import TASK_REQUIREMENTS, LocateThenEdit, in_prompt_batches
from remend.editors.locate_then_edit.value_optimization import DescentConfig, optimize_values, subject_batches
from remend.models.frozen_prefix import FrozenPrefix
from remend.request import EditRequest
from remend.tasks.base import Task


@dataclass(frozen=True)
class RomeConfig(DescentConfig):
    """Settings of ROME; chosen on the atlas's validation split."""


class Rome(LocateThenEdit):
    """ROME: one matrix, and a change of rank one for each request; several requests are summed.

    ΔW = (v* − W k*) (C⁻¹k*)ᵀ / (k*ᵀC⁻¹k*) (Eq. 2): the least change, as text weighs it, with (W + ΔW) k* = v*.
    """

    info: ClassVar[EditorInfo] = EditorInfo(
        "rome",
        "Meng et al., NeurIPS 2022 (arXiv 2202.05262)",
        "text",
        options=("text", "layers"),
        requires=TASK_REQUIREMENTS,
    )
    config_class: ClassVar[type[Config]] = RomeConfig
    one_block: ClassVar[bool] = True

    @staticmethod
    def default_blocks(count: int) -> list[int]:
        """Return the block at a sixth of the depth: number 5 of 28 or 32, where later work on larger models edits."""
        return [max(0, min(round(count / 6), count - 2))]

    def changes(self, task: Task, requests: Sequence[EditRequest]) -> list[dict[str, LowRank]]:
        """Return the rank-one change of each request (Eq. 2)."""
        ((name, module),) = self.edited_modules(task).items()
        prefix = FrozenPrefix(task.model, [name])
        changes: list[dict[str, LowRank]] = []
        for contexts in in_prompt_batches(self.encode(task, requests)):
            batch, kept = subject_batches(task, contexts, prefix)
            keys = batch.keys(name, module)
            offsets = optimize_values(batch, kept, module, self.block_of(task, name), self.config)  # v* − W k*
            whitened = self.whiten_keys(name, keys)
            u = (whitened / (keys.to(whitened) * whitened).sum(1, keepdim=True)).to(keys)
            changes += [{name: LowRank(u[i : i + 1], offsets[i : i + 1].to(u))} for i in range(len(contexts))]
        return changes
