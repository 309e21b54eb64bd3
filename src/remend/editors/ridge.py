"""The editor that needs no training: keys and gradients of the request alone, and a ridge regression.

After UltraEdit (Gu et al., arXiv 2505.14679): each target token of a request wants its matrix's output to move against
the gradient there, and ΔW is the closed-form ridge solution that maps the tokens' keys to the wanted moves. Two things
differ. Keys are whitened by the second moment of the matrix's inputs over ordinary text (the model's own writing, where
none is given), not standardised by the statistics of earlier edits: those do not exist for the first edit, and would
make an edit depend on what was edited before. And how strong an edit must be is looked up, not set: what a request
wants is scaled to a multiple of the least that makes the model answer with the target, and of what it answers with the
target already to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor

from remend.config import Config, Factor
from remend.core.capture import capture_gradient_factors
from remend.core.layers import dimensions, expert_count, weight_rms
from remend.core.least_squares import least_squares
from remend.core.low_rank import LowRank
from remend.core.operators import SymmetricOperator
from remend.edit import Edit
from remend.editors.calibration_data import whiteners
from remend.editors.info import EditorInfo, checked
from remend.editors.packing import PackedFactors, Table, active_rows
from remend.editors.strength_search import UneditedPass, taking_scales
from remend.errors import ConfigError
from remend.fingerprint import ModelFingerprint, find_modules
from remend.models.structure import editable_modules
from remend.request import EditRequest
from remend.tasks.base import Task, in_batches


@dataclass(frozen=True)
class RidgeConfig(Config):
    """Settings of the training-free editor; chosen on the atlas's validation split.

    Attributes:
        strength: an edit is so many times as strong as would just do: more reaches more paraphrases, and neighbours.
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


class Ridge:
    """The training-free editor.

    Attributes:
        config: its settings.
        base: the model it is for.
        whitening: of each edited matrix, what whitens its inputs.
    """

    traits: ClassVar[EditorInfo] = EditorInfo("ridge", "after Gu et al. (arXiv 2505.14679)", "nothing", batches=True)

    def __init__(self, config: RidgeConfig, base: ModelFingerprint, whitening: dict[str, SymmetricOperator]) -> None:
        self.config, self.base, self.whitening = config, base, whitening

    @classmethod
    def create(
        cls,
        task: Task,
        config: RidgeConfig | None = None,
        *,
        text: Sequence[str] = (),
        seed: int = 0,
        modules: Sequence[str] = (),
        layers: str | None = None,
    ) -> Ridge:
        """The editor for ``model``; by default of the narrowing MLP matrices of the last three blocks.

        Args:
            task: the base model.
            text: passages like those that the model meets; by default it writes some itself.
            config: settings.
            modules: globs of the matrices to edit.
            layers: the blocks to look in.
            seed: of what the model writes.

        Raises:
            ModelError: there is nothing to edit, or nothing matches.
            ConfigError: the text is empty, or a matrix belongs to several experts.
        """
        config = config or RidgeConfig()
        chosen = editable_modules(task.model, modules, outputs_only=True, layers=layers)
        if several := [name for name, module in chosen.items() if expert_count(module)]:
            raise ConfigError(f"{several[0]} holds several experts' matrices, which ridge cannot edit: use MEND")
        found = whiteners(task, chosen, task.ordinary_examples(text, seed), config.floor)
        device = task.device
        return cls(
            config, ModelFingerprint.of(task.model, chosen), {name: own.to(device) for name, own in found.items()}
        )

    def edit(self, task: Task, requests: Sequence[EditRequest]) -> Edit:
        """One edit for all ``requests``: each one's tokens get what it wants, whatever the others' keys answer.

        Raises:
            RequestError: there is no request, or one does not fit the model's context.
            WrongBaseError: the editor is for another kind of model.
            NonFiniteError: the model's weights or activations hold NaN or infinity.
        """
        base = checked(self.base, task.model, requests)
        wanted = self._wanted(task, requests)
        changes = {}
        for name, parts in wanted.items():
            keys, moves = torch.cat([own[0] for own in parts]), torch.cat([own[1] for own in parts])
            changes[name] = self._solved(name, keys, moves)
        return Edit(changes, base, tuple(requests), self._signature())

    def edit_each(self, task: Task, requests: Sequence[EditRequest]) -> list[Edit]:
        """One edit for each request, each made from the unedited model. Errors as :meth:`edit`."""
        base = checked(self.base, task.model, requests)
        wanted = self._wanted(task, requests)
        return [
            Edit({name: self._solved(name, *own[e]) for name, own in wanted.items()}, base, (r,), self._signature())
            for e, r in enumerate(requests)
        ]

    def _solved(self, name: str, keys: Float[Tensor, "row d_in"], moves: Float[Tensor, "row d_out"]) -> LowRank:
        """ΔW = Vᵀ (K Kᵀ + λ I)⁻¹ K in whitened coordinates: a pair for each key."""
        found = least_squares(keys, moves, ridge=self.config.ridge, gate=self.config.gate)
        return replace(found, u=self.whitening[name](found.u))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _wanted(
        self, task: Task, requests: Sequence[EditRequest]
    ) -> dict[str, list[tuple[Float[Tensor, "row d_in"], Float[Tensor, "row d_out"]]]]:
        """Of each matrix, for each request: its tokens' whitened keys, and how the output there should move."""
        pairs = [task.encode(request.prompt, request.target) for request in requests]
        found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.whitening}
        modules = find_modules(task.model, self.whitening)
        for some in in_batches(pairs):
            batch = task.collate(some)
            unedited = UneditedPass(task, batch, self.whitening, whole=True)
            factors = capture_gradient_factors(
                task.model, modules, task.token_masks(batch, self.whitening, True), unedited.loss
            )[1]
            rows = active_rows(factors, task.device)
            keys = {name: self.whitening[name](own.u) for name, own in rows.items()}
            moves = {name: -own.delta * _unit(own, modules[name]) for name, own in rows.items()}
            alone = {name: self._alone(name, keys[name], moves[name], rows[name]) for name in rows}
            scales = self.config.strength * taking_scales(unedited, alone, settle=math.inf)  # what is known stays
            for name, own in rows.items():
                for e, (k, v) in enumerate(zip(*(x[name].split(own.counts) for x in (keys, moves)), strict=True)):
                    found[name].append((k, scales[e] * v))
        return found

    def _alone(
        self, name: str, keys: Float[Tensor, "row d_in"], moves: Float[Tensor, "row d_out"], rows: PackedFactors
    ) -> LowRank:
        """What each request of a batch would make by itself, as a batched change."""
        parts = [self._solved(name, k, v) for k, v in zip(*(x.split(rows.counts) for x in (keys, moves)), strict=True)]
        table = Table(rows.counts, keys.device)
        u, delta = torch.cat([own.u for own in parts]), torch.cat([own.delta for own in parts])
        return LowRank(table(u), table(delta), self.config.gate)

    def _signature(self) -> dict[str, object]:
        return {"name": self.traits.name, **asdict(self.config)}


def _unit(rows: PackedFactors, module: torch.nn.Module) -> Float[Tensor, "row 1"]:
    """What makes each request's gradient as large as a matrix's usual output: matrices then share an edit evenly."""
    sizes = rows.sizes().clamp(min=1e-30)
    counts = torch.tensor(rows.counts, device=sizes.device)
    read = torch.stack([own.norm(dim=1).mean() if len(own) else own.sum() for own in rows.u.split(rows.counts)])
    output = read * weight_rms(module) * dimensions(module)[1] ** 0.5
    found: Tensor = (output / sizes).repeat_interleave(counts)[:, None]
    return found
