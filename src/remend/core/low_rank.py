"""``LowRank``: a change of a layer's output as factor pairs, from the gradient to the saved file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from remend.core.response import LINEAR, Response
from remend.errors import EditError

KEY_RIDGE = 0.01
"""λ of the system that the values of several factor pairs solve together: two spellings of a subject have one key."""

SAME_KEY = 0.9
"""The share of its own answer that each of two factor pairs gives at the other's key, from which on both are of one
subject."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_STORAGE_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
"""Dtypes in which numbers are stored only: there is no arithmetic of them."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change of a layer's output by Σ_j delta_j f(u_j·x), kept as its factor pairs (u_j, delta_j).

    With the linear response, f(q) = q, that is a change ΔW = deltaᵀ u of the layer's weight W [d_out, d_in]. With the
    response of a hidden unit each factor pair is a unit more in an MLP: it reads the input of the MLP's widening
    projection (``reads``) and adds to the output of the narrowing one. Other responses are no change of any weight.

    A leading ``episode`` axis holds independent changes, one for each episode: :meth:`output_change` applies each to
    the rows of its episode only. Rows of zeros add nothing, so changes of different rank are padded with them.

    Attributes:
        u: the directions of the input that the change reads, [rank, d_in] or [episode, rank, d_in].
        delta: what it adds to the layer's output for each, [rank, d_out] or [episode, rank, d_out].
        response: f.
        experts: for a weight that holds several experts' matrices (:mod:`remend.core.moe`), the expert of each factor
            pair; a pair acts on the rows of its expert only.
        reads: the name of the layer whose input is x, called before the changed one; empty where it is the changed
            layer itself.
        keys: the inputs at which the factor pairs were made to add what they add, one for each; None where nothing is
            known of them. They let changes be added up so that each still adds the same there (:func:`add_up`).
        owners: the requests that each factor pair is of, by number; None where nothing is known of them.
    """

    u: Float[Tensor, "*episode rank d_in"]
    delta: Float[Tensor, "*episode rank d_out"]
    response: Response = LINEAR
    experts: Int[Tensor, "*episode rank"] | None = None
    reads: str = ""
    keys: Float[Tensor, "*episode rank d_in"] | None = None
    owners: tuple[tuple[int, ...], ...] | None = None

    @property
    def rank(self) -> int:
        """The number of factor pairs (an upper bound of the matrix's rank)."""
        return self.u.shape[-2]

    @property
    def batched(self) -> bool:
        """Whether there is an episode axis."""
        return self.u.dim() == 3

    @property
    def describe(self) -> str:
        """What the change is made of, for tables and messages: ``rank 3``, ``2 units (gated silu, beta 10)``."""
        if not self.reads:
            return f"rank {self.rank}" + ("" if self.response.linear else f" ({self.response})")
        return f"{self.rank} unit{'s' * (self.rank != 1)} ({self.response})"

    def dense(self, experts: int = 0) -> Float[Tensor, "*episode_expert d_out d_in"]:
        """Compute ΔW. As large as the weight: for merging and for tests.

        Args:
            experts: for a weight of several experts, their number: the result has an axis for them before d_out.

        Raises:
            EditError: the change is no change of a weight.
        """
        self.raise_unless_of_weight("written into a weight")
        if self.experts is None:
            return self.delta.mT @ self.u
        one_hot = self.experts[..., None] == torch.arange(experts, device=self.u.device)
        return torch.einsum("...re,...ro,...ri->...eoi", one_hot.to(self.u.dtype), self.delta, self.u)

    def output_change(
        self, x: Float[Tensor, "*rows d_in"], experts: Int[Tensor, " row"] | None = None
    ) -> Float[Tensor, "*rows d_out"]:
        """Compute what the change adds to the output for every row of ``x``, as two thin products.

        Args:
            x: the input. With an episode axis, its rows must be ordered by episode, the same number for each: the
                leading axes are split evenly among the episodes.
            experts: for a layer of experts, the index of each row's expert.
        """
        return self.from_responses(self.responses(x, experts)).reshape(*x.shape[:-1], self.delta.shape[-1])

    def responses(
        self, x: Float[Tensor, "*rows d_in"], experts: Int[Tensor, " row"] | None = None
    ) -> Float[Tensor, "*rows_of_episode rank"]:
        """Compute f(u_j·x) for every row of ``x``: the first half of :meth:`output_change`, with the same arguments.

        With an episode axis the result is [episode, row, rank].
        """
        if not self.batched:
            return self._of_own_expert(self.response(x @ self.u.mT), experts)
        # Some models flatten rows and tokens into one axis before a layer, so only the order of the rows counts.
        rows = x.reshape(self.u.shape[0], -1, x.shape[-1])
        return self._of_own_expert(self.response(torch.bmm(rows, self.u.mT)), experts)

    def from_responses(
        self, responses: Float[Tensor, "*rows_of_episode rank"]
    ) -> Float[Tensor, "*rows_of_episode d_out"]:
        """Compute what the change adds from :meth:`responses`."""
        return torch.bmm(responses, self.delta) if self.batched else responses @ self.delta

    def _of_own_expert(
        self, responses: Float[Tensor, "*rows rank"], experts: Int[Tensor, " row"] | None
    ) -> Float[Tensor, "*rows rank"]:
        """Set the responses of each row to the factor pairs of other experts to zero."""
        if self.experts is None or experts is None:
            return responses
        row_experts = experts.to(responses.device).view(responses.shape[:-1])
        return responses * (row_experts[..., None] == self.experts[..., None, :])

    @property
    def is_of_weight(self) -> bool:
        """Whether it is a change of the layer's own weight: linear in the layer's own input."""
        return self.response.linear and not self.reads

    def raise_unless_of_weight(self, what: str) -> None:
        """Raise :class:`EditError` unless the change is one of a weight, so that it can be ``what``."""
        if self.is_of_weight:
            return
        kind = f"an edit of hidden units ({self.response})" if self.reads else f"a gated edit ({self.response})"
        advice = (
            "merge it (--to merged): the MLP gets wider. fit of kind low-rank makes one that can be"
            if self.reads
            else "make the edit with a gate of 0"
        )
        raise EditError(
            f"{kind} is no change of a weight of low rank: it cannot be {what}. Apply it as a side branch, or {advice}"
        )

    def select(self, episodes: Int[Tensor, " row"] | slice) -> LowRank:
        """Return the changes of some episodes."""
        experts = None if self.experts is None else self.experts[episodes]
        keys = None if self.keys is None else self.keys[episodes]
        return replace(self, u=self.u[episodes], delta=self.delta[episodes], experts=experts, keys=keys)

    def single_episode(self, episode: int, rank: int) -> LowRank:
        """Return the change of one episode without the episode axis, with its first ``rank`` factor pairs.

        The pairs after those are padding.
        """
        selected = self.select(torch.tensor([episode]))
        experts = None if selected.experts is None else selected.experts[0, :rank]
        keys = None if selected.keys is None else selected.keys[0, :rank]
        return replace(selected, u=selected.u[0, :rank], delta=selected.delta[0, :rank], experts=experts, keys=keys)

    def scaled(self, factor: float | Float[Tensor, "episode ranks 1"]) -> LowRank:
        """Return the change with its output times ``factor``.

        With an episode axis, ``factor`` may be a tensor: one for each episode, or for each of its factor pairs.
        """
        scale = factor if isinstance(factor, (int, float)) else factor.to(self.delta)
        return replace(self, delta=self.delta * scale)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LowRank:
        """Return the same change on another device, or in another dtype."""
        u, delta = (factor.to(device=device, dtype=dtype) for factor in (self.u, self.delta))
        experts = None if self.experts is None else self.experts.to(device)
        keys = None if self.keys is None else self.keys.to(device=device, dtype=dtype)
        return replace(self, u=u, delta=delta, experts=experts, keys=keys)

    def detach(self) -> LowRank:
        """Return the same change without its autograd history."""
        keys = None if self.keys is None else self.keys.detach()
        return replace(self, u=self.u.detach(), delta=self.delta.detach(), keys=keys)

    def without_padding(self) -> LowRank:
        """Return the same change without the last factor pairs that are all zeros; one pair is kept."""
        used = (self.u != 0).any(-1) | (self.delta != 0).any(-1)
        rank = int(used.nonzero().max()) + 1 if bool(used.any()) else 1
        keys = None if self.keys is None else self.keys[:rank]
        owners = None if self.owners is None else self.owners[:rank]
        return replace(self, u=self.u[:rank], delta=self.delta[:rank], keys=keys, owners=owners)

    def norm(self) -> Float[Tensor, "*episode"]:
        """Compute ‖ΔW‖ (Frobenius) from the factors' Gram matrices: ‖deltaᵀu‖² = Σ (u uᵀ) ∘ (delta deltaᵀ).

        Of units, the root of the sum of their (‖delta‖ ‖u‖)²: each is one by itself, so that none cancels another.

        In float32 at least: the squares of float16's numbers overflow. A change of more factor pairs than its matrix
        has rows and columns is computed densely, so that the memory is never more than that of the factors.
        """
        dtype = torch.promote_types(self.u.dtype, torch.float32)
        if self.u.dtype != dtype:
            return self.to(self.u.device, dtype).norm()
        if self.reads:
            squares: Tensor = self.u.square().sum(-1) * self.delta.square().sum(-1)
            return squares.sum(-1).sqrt()
        if self.rank > self.u.shape[-1] + self.delta.shape[-1] and not self.batched:
            masks = [...] if self.experts is None else [self.experts == expert for expert in self.experts.unique()]
            parts = [torch.linalg.vector_norm(self.delta[mask].mT @ self.u[mask]) for mask in masks]
            return torch.stack(parts).square().sum().sqrt()
        gram = (self.u @ self.u.mT) * (self.delta @ self.delta.mT)
        if self.experts is not None:
            gram = gram * (self.experts[..., :, None] == self.experts[..., None, :])
        # Rounding can make the sum of a change that cancels itself slightly negative.
        return gram.sum((-2, -1)).clamp(min=0).sqrt()

    def recompress(self, rank: int) -> LowRank:
        """Return the nearest change of at most ``rank`` pairs: a truncated singular value decomposition of ΔW.

        ΔW is not formed: two QR factorizations leave a rank × rank core with the singular values of ΔW. The changes of
        several experts are compressed separately, each to ``rank`` pairs.

        Raises:
            EditError: the change is no change of a weight.
        """
        self.raise_unless_of_weight("compressed")
        if self.experts is not None:
            masks = [(expert, self.experts == expert) for expert in self.experts.unique().tolist()]
            parts = [LowRank(self.u[mask], self.delta[mask]).recompress(rank) for _, mask in masks]
            experts = [self.experts.new_full((part.rank,), e) for part, (e, _) in zip(parts, masks, strict=True)]
            return replace(concatenate(parts), experts=torch.cat(experts)) if parts else self
        # In float32: there is no QR or SVD of half precision.
        q_u, r_u = torch.linalg.qr(self.u.mT.float())
        q_d, r_d = torch.linalg.qr(self.delta.mT.float())
        left, values, right = torch.linalg.svd(r_d @ r_u.mT, full_matrices=False)
        pairs = min(rank, values.shape[-1])
        # Each factor gets the root of the singular values, so that both have entries of similar size.
        root = values[..., :pairs, None].sqrt()
        u = root * (right[..., :pairs, :] @ q_u.mT)
        delta = root * (left[..., :, :pairs].mT @ q_d.mT)
        return LowRank(u.to(self.u.dtype), delta.to(self.delta.dtype))


