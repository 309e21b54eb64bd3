"""``Ridge``: the editor that needs no training. Keys and gradients of the request alone, and a ridge regression.

After UltraEdit (Gu et al., arXiv 2505.14679): the gradient says how the matrix's output should move at each target
token of a request, and ΔW is the closed-form ridge solution that maps the tokens' keys to these moves. Two things
differ. Keys are whitened by the second moment of the matrix's inputs over ordinary text (the model's own writing, where
none is given), not standardized by the statistics of earlier edits: those do not exist for the first edit, and would
make an edit depend on what was edited before. And the strength of an edit is searched, not set: its moves are scaled to
a multiple of the least that makes the model answer with the target, and to nothing where the model answers so already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor, nn

from remend.config import Config, Factor
from remend.core.capture import capture_gradient_factors
from remend.core.layers import dimensions, weight_rms
from remend.core.least_squares import least_squares
from remend.core.low_rank import LowRank
from remend.core.response import Response
from remend.core.symmetric_operator import SymmetricOperator
from remend.editors.base import WeightEditor
from remend.editors.factor_packing import EpisodePadding, PackedFactors, pack_active
from remend.editors.info import EditorInfo
from remend.editors.input_moments import whiteners
from remend.editors.saved_editor import SavedEditor
from remend.editors.strength_search import UneditedPass, smallest_effective_scales
from remend.models.editable_matrices import editable_modules
from remend.request import EditRequest
from remend.tasks.base import Task, in_batches


@dataclass(frozen=True)
class RidgeConfig(Config):
    """Settings of the training-free editor; chosen on the atlas's validation split.

    Attributes:
        strength: the strength of an edit, as a multiple of the least at which the model answers with the target: more
            reaches more paraphrases, and more neighbours. It has no effect on targets that are numbers.
        ridge: λ of the regression, as a share of a key's mean answer to itself.
        floor: what the whitening adds to every eigenvalue of the keys, as a share of their mean.
        gate: if not 0, an edit acts only on keys that answer to it with more than this (its own answer with 1): what a
            hundred edits at once do to each other's neighbours falls below it. It is no change of a weight then
            (:class:`remend.core.low_rank.LowRank`).
    """

    strength: PositiveFloat = 2.0
    ridge: PositiveFloat = 0.01
    floor: PositiveFloat = 0.01
    gate: Factor = 0.0


class Ridge(WeightEditor):
    """The training-free editor; by default of the narrowing MLP matrices of the last three blocks.

    Attributes:
        whitening: the operator that whitens the inputs of each edited matrix.
    """

    info: ClassVar[EditorInfo] = EditorInfo(
        "ridge",
        "after Gu et al. (arXiv 2505.14679)",
        "nothing",
        batches=True,
        options=("text", "modules", "layers"),
    )
    config_class: ClassVar[type[Config]] = RidgeConfig
    measured_settings: ClassVar[tuple[str, ...] | None] = ("floor",)
    whitening: dict[str, SymmetricOperator]

    @classmethod
    def select_modules(
        cls, task: Task, config: Any, modules: Sequence[str], layers: str | None
    ) -> dict[str, nn.Module]:
        """Return the matrices to edit; by default the narrowing ones of the MLPs of the last three blocks."""
        return editable_modules(task.model, modules, outputs_only=True, layers=layers)

    def prepare(self, task: Task, text: Sequence[str], seed: int) -> None:
        """Measure the second moments of the matrices' inputs, and whiten by them."""
        modules = self.edited_modules(task)
        # The floor keeps directions that ordinary text hardly uses from being blown up without limit.
        operators = whiteners(task, modules, task.ordinary_examples(text, seed), self.config.floor)
        self.whitening = {name: operators[name].to(task.device) for name in self.shapes}

    def combine(self, task: Task, requests: Sequence[EditRequest]) -> dict[str, LowRank]:
        """Return the changes that solve for the keys of all requests together."""
        changes = {}
        for name, parts in self._keys_and_moves(task, requests).items():
            keys, moves = (torch.cat(rows) for rows in zip(*parts, strict=True))
            changes[name] = self._solve(name, keys, moves)
        return changes

    def changes(self, task: Task, requests: Sequence[EditRequest]) -> list[dict[str, LowRank]]:
        """Return the changes that solve for the keys of each request."""
        by_matrix = self._keys_and_moves(task, requests)
        return [
            {name: self._solve(name, *parts[index]) for name, parts in by_matrix.items()}
            for index in range(len(requests))
        ]

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the whitening operators."""
        tensors = {}
        for index, name in enumerate(self.shapes):
            operator = self.whitening[name]
            tensors[f"whitener_{index}"] = operator.inner
            if operator.basis is not None:
                tensors[f"basis_{index}"] = operator.basis
        return tensors

    def restore(self, saved: SavedEditor) -> None:
        """Take over the whitening operators."""
        self.whitening = {
            name: SymmetricOperator(saved.tensors[f"whitener_{index}"], saved.tensors.get(f"basis_{index}"))
            for index, name in enumerate(self.shapes)
        }
        for name, operator in self.whitening.items():
            if (operator.inner if operator.basis is None else operator.basis).shape[0] != self.shapes[name][0]:
                raise RuntimeError(f"the whitening of {name} is not of {self.shapes[name][0]} dimensions")

    def _solve(self, name: str, keys: Float[Tensor, "row d_in"], moves: Float[Tensor, "row d_out"]) -> LowRank:
        """Return ΔW = Vᵀ (K Kᵀ + λ I)⁻¹ K in whitened coordinates: one factor pair for each key."""
        change = least_squares(keys, moves, ridge=self.config.ridge, response=Response.from_gate(self.config.gate))
        return replace(change, u=self.whitening[name].to(change.u.device)(change.u))

    def _keys_and_moves(
        self, task: Task, requests: Sequence[EditRequest]
    ) -> dict[str, list[tuple[Float[Tensor, "row d_in"], Float[Tensor, "row d_out"]]]]:
        """Return for each matrix and request the whitened keys of its tokens, and how the output there should move."""
        examples = [task.encode(request.prompt, request.target) for request in requests]
        by_matrix: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.whitening}
        modules, discrete = self.edited_modules(task), task.distribution.discrete
        for part in in_batches(examples):
            batch = task.collate(part)
            unedited = UneditedPass(task, batch, self.whitening, all_targets=True)
            factors = capture_gradient_factors(
                task.model,
                modules,
                task.token_masks(batch, self.whitening, True),
                unedited.loss if discrete else unedited.squared_error,
            )[1]
            rows = pack_active(factors, task.device)
            keys = {name: self.whitening[name].to(packed.u.device)(packed.u) for name, packed in rows.items()}
            moves = {name: -packed.delta * _unit(packed, modules[name]) for name, packed in rows.items()}
            single = {name: self._solve_each(name, keys[name], moves[name], rows[name]) for name in rows}
            # An infinite settle gives a request whose target is the model's answer already the scale 1 / inf = 0.
            scales = smallest_effective_scales(unedited, single, settle=math.inf)
            if discrete:  # a token can be made ever more probable, a number is overshot
                scales = self.config.strength * scales
            for name, packed in rows.items():
                of_requests = zip(keys[name].split(packed.counts), moves[name].split(packed.counts), strict=True)
                by_matrix[name] += [(k, scales[index] * v) for index, (k, v) in enumerate(of_requests)]
        return by_matrix

    def _solve_each(
        self, name: str, keys: Float[Tensor, "row d_in"], moves: Float[Tensor, "row d_out"], rows: PackedFactors
    ) -> LowRank:
        """Return the change of each request of a batch by itself, as a batched change."""
        parts = [
            self._solve(name, k, v) for k, v in zip(keys.split(rows.counts), moves.split(rows.counts), strict=True)
        ]
        table = EpisodePadding(rows.counts, keys.device)
        u, delta = torch.cat([part.u for part in parts]), torch.cat([part.delta for part in parts])
        return LowRank(table(u), table(delta), Response.from_gate(self.config.gate))


def _unit(rows: PackedFactors, module: nn.Module) -> Float[Tensor, "row 1"]:
    """Return the factor that makes each request's gradient as large as the matrix's usual output."""
    # Without it the matrix with the largest gradients would take most of an edit; with it they share it evenly.
    delta_norms = rows.delta_norms().clamp(min=1e-30)
    counts = torch.tensor(rows.counts, device=delta_norms.device)
    input_norms = torch.stack([u.norm(dim=1).mean() if len(u) else u.sum() for u in rows.u.split(rows.counts)])
    output = input_norms * weight_rms(module) * dimensions(module)[1] ** 0.5
    factors: Tensor = (output / delta_norms).repeat_interleave(counts)[:, None]
    return factors
