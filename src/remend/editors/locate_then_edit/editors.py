"""Editors that locate a fact: the MLPs in the middle of a model, where it reads the subject's last token.

A narrowing MLP matrix W is seen as a memory that answers a key k with a value W k. ROME (Meng et al., NeurIPS 2022,
arXiv 2202.05262) makes one of them answer the subject's key with another value, and MEMIT (Meng et al., ICLR 2023,
arXiv 2210.07229) several consecutive ones, for many requests together. What other keys are answered is kept as far as
the second moment C = E[k kᵀ] of the keys of ordinary text tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor, nn
from transformers import PreTrainedModel

from remend.core.hooks import changes_applied, frozen
from remend.core.low_rank import LowRank, concatenate
from remend.editors.info import EditorInfo
from remend.editors.locate_then_edit.base import LocateThenEdit, chunks
from remend.editors.locate_then_edit.subject_prompts import Reading
from remend.editors.locate_then_edit.value_optimization import LocateConfig, Sites, adding, tuned
from remend.errors import ConfigError
from remend.fingerprint import find_modules
from remend.models.frozen_prefix import FrozenPrefix
from remend.tasks.base import Task


@dataclass(frozen=True)
class RomeConfig(LocateConfig):
    """Settings of ROME; chosen on the atlas's validation split."""


@dataclass(frozen=True)
class MemitConfig(LocateConfig):
    """Settings of MEMIT; chosen on the atlas's validation split.

    Attributes:
        weight: λ, how much the keys of ordinary text count against those of the requests, as a share of the number of
            dimensions: an ordinary key's kᵀC⁻¹k.
    """

    largest: PositiveFloat = 1.5  # the offsets of many requests add up where their keys are alike
    weight: PositiveFloat = 0.2


class Rome(LocateThenEdit):
    """ROME: one matrix, and a change of rank one for each request.

    ΔW = (v* − W k*) (C⁻¹k*)ᵀ / (k*ᵀC⁻¹k*) (Eq. 2): the least change, as text weighs it, with (W + ΔW) k* = v*.
    """

    traits: ClassVar[EditorInfo] = EditorInfo("rome", "Meng et al., NeurIPS 2022 (arXiv 2202.05262)", "text")
    configuration: ClassVar[type[LocateConfig]] = RomeConfig

    @staticmethod
    def places(count: int) -> list[int]:
        """The block at a sixth of the depth: number 5 of 28 or 32, where later work on larger models edits too."""
        return [max(0, min(round(count / 6), count - 2))]

    @classmethod
    def _matrices(cls, model: PreTrainedModel, layers: str | None) -> dict[str, nn.Module]:
        chosen = super()._matrices(model, layers)
        if len(chosen) > 1:
            raise ConfigError(
                f"rome edits one block, and layers {layers!r} names {len(chosen)}: name one, or use memit"
            )
        return chosen

    def _together(self, task: Task, readings: Sequence[Reading]) -> dict[str, LowRank]:
        """The sum of what each request changes by itself: ROME knows no more for several."""
        parts = self._apart(task, readings)
        return {name: concatenate([part[name] for part in parts]) for name in self.shapes}

    @torch.inference_mode(False)
    @torch.no_grad()
    def _apart(self, task: Task, readings: Sequence[Reading]) -> list[dict[str, LowRank]]:
        ((name, module),) = find_modules(task.model, self.shapes).items()
        prefix = FrozenPrefix(task.model, [name])
        found = []
        for some in chunks(readings):
            sites = Sites(task, some, prefix)
            keys, offsets = sites.keys(name, module), tuned(sites, module, self._block(task.model, name), self.config)
            inverse = self._inverse(name, keys)
            u = (inverse / (keys.to(inverse) * inverse).sum(1, keepdim=True)).to(keys)
            found += [{name: LowRank(u[e : e + 1], offsets[e : e + 1].to(u))} for e in range(len(some))]
        return found


class Memit(LocateThenEdit):
    """MEMIT: several consecutive matrices, each of which takes its share of what all requests want.

    What the last block should give at each subject is tuned first. Then, from the lowest block on and with the lower
    changes at work, R is what is still missing there, spread over the blocks that are left, K holds the keys as
    columns, and ΔW = R Kᵀ (λC + K Kᵀ)⁻¹ (Eq. 14), in its dual form R (I + Kᵀ(λC)⁻¹K)⁻¹ Kᵀ (λC)⁻¹, whose rank is the
    number of requests.
    """

    traits: ClassVar[EditorInfo] = EditorInfo(
        "memit", "Meng et al., ICLR 2023 (arXiv 2210.07229)", "text", batches=True
    )
    configuration: ClassVar[type[LocateConfig]] = MemitConfig

    @staticmethod
    def places(count: int) -> list[int]:
        """The blocks from 0.11 to 0.28 of the depth: numbers 3 to 8 of 32."""
        return list(range(math.floor(0.11 * count), math.ceil(0.28 * count)))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _apart(self, task: Task, readings: Sequence[Reading]) -> list[dict[str, LowRank]]:
        found = []
        for some in chunks(readings):
            changes = self._spread(task, [some], together=False)
            found += [{name: change.single_episode(e, 1) for name, change in changes.items()} for e in range(len(some))]
        return found

    @torch.inference_mode(False)
    @torch.no_grad()
    def _together(self, task: Task, readings: Sequence[Reading]) -> dict[str, LowRank]:
        return self._spread(task, chunks(readings), together=True)

    def _spread(self, task: Task, parts: Sequence[Sequence[Reading]], together: bool) -> dict[str, LowRank]:
        """The changes of one chunk's requests, each by itself (as episodes), or of all chunks' together."""
        modules = find_modules(task.model, self.shapes)
        prefix, last = FrozenPrefix(task.model, self.shapes), list(self.shapes)[-1]
        block = self._block(task.model, last)
        goals = torch.cat([_goals(Sites(task, some, prefix), modules[last], block, self.config) for some in parts])
        changes: dict[str, LowRank] = {}
        for place, name in enumerate(self.shapes):
            keys, given = [], []
            for some in parts:
                sites = Sites(task, some, prefix)
                with changes_applied(modules, changes), adding(block, sites, None) as written:
                    keys.append(sites.keys(name, modules[name]))
                given.append(sites.by_itself(written[0]))
            missing = (goals - torch.cat(given)) / (len(self.shapes) - place)
            changes[name] = self._solved(name, torch.cat(keys), missing, together)
        return changes

    def _solved(
        self, name: str, keys: Float[Tensor, "request d_in"], missing: Float[Tensor, "request d_out"], together: bool
    ) -> LowRank:
        """The change that gives each key what it misses, if ordinary keys let it; of each request by itself, or all."""
        lam = self.config.weight * self.shapes[name][0]
        inverse = self._inverse(name, keys) / lam
        if together:
            answers = keys.to(inverse) @ inverse.mT + torch.eye(len(keys), dtype=inverse.dtype)
            return LowRank(inverse.to(keys), torch.linalg.solve(answers, missing.to(inverse)).to(keys))
        answers = 1 + (keys.to(inverse) * inverse).sum(1, keepdim=True)
        return LowRank(inverse[:, None].to(keys), (missing.to(inverse) / answers)[:, None].to(keys))


def _goals(sites: Sites, module: nn.Module, block: nn.Module, config: LocateConfig) -> Float[Tensor, "request d"]:
    """z: what the last block should give at the subject of each prompt by itself (Eq. 16)."""
    offsets = tuned(sites, module, block, config)
    with frozen(sites.task.model), adding(block, sites, None) as written, adding(module, sites, offsets):
        sites.resumed()
    return sites.by_itself(written[0])