def in_one_dtype(u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of a change in one dtype that can be computed with, without autograd history.

    Raises:
        EditError: a factor is stored as something else than floating point numbers.
    """
    for factor in (u, delta):
        if factor.dtype not in (*_DTYPES, *_STORAGE_DTYPES):
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise EditError(f"are stored as {str(factor.dtype).removeprefix('torch.')}; allowed are {names}")
    u, delta = (f.detach().float() if f.dtype in _STORAGE_DTYPES else f.detach() for f in (u, delta))
    dtype = torch.promote_types(u.dtype, delta.dtype)
    return u.to(dtype), delta.to(dtype)


def concatenate(changes: Sequence[LowRank]) -> LowRank:
    """Return the sum of several changes of one weight: their factor pairs, concatenated along the rank axis."""
    response, reads = _in_common(changes)
    indices = [change.experts for change in changes if change.experts is not None]
    experts = torch.cat(indices, -1) if indices else None
    u, delta = torch.cat([c.u for c in changes], -2), torch.cat([c.delta for c in changes], -2)
    known = [change.keys for change in changes if change.keys is not None]
    keys = torch.cat(known, -2) if len(known) == len(changes) else None
    of_each = [change.owners for change in changes if change.owners is not None]
    owners = tuple(of_pair for owned in of_each for of_pair in owned) if len(of_each) == len(changes) else None
    return LowRank(u, delta, response, experts, reads, keys, owners)


def add_up(changes: Sequence[LowRank]) -> LowRank:
    """Return the sum of several changes, each of which still adds at its keys what it adds there by itself.

    Factor pairs of one change answer at the keys of another one, too, as far as its keys are like their own. So what
    all add is solved for together: delta = (S + λ)⁻¹ (1 + λ) v, with S_ij what pair j answers at key i, and v what is
    to be added there. Keys of two changes that answer each other as they do themselves are of one subject, at which
    both are meant to act: what they add there is added up. Where a change knows no keys, the sum is
    :func:`concatenate`.
    """
    total = concatenate(changes)
    if total.keys is None or total.rank == 0:
        return total
    values = torch.cat([_added_at_keys(change) for change in changes], -2)
    answers = total.response(total.keys.double() @ total.u.double().mT)
    of_change = torch.arange(len(changes)).repeat_interleave(torch.tensor([c.rank for c in changes])).to(answers.device)
    others = of_change[:, None] != of_change
    same = others & (answers > SAME_KEY) & (answers.mT > SAME_KEY)
    values = values + same.to(values) @ values
    return replace(total, delta=solve_at_keys(answers, values).to(total.delta))


def without_pairs(change: LowRank, left_out: Sequence[int]) -> LowRank:
    """Return a change without some of its factor pairs; the others still add at their keys what they did there."""
    assert change.keys is not None
    kept = [pair for pair in range(change.rank) if pair not in set(left_out)]
    values, u, keys = _added_at_keys(change)[kept], change.u[kept], change.keys[kept]
    delta = solve_at_keys(change.response(keys.double() @ u.double().mT), values).to(change.delta)
    owners = None if change.owners is None else tuple(change.owners[pair] for pair in kept)
    return replace(change, u=u, delta=delta, keys=keys, owners=owners)


def solve_at_keys(
    answers: Float[Tensor, "key pair"], values: Float[Tensor, "key d_out"]
) -> Float[Tensor, "pair d_out"]:
    """Return the delta of each factor pair with which all of them together add these values at their keys.

    Args:
        answers: what each pair answers at each key, f(u·k).
        values: what is to be added at each key.
    """
    delta: Tensor = torch.linalg.solve(_with_ridge(answers), (1 + KEY_RIDGE) * values.to(answers))
    return delta


def _added_at_keys(change: LowRank) -> Float[Tensor, "key d_out"]:
    """Return the values of which :func:`solve_at_keys` made a change."""
    assert change.keys is not None
    answers = change.response(change.keys.double() @ change.u.double().mT)
    values: Tensor = _with_ridge(answers) @ change.delta.double() / (1 + KEY_RIDGE)
    return values


def _with_ridge(answers: Float[Tensor, "key pair"]) -> Float[Tensor, "key pair"]:
    return answers + KEY_RIDGE * torch.eye(len(answers), dtype=answers.dtype, device=answers.device)


def stack(changes: Sequence[LowRank]) -> LowRank:
    """Return independent changes of one weight as one batched change, padded with zeros to the highest rank."""
    response, reads = _in_common(changes)
    # Padding pairs count as expert 0's, which changes nothing since their factors are zero.
    rank = max(change.rank for change in changes)

    def padded(factor: Tensor) -> Tensor:
        return torch.nn.functional.pad(factor, (0, 0, 0, rank - factor.shape[-2]))

    indices = [torch.nn.functional.pad(c.experts, (0, rank - c.rank)) for c in changes if c.experts is not None]
    experts = torch.stack(indices) if indices else None
    u, delta = torch.stack([padded(c.u) for c in changes]), torch.stack([padded(c.delta) for c in changes])
    return LowRank(u, delta, response, experts, reads)


def _in_common(changes: Sequence[LowRank]) -> tuple[Response, str]:
    """Return what all these changes have in common beside their factors: response and read layer.

    Raises:
        EditError: they have different ones.
    """
    kinds = list(dict.fromkeys((change.response, change.reads) for change in changes))
    if len(kinds) > 1:
        names = ", ".join(f"{response}{f' of {reads}' if reads else ''}" for response, reads in kinds)
        raise EditError(
            f"changes with different responses ({names}) cannot be combined: make them with one editor and kind, or "
            "apply the edits one after the other (in Python)"
        )
    return kinds[0]


def layer_names(changes: Mapping[str, LowRank]) -> list[str]:
    """Return the names of all layers that changes take part in: those that they change, then those that they read."""
    return list(dict.fromkeys([*changes, *(change.reads for change in changes.values() if change.reads)]))
