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

from remend.core.operators import SymmetricOperator

HELD_OUT_EVERY = 4
"""Of so many facts one is held out, to see whether what was found of the others is true of it."""

MIN_HELD_OUT_RESPONSE = 0.5
"""The least mean answer of held-out facts' keys to themselves, where those of the others answer with 1."""

MIN_SHARED_RESPONSE = 0.1
"""The least mean answer of a key to itself, as a share of the number of dimensions, that contrast is trusted with."""


class Discriminant:
    """Second moments of one matrix's keys: of all, of prompts with paraphrases, of prompts with neighbours.

    Args:
        d: the keys' dimensions.
        device: where sums are kept.
        whitener: what whitens keys, if anything. With a basis, moments are taken in its coordinates; what lies outside
            is taken to be alike in all directions there, and its mean over them is the moment's last entry.

    Attributes:
        moments: Σ k kᵀ, Σ k⁺ uᵀ and Σ k⁻ uᵀ, of all facts and of those that are held out: [2, 3, n, n].
        counts: how many products each is of, [2, 3].
        facts: how many were seen here.
    """

    def __init__(self, d: int, device: torch.device, whitener: SymmetricOperator | None = None) -> None:
        self.whitener = whitener
        self.basis = None if whitener is None else whitener.basis
        self.within = d if self.basis is None else self.basis.shape[1]
        self.outside = d - self.within
        size = d if self.basis is None else self.within + 1
        self.moments = torch.zeros(2, 3, size, size, device=device)
        self.counts = torch.zeros(2, 3, dtype=torch.int64, device=device)
        self.facts = 0

    @property
    def totals(self) -> tuple[Tensor, ...]:
        """All state, as sums: what processes that saw different prompts add up."""
        return self.moments, self.counts

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
        held = (torch.arange(self.facts, self.facts + len(everyone), device=keys.device) + 1) % HELD_OUT_EVERY == 0
        self.facts += len(everyone)
        owners, near_owners = numbers.split([len(owners), len(near_owners)])
        self._add(0, keys, owners, near, near_owners)
        own, around = held[owners], held[near_owners]
        self._add(1, keys[own], owners[own], near[around], near_owners[around])

    def _add(
        self,
        part: int,
        keys: Float[Tensor, "prompt d"],
        owners: Int[Tensor, " prompt"],
        near: Float[Tensor, "neighbour d"],
        near_owners: Int[Tensor, " neighbour"],
    ) -> None:
        """Add facts to the sums over all of them (``part`` 0), or over those that are held out (1)."""
        count = 1 + max((int(whose.max()) for whose in (owners, near_owners) if len(whose)), default=-1)
        whole, around = (
            torch.zeros(count, rows.shape[1], device=rows.device).index_add_(0, whose, rows)
            for rows, whose in ((keys, owners), (near, near_owners))
        )
        moment = self._products(keys, keys)
        sizes, neighbours = torch.bincount(owners, minlength=count), torch.bincount(near_owners, minlength=count)
        self.moments[part] += torch.stack(
            [moment, self._products(whole, whole) - moment, self._products(whole, around)]
        )
        self.counts[part] += torch.stack([sizes.sum(), (sizes * (sizes - 1)).sum(), (sizes * neighbours).sum()])

    def _products(self, one: Float[Tensor, "row d"], other: Float[Tensor, "row d"]) -> Float[Tensor, "n n"]:
        """Σ a bᵀ over the rows of both; with a basis, of their coordinates."""
        if self.basis is None:
            return one.T @ other
        a, b = one @ self.basis, other @ self.basis
        apart = ((one - a @ self.basis.T) * (other - b @ self.basis.T)).sum() / self.outside
        found: Tensor = torch.block_diag(a.T @ b, apart)
        return found

    def operator(self, weight: float, ridge: float) -> SymmetricOperator:
        """C⁻¹ (B − weight · N) C⁻¹, times what makes the mean of k·(operator k) over all keys 1.

        It takes a key to the ũ above, and that back to coordinates in which the product with another key is meant.

        Moments of too few facts, or of prompts that lie in few directions, are noise and do more harm than good. Two
        checks guard against that: the operator that the facts without the held-out ones give must hold for those
        (:data:`MIN_HELD_OUT_RESPONSE`), and the keys must share enough (:data:`MIN_SHARED_RESPONSE`). If a check fails,
        the neighbours are left out, and if that does not suffice, everything (the identity: keys are whitened already).

        Args:
            weight: of the neighbours.
            ridge: the floor of C's eigenvalues, as a share of their mean.
        """
        every, held = (self._means(*part) for part in zip(self.moments, self.counts, strict=True))
        others = self._means(self.moments[0] - self.moments[1], self.counts[0] - self.counts[1])
        operator = torch.eye(len(every[0]), dtype=torch.float64)
        for considered in (weight, 0.0) if self.counts[1, 0] else ():
            tried = _operator(others, considered, ridge)
            if not self._answer(tried, held[0]) >= MIN_HELD_OUT_RESPONSE * self._answer(tried, others[0]) > 0:
                continue
            found = _operator(every, considered, ridge)
            if self._answer(found, every[0]) >= MIN_SHARED_RESPONSE * self.within:
                operator = found
                break
        answer = self._answer(operator, every[0])
        if answer <= 0:  # a matrix whose input is always zero
            return SymmetricOperator(torch.eye(len(operator), device=self.moments.device), self.basis)
        if self.basis is not None:
            answer += self.outside * float(operator[-1, -1] * every[0][-1, -1])
        return SymmetricOperator((operator / answer).float().to(self.moments.device), self.basis)

    def _means(self, moments: Float[Tensor, "3 n n"], counts: Int[Tensor, " 3"]) -> Float[Tensor, "3 n n"]:
        """E[k kᵀ], E[k⁺ uᵀ] and E[k⁻ uᵀ], of whitened keys; symmetric."""
        means = moments.cpu().double() / counts.cpu().clamp(min=1)[:, None, None]
        if self.whitener is not None:
            own = self.whitener.matrix.cpu().double()
            means = torch.stack([own @ mean @ own for mean in means])
        return (means + means.mT) / 2

    def _answer(self, operator: Float[Tensor, "n n"], moment: Float[Tensor, "n n"]) -> float:
        """The mean of k·(operator k), in the directions that are told apart."""
        return float((operator * moment)[: self.within, : self.within].sum())


def _operator(means: Float[Tensor, "3 n n"], weight: float, ridge: float) -> Float[Tensor, "n n"]:
    """C⁻¹ (B − weight · N) C⁻¹; zero where all keys were."""
    moment, same, near = means
    values, vectors = torch.linalg.eigh(moment)
    floor = ridge * values.mean()
    if floor <= 0:
        return torch.zeros_like(moment)
    inverse = (vectors / (values.clamp(min=0) + floor)) @ vectors.T
    found: Tensor = inverse @ (same - weight * near) @ inverse
    return found
