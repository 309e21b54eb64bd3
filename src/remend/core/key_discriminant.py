"""The linear discriminant of keys: the direction that a prompt shares with its paraphrases and not with its neighbours.

A key is the input of an edited matrix at the token before a prompt's answer. An edit ΔW = δ̃ ũᵀ acts on another
prompt's key k with the strength ũ·k. So for a prompt with key u, ũ·k should be large for the keys k⁺ of its paraphrases
and small for the keys k⁻ of its neighbours. With keys whitened to C = E[k kᵀ] = I, the direction of unit length with
the largest E[ũ·k⁺ | u] − E[ũ·k⁻ | u] is E[k⁺ | u] − E[k⁻ | u]. The best linear estimates of these means are B u and
N u, with B = E[k⁺ uᵀ] over paraphrases and N = E[k⁻ uᵀ] over neighbours. So ũ = (B − N) u, which needs no training and
is as low-rank as u. It is Fisher's discriminant for classes of which one example is known.

An edit acts on every token of ordinary text, too, with the strength ũ·x. Keys are alike in many ways, so ũ may be large
in directions that they hardly use and other inputs do. With C = E[k kᵀ] + c E[x xᵀ] in its place, ũ is small there.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from remend.core.symmetric_operator import SymmetricOperator

HELD_OUT_EVERY = 4
"""One fact in so many is held out, to check whether the operator estimated from the rest holds for it."""

MIN_HELD_OUT_RESPONSE = 0.5
"""The least mean response of held-out facts' keys to themselves, as a share of that of the facts used."""

MIN_SHARED_RESPONSE = 0.1
"""The least mean response of a key to itself, as a share of the number of dimensions, with which B − N is used."""


