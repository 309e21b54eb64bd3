"""What every task has in common: pairs of a prompt and a target, batches of them, logits where there are targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.core.layers import execution_device
from remend.core.losses import target_loss
from remend.errors import RequestError
from remend.request import Prompt

EDIT_BATCH = 32
"""Requests whose gradients are taken in one pass; bounds the memory, does not change the result."""


@dataclass(frozen=True)
class Example:
    """A tokenised prompt with its target.

    A target of tokens ends with the end token, where the tokenizer has one; a label is a target of one number.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)

    @property
    def shown(self) -> tuple[int, ...]:
        """The tokens that the model is shown: all but the last, which predicts nothing."""
        return (*self.prompt, *self.target)[:-1]


def in_batches(pairs: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Pairs, as many at a time as go through a model together when edits are made of them."""
    for start in range(0, len(pairs), EDIT_BATCH):
        yield pairs[start : start + EDIT_BATCH]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some pairs as one right-padded batch, and where in it each target token is predicted.

    Right padding: a causal model never sees what comes later, so positions are counted the same with and without it.
    An encoder-decoder reads the prompts and writes from ``decoder_ids``; there targets are predicted.
    """

    input_ids: Int[Tensor, "row token"]
    mask: Bool[Tensor, "row token"]
    row: Int[Tensor, " target"]
    position: Int[Tensor, " target"]
    target: Int[Tensor, " target"]
    decoder_ids: Int[Tensor, "row place"] | None = None
    decoder_mask: Bool[Tensor, "row place"] | None = None

    @property
    def rows(self) -> int:
        """How many pairs the batch holds."""
        return self.input_ids.shape[0]

    @property
    def predicting(self) -> Bool[Tensor, "row token"]:
        """The tokens at which a target token is predicted."""
        found = torch.zeros_like(self.mask if self.decoder_mask is None else self.decoder_mask)
        found[self.row, self.position] = True
        return found

    @property
    def first(self) -> Int[Tensor, " row"]:
        """Where each pair's first target token is predicted."""
        longest = self.position.new_full((self.rows,), int(self.position.max()))
        return longest.scatter_reduce(0, self.row, self.position, "amin")

    def ordered(self, *groups: Sequence[int]) -> Batch:
        """The same batch with its targets in another order: those of the rows of one group after the other's."""
        rank = torch.cat([torch.tensor(group) for group in groups]).argsort().to(self.row.device)
        order = rank[self.row].argsort(stable=True)
        return replace(self, row=self.row[order], position=self.position[order], target=self.target[order])


class Task(ABC):
    """A model with its tokenizer, seen as something that is asked prompts and gives answers.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        autocast: a narrower dtype in which to multiply; by default that of the weights.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.autocast = autocast
        self.context = _context(model)

    # -- what differs --------------------------------------------------------------------------------------------

    @abstractmethod
    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt that is asked.

        Raises:
            RequestError: the prompt is empty, nothing of it is left when tokenised, or it is a conversation and the
                tokenizer's chat template cannot write it.
        """

    @abstractmethod
    def answer_ids(self, asked: list[int], prompt: Prompt, target: str) -> list[int]:
        """Token ids of a target (not empty, without spaces around it) after a prompt, its end token included."""

    @abstractmethod
    def length(self, pair: Example) -> int:
        """How much of the model's context a pair takes."""

    @abstractmethod
    def collate(self, pairs: Sequence[Example]) -> Batch:
        """One batch of ``pairs`` on the model's device."""

    @abstractmethod
    def tokens(self, batch: Batch, names: Iterable[str], predicting: bool) -> dict[str, Bool[Tensor, "row token"]]:
        """Which tokens of a batch count at each named module: all real ones, or those that predict a target token."""

    @abstractmethod
    def entering(self, pair: Example, stack: int) -> int:
        """How many tokens of a pair enter the blocks of one of the model's stacks."""

    @abstractmethod
    def target_logits(self, batch: Batch) -> Float[Tensor, "target answer"]:
        """The logits that predict each target, and no others."""

    @abstractmethod
    def target_states(self, batch: Batch) -> Float[Tensor, "target state"]:
        """What is kept of a pass to have :meth:`target_logits` again: :meth:`logits` makes them of it."""

    @abstractmethod
    def logits(self, states: Float[Tensor, "target state"]) -> Float[Tensor, "target answer"]:
        """The logits that the model makes of :meth:`target_states`.

        Call it with the model's blocks made hollow (:meth:`FrozenPrefix.bypass_blocks`), or they may run for
        nothing.
        """

    @abstractmethod
    def answers(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 32, batch_size: int = 64
    ) -> list[tuple[int, ...]]:
        """What the model answers, as targets are written in a :class:`Example`."""

    @abstractmethod
    def text(self, answer: Sequence[int]) -> str:
        """An answer as text."""

    @property
    def ends(self) -> frozenset[int]:
        """What ends an answer, where something does."""
        return frozenset()

    # -- text to tokens ------------------------------------------------------------------------------------------

    def tokenise(self, prompt: Prompt, target: str) -> Example:
        """Token ids of a prompt and its target.

        Spaces around either do not matter; the target is closed with the end token, in a conversation with the one that
        ends a turn.

        Raises:
            RequestError: a side is empty, or longer than the model's context.
        """
        asked = self.prompt_ids(prompt)
        answer = self.answer_ids(asked, prompt, target.strip()) if target.strip() else []
        if not answer:
            raise RequestError(f"the target {target!r} holds no text that the tokenizer knows")
        pair = Example(tuple(asked), tuple(answer))
        if self.context is not None and (length := self.length(pair)) > self.context:
            raise RequestError(
                f"prompt and target take {length} tokens, the model's context holds {self.context}: "
                f"shorten {'the target' if len(pair.target) > len(pair.prompt) else 'the prompt'} "
                f"({(target if len(pair.target) > len(pair.prompt) else str(prompt))[:40]!r}…)"
            )
        return pair

    # -- running the model ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the token embedding."""
        return execution_device(self.model.get_input_embeddings())

    def loss(self, batch: Batch) -> Float[Tensor, " row"]:
        """−log p(target | prompt) of each pair, a target token's mean: the paper's l_e."""
        return target_loss(self.target_logits(batch), batch.target, batch.row, batch.rows)


def _context(model: PreTrainedModel) -> int | None:
    """How many tokens the model can read, or None where its configuration does not say."""
    length = getattr(model.config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
