"""Contrast: the direction of an input that paraphrases share and neighbours do not.

An edit ΔW = δ̃ ũᵀ acts on another prompt's key k (the matrix's input at the token before its answer) with the strength
ũ·k. So for a prompt with key u, ũ should answer to the keys of its paraphrases and not to its neighbours'. With keys
whitened to C = E[k kᵀ] = I, the direction of unit length for which E[ũ·k⁺ | u] − E[ũ·k⁻ | u] is largest is
E[k⁺ | u] − E[k⁻ | u], and the best linear estimate of these means is B u and N u, with B = E[k⁺ uᵀ] over paraphrases,
N = E[k⁻ uᵀ] over neighbours. So ũ = (B − N) u: nothing to train, and as low-rank as u itself. It is Fisher's
discriminant, with classes of which one example is known.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from remend.core.symmetric import Symmetric

LEAST = 0.1
"""The least mean answer of a key to itself, as a share of the number of dimensions, that contrast is trusted with."""


class Contrast:
    """Second moments of one matrix's keys: of all, of prompts with paraphrases, of prompts with neighbours.

    Args:
        d: the keys' dimensions.
        device: where sums are kept.
        whitener: what whitens keys, if anything. With a basis, moments are taken in its coordinates; what lies outside
            is taken to be alike in all directions there, and its mean over them is the moment's last entry.
    """

    def __init__(self, d: int, device: torch.device, whitener: Symmetric | None = None) -> None:
        self.whitener = whitener
        self.basis = None if whitener is None else whitener.basis
        self.within = d if self.basis is None else self.basis.shape[1]
        self.outside = d - self.within
        size = d if self.basis is None else self.within + 1
        self.all, self.same, self.near = (torch.zeros(size, size, device=device) for _ in range(3))
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)

    @property
    def totals(self) -> tuple[Tensor, ...]:
        """All state, as sums: what processes that saw different prompts add up."""
        return self.all, self.same, self.near, self.counts

    def update(
        self,
        keys: Float[Tensor, "prompt d"],
        owners: Int[Tensor, " prompt"],
        near: Float[Tensor, "neighbour d"],
        near_owners: Int[Tensor, " neighbour"],
    ) -> None:
        """Add some facts.

        Args:
            keys: of prompts that ask for the facts; each ordered pair of two different ones of a fact counts.
            owners: which fact each asks for.
            near: of the facts' neighbours; each counts with every prompt of its fact.
            near_owners: whose neighbours they are.
        """
        everyone, numbers = torch.cat([owners, near_owners]).unique(return_inverse=True)
        owners, near_owners = numbers.split([len(owners), len(near_owners)])
        count = len(everyone)
        whole, around = (
            torch.zeros(count, rows.shape[1], device=rows.device).index_add_(0, whose, rows)
            for rows, whose in ((keys, owners), (near, near_owners))
        )
        moment = self._products(keys, keys)
        sizes, neighbours = torch.bincount(owners, minlength=count), torch.bincount(near_owners, minlength=count)
        self.all += moment
        self.same += self._products(whole, whole) - moment
        self.near += self._products(whole, around)
        self.counts += torch.stack([sizes.sum(), (sizes * (sizes - 1)).sum(), (sizes * neighbours).sum()])

    def _products(self, one: Float[Tensor, "row d"], other: Float[Tensor, "row d"]) -> Float[Tensor, "n n"]:
        """Σ a bᵀ over the rows of both; with a basis, of their coordinates."""
        if self.basis is None:
            return one.T @ other
        a, b = one @ self.basis, other @ self.basis
        apart = ((one - a @ self.basis.T) * (other - b @ self.basis.T)).sum() / self.outside
        found: Tensor = torch.block_diag(a.T @ b, apart)
        return found

    def operator(self, weight: float, ridge: float) -> Symmetric:
        """C⁻¹ (B − weight · N) C⁻¹, times what makes the mean of k·(operator k) over all keys 1.

        It takes a key to the ũ above, and that back to coordinates in which the product with another key is meant.

        What was seen of too few facts is noise, and does more harm than good. Then little of the keys is found to be
        shared: where the mean of u·ũ, in the directions that are told apart, is less than :data:`LEAST` of their
        number, the neighbours are left out, and if that does not suffice, everything (the identity: keys are whitened
        already).

        Args:
            weight: of the neighbours.
            ridge: the floor of C's eigenvalues, as a share of their mean.
        """
        counts = self.counts.clamp(min=1).tolist()
        means = [part.cpu().double() / n for part, n in zip((self.all, self.same, self.near), counts, strict=True)]
        if self.whitener is not None:
            own = self.whitener.matrix.cpu().double()
            means = [own @ mean @ own for mean in means]
        moment, same, near = ((mean + mean.T) / 2 for mean in means)
        values, vectors = torch.linalg.eigh(moment)
        floor = ridge * values.mean()
        if floor <= 0:  # a matrix whose input is always zero
            return Symmetric(torch.eye(len(values), device=self.all.device), self.basis)
        inverse = (vectors / (values.clamp(min=0) + floor)) @ vectors.T
        for wanted in (same - weight * near, same):
            operator = inverse @ wanted @ inverse
            answer = float((operator * moment)[: self.within, : self.within].sum())
            if answer >= LEAST * self.within:
                break
        else:
            operator, answer = torch.eye(len(values)), float(moment[: self.within, : self.within].trace())
        if self.basis is not None:
            answer += self.outside * float(operator[-1, -1] * moment[-1, -1])
        return Symmetric((operator / answer).float().to(self.all.device), self.basis)
