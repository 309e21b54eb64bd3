"""``GradientTransform``: MEND's parameters, and the mapping from packed gradient factors to low-rank changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.core.capture import GradientFactors
from remend.core.editor_gradients import FactoredGradients
from remend.core.editor_network import EditorNetwork
from remend.core.least_squares import least_squares, make_definite
from remend.core.low_rank import LowRank, concatenate
from remend.core.response import Response
from remend.core.sketched_moment import sketch_directions
from remend.core.symmetric_operator import SymmetricOperator, pack_symmetric, unpack_symmetric
from remend.editors.factor_packing import EpisodePadding, PackedFactors, pack_active
from remend.editors.mend.config import MendConfig
from remend.editors.mend.networks import group_matrices, new_network
from remend.editors.saved_editor import SavedEditor
from remend.editors.trainable import TrainableEditor
from remend.fingerprint import ModelFingerprint

SMALLEST_RESPONSE = 0.2
"""Discriminants scale ũ by 1 / (u·ũ), but by no more than if u·ũ were this; its mean over the training prompts is 1."""

TransformT = TypeVar("TransformT", bound="GradientTransform")


class GradientTransform(TrainableEditor):
    """One editor network for each weight shape (or matrix), and one step size α for each edited matrix.

    Attributes:
        groups: the matrices that share a network, by its key: those of one shape, or each matrix by itself.
        directions: the number of directions in which inputs are whitened, by matrix, where not in all.
        unit: the unit of each matrix's α; 1 unless step sizes are relative.
        largest: the norm to which each matrix's gradients are clipped, if they are.
    """

    config: MendConfig
    unit: Float[Tensor, " matrix"]
    largest: Float[Tensor, " matrix"] | None

    def __init__(
        self,
        config: MendConfig,
        base: ModelFingerprint,
        shapes: Mapping[str, tuple[int, int]],
        directions: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(config, base, shapes)
        if directions is None:
            sketched = {name: sketch_directions(d_in) for name, (d_in, _) in shapes.items() if config.ridge}
            directions = {name: k for name, k in sketched.items() if k}
        self.directions = dict(directions)
        self.groups = group_matrices(self.shapes, config.share)
        self.networks = nn.ModuleDict(
            {key: new_network(config, *self.shapes[names[0]], len(names)) for key, names in self.groups.items()}
        )
        self.alpha = nn.Parameter(torch.full((len(self.shapes),), config.alpha))
        self.register_buffer("unit", torch.ones(len(self.shapes)))
        self.register_buffer("largest", torch.full((len(self.shapes),), torch.inf) if config.limit else None)
        # The parts of a SymmetricOperator each: a basis of some directions, if not all, and a matrix in its
        # coordinates, or its diagonal. They start as the identity.
        for index, (name, (d_in, _)) in enumerate(self.shapes.items()):
            k = self.directions.get(name)
            whitener = torch.ones(k + 1) if k else torch.eye(d_in)
            self.register_buffer(f"basis_{index}", torch.eye(d_in, k) if k else None)
            self.register_buffer(f"whitener_{index}", whitener if config.ridge else None)
            self.register_buffer(f"contrast_{index}", torch.eye(k + 1 if k else d_in) if config.contrast else None)

    def index(self, name: str) -> int:
        """Return the index of an edited matrix in :attr:`alpha` and :attr:`unit`."""
        return list(self.shapes).index(name)

    def network(self, key: str) -> EditorNetwork:
        """Return the network of a key of :attr:`groups`."""
        network = self.networks[key]
        assert isinstance(network, EditorNetwork)
        return network

    # -- operators -----------------------------------------------------------------------------------------------

    def operator(self, kind: str, name: str) -> SymmetricOperator | None:
        """Return the ``whitener`` of a matrix, or its discriminant (``contrast``), if the editor has one."""
        matrix, basis = (getattr(self, f"{part}_{self.index(name)}") for part in (kind, "basis"))
        return None if matrix is None else SymmetricOperator(matrix, basis)

    def set_operator(self, kind: str, name: str, operator: SymmetricOperator) -> None:
        """Replace an operator by a measured one."""
        for part, value in ((kind, operator.inner), ("basis", operator.basis)):
            setattr(self, f"{part}_{self.index(name)}", value)

    def whiten(self, u: Float[Tensor, "row d_in"], name: str) -> Float[Tensor, "row d_in"]:
        """Return a matrix's inputs in whitened coordinates, or, since the operator is symmetric, ũ back from there."""
        whitener = self.operator("whitener", name)
        return u if whitener is None else whitener(u)

    # -- save and load -------------------------------------------------------------------------------------------

    @classmethod
    def unrestored(cls: type[TransformT], config: Any, saved: SavedEditor) -> TransformT:
        """Return the editor with the shapes of the saved tensors, which :meth:`restore` puts in place."""
        bases = {name: saved.tensors.get(f"basis_{index}") for index, name in enumerate(saved.shapes)}
        directions = {name: basis.shape[1] for name, basis in bases.items() if basis is not None and basis.dim() == 2}
        # On "meta" nothing is allocated or initialized before load_state_dict assigns the saved tensors.
        with torch.device("meta"):
            return cls(config, saved.base, saved.shapes, directions)

    def restore(self, saved: SavedEditor) -> None:
        """Take over parameters, buffers and what training recorded."""
        # Stored as float16 where size matters; the editor always computes in float32.
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in saved.tensors.items()}
        tensors |= {name: unpack_symmetric(tensors[name]) for name in self._symmetric_tensors() & tensors.keys()}
        self.load_state_dict(tensors, assign=True)
        self.trained = saved.field("trained", dict)

    def saved_tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return parameters and buffers, the matrices in ``dtype``; of symmetric matrices, one half."""
        state = self.state_dict()
        tensors = {name: t.to(dtype) if t.dim() == 2 and "statistics" not in name else t for name, t in state.items()}
        return tensors | {name: pack_symmetric(tensors[name]) for name in self._symmetric_tensors()}

    def _symmetric_tensors(self) -> set[str]:
        """Return the names of the tensors that are symmetric matrices."""
        return {n for n, t in self.state_dict().items() if n.startswith(("whitener_", "contrast_")) and t.dim() == 2}

    # -- packed factors to changes -------------------------------------------------------------------------------

    def pack(self, factors: Mapping[str, GradientFactors]) -> dict[str, PackedFactors]:
        """Return the factors at tokens that carry gradient, whitened and clipped: what the networks read."""
        return self.whiten_and_clip(pack_active(factors, self.device))

    def whiten_and_clip(self, packed: Mapping[str, PackedFactors]) -> dict[str, PackedFactors]:
        """Whiten inputs and clip gradients, if the editor does so."""
        whitened = {name: replace(matrix, u=self.whiten(matrix.u, name)) for name, matrix in packed.items()}
        if self.largest is None:
            return whitened
        return {name: matrix.clipped(self.largest[self.index(name)]) for name, matrix in whitened.items()}

    def forward(
        self, packed: Mapping[str, PackedFactors], factored_gradients: FactoredGradients | None = None
    ) -> dict[str, LowRank]:
        """Compute the batched change of each matrix for each episode: ΔW_ℓ = −α_ℓ Σ_j δ̃_j ũ_jᵀ (Eq. 2).

        The tokens of all matrices of one shape go through their network together.

        Args:
            packed: what :meth:`pack` returned.
            factored_gradients: where the backward pass puts the gradients of the networks' matrices, as factors.
        """
        changes: dict[str, LowRank] = {}
        steps = dict(zip(self.shapes, self.alpha * self.unit, strict=True))
        for name, (u, delta) in self.transform(packed, factored_gradients).items():
            padding = EpisodePadding(packed[name].counts, self.device)
            experts = packed[name].experts
            padded_experts = None if experts is None else padding(experts[:, None])[..., 0]
            u, delta = padding(self.whiten(u, name)), padding(delta * -steps[name])
            changes[name] = LowRank(u, delta, Response.from_gate(self.config.gate), padded_experts)
        return {name: changes[name] for name in self.shapes}

    def transform(
        self, packed: Mapping[str, PackedFactors], factored_gradients: FactoredGradients | None = None
    ) -> dict[str, tuple[Float[Tensor, "_row d_in"], Float[Tensor, "_row d_out"]]]:
        """Compute ũ (in whitened coordinates) and δ̃ of each matrix's tokens."""
        transformed = {}
        for key, names in self.groups.items():
            u, delta = [packed[name].u for name in names], [packed[name].delta for name in names]
            pseudo = self.network(key)(u, delta, factored_gradients)
            for matrix, (name, (pseudo_u, pseudo_delta)) in enumerate(zip(names, pseudo, strict=True)):
                if self.config.contrast:
                    pseudo_u = self._discriminate(pseudo_u, packed[name].u, key, matrix)
                transformed[name] = pseudo_u, pseudo_delta
        return transformed

    def _discriminate(
        self, pseudo_u: Float[Tensor, "row d_in"], u: Float[Tensor, "row d_in"], key: str, matrix: int
    ) -> Float[Tensor, "row d_in"]:
        """Apply the discriminant to ũ in the units of u, and scale the result so that u·ũ = 1."""
        discriminant = self.operator("contrast", self.groups[key][matrix])
        assert discriminant is not None
        direction = discriminant(self.network(key).denormalize_u(pseudo_u, matrix))
        scaled: Tensor = direction / (direction * u).sum(1, keepdim=True).clamp(min=SMALLEST_RESPONSE)
        return scaled

    @torch.no_grad()
    def solve_together(self, name: str, parts: Sequence[LowRank], inputs: Float[Tensor, "row d_in"]) -> LowRank:
        """Return a change that changes a matrix's output at each request's ``inputs`` as its part does by itself."""
        inputs_of_parts = inputs.split([part.rank for part in parts])
        pairs = zip(parts, inputs_of_parts, strict=True)
        output_changes = torch.cat([part.output_change(rows, part.experts) for part, rows in pairs])
        discriminant = self.operator("contrast", name)
        metric = None if discriminant is None else make_definite(discriminant)
        joined = concatenate(parts)
        change = least_squares(
            self.whiten(inputs, name), output_changes, metric, response=joined.response, experts=joined.experts
        )
        return replace(change, u=self.whiten(change.u, name))
