"""What does not change while an editor trains, since the base model is frozen: computed once for each example."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.capture import GradientFactors
from remend.core.hooks import frozen
from remend.editors import Mend, Trainable
from remend.editors.packing import PackedFactors
from remend.models.frozen_prefix import FrozenPrefix
from remend.tasks.base import Batch, Example, Task
from remend.training.tensor_store import Entry, TensorStore


class ActivationCache:
    """The frozen prefix's output, the base model's last hidden states, and the edit pairs' gradient factors.

    Each is looked up example by example; what is missing is computed, ``micro_batch`` examples at a time, and put into
    a store. Rounding depends on which examples are computed together, so the same sequence of calls gives the same
    bits, however much of the sequence an interrupted run had done already.

    Args:
        task: the base model.
        editor: the editor in training.
        prefix: where the base model is cut.
        states: the store of hidden states: small, and they save the most.
        factors: the store of gradient factors: each takes what some tens of hidden states take.
        together: how many passes to make where this process needs some: more, if others need more and cannot do
            without it.
    """

    def __init__(
        self,
        task: Task,
        editor: Trainable,
        prefix: FrozenPrefix,
        states: TensorStore,
        factors: TensorStore,
        together: Callable[[int], int] = int,
    ) -> None:
        self.together = together
        self.task, self.editor, self.prefix, self.states, self.factors = task, editor, prefix, states, factors
        self.micro_batch = 32

    def beside(self, states: TensorStore, factors: TensorStore) -> ActivationCache:
        """The same with other stores."""
        return ActivationCache(self.task, self.editor, self.prefix, states, factors, self.together)

    def prefix_states(self, pairs: Sequence[Example]) -> Float[Tensor, "row token *d"] | None:
        """What enters the lowest edited block for each pair, right-padded with zeros; ``None`` if nothing is below."""
        if self.prefix.depth == 0:
            return None

        def compute(batch: Batch, places: Sequence[int]) -> list[Entry]:
            with torch.no_grad():
                states = self.prefix.compute_states(lambda: self.task.outputs(batch))
            return [(own[: self._entering(pairs[i])],) for own, i in zip(states, places, strict=True)]

        found = self._look_up(self.states, [self._prefix_key(pair) for pair in pairs], pairs, compute)
        padded = found[0][0].new_zeros(len(found), max(len(own) for (own,) in found), *found[0][0].shape[1:])
        for row, (own,) in zip(padded, found, strict=True):
            row[: len(own)] = own
        return padded

    def base_states(
        self, pairs: Sequence[Example], prefix: Float[Tensor, "row token *d"] | None
    ) -> Float[Tensor, "target state"]:
        """What the output layer of the unedited model sees at each pair's targets, one pair after the other."""

        def compute(batch: Batch, places: Sequence[int]) -> list[Entry]:
            lengths = [self._entering(pairs[i]) for i in places]
            longest = None if None in lengths else max(length for length in lengths if length is not None)
            own = None if prefix is None else prefix[list(places), :longest]
            with torch.no_grad(), self.prefix.resume_from(own):
                states = self.task.output_states(batch)
            return [(part,) for part in states.split([len(pairs[i].target) for i in places])]

        keys = [self._base_key(pair) for pair in pairs]
        return torch.cat([own for (own,) in self._look_up(self.states, keys, pairs, compute)])

    def base_logits(
        self, pairs: Sequence[Example], prefix: Float[Tensor, "row token *d"] | None
    ) -> Float[Tensor, "target vocabulary"]:
        """The unedited model's logits at each pair's targets; they are too large to be kept."""
        states = self.base_states(pairs, prefix)
        with frozen(self.task.model), torch.no_grad(), self.prefix.bypass_blocks():
            return self.task.outputs_from_states(states)

    def gradient_factors(self, pairs: Sequence[Example]) -> dict[str, GradientFactors]:
        """The whole gradient factors of each pair: every token's, not kept."""
        with self.prefix.resume_from(self.prefix_states(pairs)):
            assert isinstance(self.editor, Mend)  # of others, no gradient is asked for
            return self.editor.capture(self.task, self.task.collate(pairs))

    def rows(self, pairs: Sequence[Example]) -> dict[str, PackedFactors]:
        """What the editor networks read of each edit pair: its gradient factors, where tokens carry gradient."""
        names = list(self.editor.shapes)

        def compute(batch: Batch, places: Sequence[int]) -> list[Entry]:
            assert isinstance(self.editor, Mend)
            return _entries(self.editor.rows(self.gradient_factors([pairs[i] for i in places])))

        keys = [self._rows_key(pair) for pair in pairs]
        columns = list(zip(*self._look_up(self.factors, keys, pairs, compute), strict=True))
        found = {}
        for name, u, delta, experts in zip(names, columns[0::3], columns[1::3], columns[2::3], strict=True):
            whose = torch.cat(experts)
            own = whose if len(whose) else None
            found[name] = PackedFactors(torch.cat(u), torch.cat(delta), tuple(len(part) for part in u), own)
        return found

    def keep_rows(self, pairs: Sequence[Example], rows: Mapping[str, PackedFactors]) -> None:
        """Keep what the networks read of some edit pairs, so that :meth:`rows` finds it."""
        for pair, entry in zip(pairs, _entries(rows), strict=True):
            if self._rows_key(pair) not in self.factors:
                self.factors.put(self._rows_key(pair), entry)

    def settled(self, edits: Iterable[Example], locality: Iterable[Example], pairs: Iterable[Example]) -> bool:
        """Whether the stores will not change any more, with these as the training set's examples."""
        keys = [self._base_key(pair) for pair in locality]
        if self.prefix.depth:
            keys += [self._prefix_key(pair) for pair in pairs]
        return self.states.has_all(keys) and self.factors.has_all(map(self._rows_key, edits))

    def flush(self) -> None:
        """Write to disk what is to be kept there."""
        self.states.flush()

    def _prefix_key(self, example: Example) -> str:
        return _key("prefix", self.task.tokens_read(example), len(example.input))

    def _base_key(self, example: Example) -> str:
        return _key("base", self.task.tokens_read(example), len(example.input))

    def _rows_key(self, example: Example) -> str:
        return _key("rows", (*example.input, *example.target), len(example.input))

    def _entering(self, pair: Example) -> int | None:
        return self.task.states_length(pair, self.prefix.stack)

    def _look_up(
        self,
        store: TensorStore,
        keys: Sequence[str],
        pairs: Sequence[Example],
        compute: Callable[[Batch, Sequence[int]], list[Entry]],
    ) -> list[Entry]:
        """The entry of each key, in order; ``compute`` makes those that the store does not have."""
        missing = list({key: place for place, key in reversed(list(enumerate(keys))) if key not in store}.values())[
            ::-1
        ]
        fresh: dict[str, Entry] = {}
        for turn in range(self.together(-(-len(missing) // self.micro_batch))):
            places = missing[turn * self.micro_batch :][: self.micro_batch]
            if not places:  # nothing is missing here, but elsewhere
                with frozen(self.task.model):
                    compute(self.task.collate(pairs[:1]), [0])
                continue
            with frozen(self.task.model):
                entries = compute(self.task.collate([pairs[place] for place in places]), places)
            for place, entry in zip(places, entries, strict=True):
                fresh[keys[place]] = entry
                store.put(keys[place], entry)
        device = self.task.device
        return [fresh[key] if key in fresh else tuple(t.to(device) for t in store[key]) for key in keys]


def _entries(rows: Mapping[str, PackedFactors]) -> list[Entry]:
    """What belongs to each episode: u, delta and (often empty) experts of one matrix after the other."""
    parts = []
    for own in rows.values():
        parts += [own.u.split(own.counts), own.delta.split(own.counts)]
        nobody = own.u.new_zeros(0, dtype=torch.long)
        parts.append([nobody] * len(own.counts) if own.experts is None else list(own.experts.split(own.counts)))
    return list(zip(*parts, strict=True))


def _key(kind: str, tokens: Iterable[Hashable], split: int) -> str:
    """Name what an example gives: the same tokens, with the targets at the same places, give the same."""
    return f"{kind}-{hashlib.sha256(repr((split, *tokens)).encode()).hexdigest()[:32]}"