class Discriminant:
    """Second moments of one matrix's keys: of all keys, of pairs of paraphrases, of pairs of a prompt and a neighbour.

    Args:
        d: the keys' dimensions.
        device: the device of the sums.
        whitener: the operator that whitens keys, if any. With a basis, moments are taken in its coordinates. Outside of
            the basis all directions are assumed to be alike; the moment's last entry is their mean.

    Attributes:
        moments: Σ k kᵀ, Σ k⁺ uᵀ and Σ k⁻ uᵀ, over all facts and over those that are held out: [2, 3, n, n].
        counts: the number of products in each, [2, 3].
        ordinary: Σ x xᵀ of ordinary inputs, [n, n].
        fact_count: the number of facts seen in this process.
    """

    def __init__(self, d: int, device: torch.device, whitener: SymmetricOperator | None = None) -> None:
        self.whitener = whitener
        self.basis = None if whitener is None else whitener.basis
        self.within = d if self.basis is None else self.basis.shape[1]
        self.outside = d - self.within
        size = d if self.basis is None else self.within + 1
        self.moments = torch.zeros(2, 3, size, size, device=device)
        self.counts = torch.zeros(2, 3, dtype=torch.int64, device=device)
        self.ordinary = torch.zeros(size, size, device=device)
        self.fact_count = 0

    @property
    def totals(self) -> tuple[Tensor, ...]:
        """All state, as sums that processes which saw different prompts can add up."""
        return self.moments, self.counts, self.ordinary

    def update(
        self,
        keys: Float[Tensor, "prompt d"],
        facts: Int[Tensor, " prompt"],
        near: Float[Tensor, "neighbour d"],
        near_facts: Int[Tensor, " neighbour"],
    ) -> None:
        """Add some facts.

        Args:
            keys: of prompts that ask for the facts; each ordered pair of two different prompts of a fact counts.
            facts: the fact that each prompt asks for.
            near: keys of the facts' neighbours; each counts with every prompt of its fact.
            near_facts: the fact that each is a neighbour of.
        """
        unique, indices = torch.cat([facts, near_facts]).unique(return_inverse=True)
        numbers = torch.arange(self.fact_count, self.fact_count + len(unique), device=keys.device)
        held_out = (numbers + 1) % HELD_OUT_EVERY == 0
        self.fact_count += len(unique)
        facts, near_facts = indices.split([len(facts), len(near_facts)])
        self._add(0, keys, facts, near, near_facts)
        rows, near_rows = held_out[facts], held_out[near_facts]
        self._add(1, keys[rows], facts[rows], near[near_rows], near_facts[near_rows])

    def update_ordinary(self, inputs: Float[Tensor, "token d"]) -> None:
        """Add the inputs at tokens of ordinary text."""
        self.ordinary += self._products(inputs, inputs)

    def _add(
        self,
        part: int,
        keys: Float[Tensor, "prompt d"],
        facts: Int[Tensor, " prompt"],
        near: Float[Tensor, "neighbour d"],
        near_facts: Int[Tensor, " neighbour"],
    ) -> None:
        """Add facts to the sums over all of them (``part`` 0), or over those that are held out (1)."""
        count = 1 + max((int(index.max()) for index in (facts, near_facts) if len(index)), default=-1)
        key_sums, near_sums = (
            torch.zeros(count, rows.shape[1], device=rows.device).index_add_(0, index, rows)
            for rows, index in ((keys, facts), (near, near_facts))
        )
        # The products of a fact's sums are the sums of all its pairs' products. Among them are the pairs of a prompt
        # with itself, which are subtracted again.
        moment = self._products(keys, keys)
        sizes, neighbours = torch.bincount(facts, minlength=count), torch.bincount(near_facts, minlength=count)
        self.moments[part] += torch.stack(
            [moment, self._products(key_sums, key_sums) - moment, self._products(key_sums, near_sums)]
        )
        self.counts[part] += torch.stack([sizes.sum(), (sizes * (sizes - 1)).sum(), (sizes * neighbours).sum()])

    def _products(self, left: Float[Tensor, "row d"], right: Float[Tensor, "row d"]) -> Float[Tensor, "n n"]:
        """Compute Σ a bᵀ over the rows a of ``left`` and b of ``right``; with a basis, over their coordinates."""
        if self.basis is None:
            return left.T @ right
        a, b = left @ self.basis, right @ self.basis
        outside = ((left - a @ self.basis.T) * (right - b @ self.basis.T)).sum() / self.outside
        products: Tensor = torch.block_diag(a.T @ b, outside)
        return products

    def operator(self, weight: float, ridge: float, ordinary: float = 0.0) -> SymmetricOperator:
        """Compute C⁻¹ (B − weight · N) C⁻¹, scaled so that the mean of k·(operator k) over all keys is 1.

        For keys whose C is not I, k·(operator u) is what ũ·k is for whitened ones.

        Moments of too few facts, or of prompts that lie in few directions, are noise and do more harm than good. Two
        checks guard against that: the operator that the facts without the held-out ones give must hold for those
        (:data:`MIN_HELD_OUT_RESPONSE`), and the keys must share enough (:data:`MIN_SHARED_RESPONSE`). If a check fails,
        the neighbours are left out, and if it still fails, the identity is used: keys are whitened already.

        Args:
            weight: of the neighbours.
            ridge: the floor of C's eigenvalues, as a share of their mean.
            ordinary: how much ordinary inputs add to C, as a share of what the keys do.
        """
        means, held_out_means = (self._means(*part) for part in zip(self.moments, self.counts, strict=True))
        used_means = self._means(self.moments[0] - self.moments[1], self.counts[0] - self.counts[1])
        operator = torch.eye(len(means[0]), dtype=torch.float64)
        # Without a held-out fact nothing can be checked, so the identity stays.
        for neighbour_weight in (weight, 0.0) if self.counts[1, 0] else ():
            # Estimated without the held-out facts, on which it is then measured.
            trial = _discriminant(used_means, neighbour_weight, ridge)
            used = self._response(trial, used_means[0])
            if not self._response(trial, held_out_means[0]) >= MIN_HELD_OUT_RESPONSE * used > 0:
                continue
            candidate = _discriminant(means, neighbour_weight, ridge)
            if self._response(candidate, means[0]) >= MIN_SHARED_RESPONSE * self.within:
                operator = _discriminant(self._with_ordinary(means, ordinary), neighbour_weight, ridge)
                break
        response = self._response(operator, means[0])
        if response <= 0:  # a matrix whose input is always zero
            return SymmetricOperator(torch.eye(len(operator), device=self.moments.device), self.basis)
        # The mean over all keys is a trace; each direction outside of the basis adds the last entry.
        if self.basis is not None:
            response += self.outside * float(operator[-1, -1] * means[0][-1, -1])
        return SymmetricOperator((operator / response).float().to(self.moments.device), self.basis)

    def _means(self, moments: Float[Tensor, "3 n n"], counts: Int[Tensor, " 3"]) -> Float[Tensor, "3 n n"]:
        """Compute E[k kᵀ], E[k⁺ uᵀ] and E[k⁻ uᵀ] of whitened keys, as symmetric matrices."""
        means = self._whitened(moments.cpu().double() / counts.cpu().clamp(min=1)[:, None, None])
        # N is not symmetric, since a neighbour is not a prompt, and a SymmetricOperator has to be.
        return (means + means.mT) / 2

    def _with_ordinary(self, means: Float[Tensor, "3 n n"], share: float) -> Float[Tensor, "3 n n"]:
        """Add ordinary inputs to E[k kᵀ]: so much that their squared size is ``share`` of that of the keys."""
        inputs = self._whitened(self.ordinary.cpu().double()[None])[0]
        size, keys_size = (float(moment.diagonal()[: self.within].sum()) for moment in (inputs, means[0]))
        if not share or size <= 0:
            return means
        return torch.stack([means[0] + share * keys_size / size * inputs, *means[1:]])

    def _whitened(self, moments: Float[Tensor, "moment n n"]) -> Float[Tensor, "moment n n"]:
        if self.whitener is None:
            return moments
        whitening = self.whitener.matrix.cpu().double()
        return whitening @ moments @ whitening

    def _response(self, operator: Float[Tensor, "n n"], moment: Float[Tensor, "n n"]) -> float:
        """Compute the mean of k·(operator k) in the directions of the basis."""
        return float((operator * moment)[: self.within, : self.within].sum())


def _discriminant(means: Float[Tensor, "3 n n"], weight: float, ridge: float) -> Float[Tensor, "n n"]:
    """Compute C⁻¹ (B − weight · N) C⁻¹; zero if all keys were zero."""
    moment, paraphrases, neighbours = means
    values, vectors = torch.linalg.eigh(moment)
    floor = ridge * values.mean()
    if floor <= 0:
        return torch.zeros_like(moment)
    inverse = (vectors / (values.clamp(min=0) + floor)) @ vectors.T
    operator: Tensor = inverse @ (paraphrases - weight * neighbours) @ inverse
    return operator
