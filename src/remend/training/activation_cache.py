"""``ActivationCache``: what the frozen base model computes of each example, computed once while an editor trains."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.capture import GradientFactors
from remend.core.distributed import ProcessGroup
from remend.core.low_rank_hooks import frozen
from remend.editors.factor_packing import PackedFactors
from remend.editors.trainable import TrainableEditor
from remend.fingerprint import hash_model
from remend.models.frozen_prefix import FrozenPrefix
from remend.models.fsdp import is_sharded
from remend.tasks.base import Batch, Example, Task
from remend.training.config import Resources
from remend.training.tensor_store import Entry, TensorStore

DEFAULT_MICRO_BATCH = 32
"""The number of examples that go through the base model together until the trainer says otherwise."""


class ActivationCache:
    """The frozen prefix's outputs, the base model's last hidden states, and the packed factors of edit pairs.

    Each is looked up by example. What is missing is computed, ``micro_batch`` examples at a time, and stored. Rounding
    depends on which examples are computed together, so a resumed run repeats the whole sequence of look-ups: the same
    sequence gives the same bits.

    Args:
        task: the base model.
        editor: the editor in training.
        prefix: the blocks of the base model below the edited ones.
        states: the store of hidden states: they are small, and save the most computation.
        factors: the store of packed factors: an entry takes as much as some tens of hidden states.
        synchronize_passes: returns the number of passes to make, given how many this process needs. It is more where
            other processes need more and all must make the same number.

    Attributes:
        micro_batch: the number of examples that go through the base model together.
    """

    def __init__(
        self,
        task: Task,
        editor: TrainableEditor,
        prefix: FrozenPrefix,
        states: TensorStore,
        factors: TensorStore,
        synchronize_passes: Callable[[int], int] = int,
    ) -> None:
        self.synchronize_passes = synchronize_passes
        self.task, self.editor, self.prefix, self.states, self.factors = task, editor, prefix, states, factors
        self.micro_batch = DEFAULT_MICRO_BATCH

    def with_stores(self, states: TensorStore, factors: TensorStore) -> ActivationCache:
        """Return a cache of the same model and editor with other stores."""
        return ActivationCache(self.task, self.editor, self.prefix, states, factors, self.synchronize_passes)

    @property
    def factor_budget(self) -> int:
        """The bytes of packed factors that can be stored."""
        return self.factors.budget

    def prefix_states(self, examples: Sequence[Example]) -> Float[Tensor, "row token *d"] | None:
        """Return the input of the lowest edited block, right-padded with zeros; None if no block is below it."""
        if self.prefix.depth == 0:
            return None

        def compute(batch: Batch, indices: Sequence[int]) -> list[Entry]:
            with torch.no_grad():
                states = self.prefix.compute_states(lambda: self.task.outputs(batch))
            return [(row[: self._states_length(examples[i])],) for row, i in zip(states, indices, strict=True)]

        entries = self._look_up(self.states, [self._prefix_key(example) for example in examples], examples, compute)
        rows = [row for (row,) in entries]
        padded = rows[0].new_zeros(len(rows), max(map(len, rows)), *rows[0].shape[1:])
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return padded

    def base_states(
        self, examples: Sequence[Example], prefix_states: Float[Tensor, "row token *d"] | None
    ) -> Float[Tensor, "target state"]:
        """Return the input of the unedited model's output layer at the targets, one example after the other."""

        def compute(batch: Batch, indices: Sequence[int]) -> list[Entry]:
            lengths = [self._states_length(examples[i]) for i in indices]
            length = None if None in lengths else max(length for length in lengths if length is not None)
            states = None if prefix_states is None else prefix_states[list(indices), :length]
            with torch.no_grad(), self.prefix.resume_from(states):
                outputs = self.task.output_states(batch)
            return [(part,) for part in outputs.split([len(examples[i].target) for i in indices])]

        keys = [self._base_key(example) for example in examples]
        return torch.cat([states for (states,) in self._look_up(self.states, keys, examples, compute)])

    def base_outputs(
        self, examples: Sequence[Example], prefix_states: Float[Tensor, "row token *d"] | None
    ) -> Float[Tensor, "target output"]:
        """Return the unedited model's outputs at the targets; they are too large to be stored."""
        states = self.base_states(examples, prefix_states)
        with frozen(self.task.model), torch.no_grad(), self.prefix.bypass_blocks():
            return self.task.outputs_from_states(states)

    def gradient_factors(self, examples: Sequence[Example]) -> dict[str, GradientFactors]:
        """Compute the gradient factors of edit pairs at every token; they are not stored."""
        with self.prefix.resume_from(self.prefix_states(examples)):
            return self.editor.capture(self.task, self.task.collate(examples))

    def packed_factors(self, examples: Sequence[Example]) -> dict[str, PackedFactors]:
        """Return what the editor reads of edit pairs (:meth:`TrainableEditor.pack`)."""
        names = list(self.editor.shapes)

        def compute(batch: Batch, indices: Sequence[int]) -> list[Entry]:
            return _split_by_episode(self.editor.pack(self.gradient_factors([examples[i] for i in indices])))

        keys = [self._factors_key(example) for example in examples]
        columns = list(zip(*self._look_up(self.factors, keys, examples, compute), strict=True))
        packed = {}
        for name, u, delta, experts in zip(names, columns[0::3], columns[1::3], columns[2::3], strict=True):
            all_experts = torch.cat(experts)
            packed[name] = PackedFactors(
                torch.cat(u),
                torch.cat(delta),
                tuple(len(part) for part in u),
                all_experts if len(all_experts) else None,
            )
        return packed

    def put_packed_factors(self, examples: Sequence[Example], packed: Mapping[str, PackedFactors]) -> None:
        """Store what the editor reads of edit pairs, so that :meth:`packed_factors` finds it."""
        for example, entry in zip(examples, _split_by_episode(packed), strict=True):
            if self._factors_key(example) not in self.factors:
                self.factors.put(self._factors_key(example), entry)

    def is_complete(self, edits: Iterable[Example], locality: Iterable[Example], examples: Iterable[Example]) -> bool:
        """Tell whether the stores will not change any more, with these as the training set's examples."""
        keys = [self._base_key(example) for example in locality]
        if self.prefix.depth:
            keys += [self._prefix_key(example) for example in examples]
        factor_keys = map(self._factors_key, edits) if self.editor.reads_packed_factors else ()
        return self.states.has_all(keys) and self.factors.has_all(factor_keys)

    def flush(self) -> None:
        """Write to disk the hidden states that are to be stored there."""
        self.states.flush()

    def _prefix_key(self, example: Example) -> str:
        return _key("prefix", self.task.tokens_read(example), len(example.input))

    def _base_key(self, example: Example) -> str:
        return _key("base", self.task.tokens_read(example), len(example.input))

    def _factors_key(self, example: Example) -> str:
        return _key("rows", (*example.input, *example.target), len(example.input))

    def _states_length(self, example: Example) -> int | None:
        return self.task.states_length(example, self.prefix.stack)

    def _look_up(
        self,
        store: TensorStore,
        keys: Sequence[str],
        examples: Sequence[Example],
        compute: Callable[[Batch, Sequence[int]], list[Entry]],
    ) -> list[Entry]:
        """Return the entry of each key, in order; ``compute`` makes those that the store does not have."""
        # The first example of each missing key. A resumed run must see the same order, in which rounding is the same.
        first = {key: index for index, key in reversed(list(enumerate(keys))) if key not in store}
        missing = list(first.values())[::-1]
        computed: dict[str, Entry] = {}
        for turn in range(self.synchronize_passes(-(-len(missing) // self.micro_batch))):
            indices = missing[turn * self.micro_batch :][: self.micro_batch]
            if not indices:
                # Another process still makes passes of a model whose weights all share: take part in gathering them.
                with frozen(self.task.model):
                    compute(self.task.collate(examples[:1]), [0])
                continue
            with frozen(self.task.model):
                entries = compute(self.task.collate([examples[index] for index in indices]), indices)
            for index, entry in zip(indices, entries, strict=True):
                computed[keys[index]] = entry
                store.put(keys[index], entry)
        device = self.task.device
        return [computed[key] if key in computed else tuple(t.to(device) for t in store[key]) for key in keys]


def open_activation_cache(
    task: Task,
    editor: TrainableEditor,
    prefix: FrozenPrefix,
    examples: Sequence[Example],
    resources: Resources,
    process_group: ProcessGroup,
) -> ActivationCache:
    """Return a cache within the budget of ``resources``: hidden states first, packed factors with what is left.

    Args:
        task: the base model.
        editor: the editor in training.
        prefix: the blocks of the base model below the edited ones.
        examples: every example that training can draw.
        resources: the budget, and the folder on disk.
        process_group: the processes of the run.
    """
    budget = int(resources.cache * 1e9)
    folder = resources.cache_folder
    if folder is not None:  # states of another model, cut or precision are other states
        folder = folder / f"{hash_model(task.model)[:32]}-{prefix.depth}-{resources.precision}"
    states = TensorStore(budget, folder)
    factors = TensorStore(max(0, budget - state_bytes(task, prefix, examples)))
    # Each pass through a sharded model gathers its weights from all processes, so all must make the same passes.
    synchronize = (lambda count: int(process_group.largest(count))) if is_sharded(task.model) else int
    return ActivationCache(task, editor, prefix, states, factors, synchronize)


def state_bytes(task: Task, prefix: FrozenPrefix, examples: Sequence[Example]) -> int:
    """Compute the bytes of the hidden states of all examples: those entering the cut, and the last ones at targets."""
    # Where examples have no length, their states count as one each (task.state_bytes is then that of an example).
    lengths = [task.states_length(example, prefix.stack) if prefix.depth else 0 for example in examples]
    states = sum(1 if length is None else length for length in lengths)
    return (states + sum(len(example.target) for example in examples)) * task.state_bytes


def verify_prefix(task: Task, prefix: FrozenPrefix, examples: Sequence[Example]) -> None:
    """Check on some examples that the model can be resumed at the cut; if not, warn and run it as a whole.

    Args:
        task: the base model.
        prefix: the blocks below the edited ones; after a failed check it holds none.
        examples: two examples.
    """
    batch = task.collate(examples)
    with frozen(task.model):
        works = prefix.verify(lambda: task.outputs(batch), lambda: task.output_states(batch), task.outputs_from_states)
    if not works:
        warnings.warn(
            f"{type(task.model).__name__} hands more than hidden states from block to block, so the blocks below the "
            "edited ones run in every pass: training is slower, with the same results",
            stacklevel=4,
        )


def _split_by_episode(packed: Mapping[str, PackedFactors]) -> list[Entry]:
    """Return for each episode u, delta and the (often empty) experts of one matrix after the other."""
    columns = []
    for factors in packed.values():
        columns += [factors.u.split(factors.counts), factors.delta.split(factors.counts)]
        no_experts = factors.u.new_zeros(0, dtype=torch.long)
        experts = factors.experts
        columns.append([no_experts] * len(factors.counts) if experts is None else list(experts.split(factors.counts)))
    return list(zip(*columns, strict=True))


def _key(kind: str, tokens: Iterable[Hashable], split: int) -> str:
    """Return the key of an example's entry: equal for the same tokens with the targets at the same places."""
    return f"{kind}-{hashlib.sha256(repr((split, *tokens)).encode()).hexdigest()[:32]}"
