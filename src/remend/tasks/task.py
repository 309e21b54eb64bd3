"""What every task has in common: pairs of tokens, batches of them, logits where there are targets, greedy answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.core.branch import frozen
from remend.core.layers import device_of
from remend.core.losses import target_loss
from remend.errors import ModelError, RequestError
from remend.models.prefix import reach
from remend.request import Prompt
from remend.tasks.chat import ChatTemplate


@dataclass(frozen=True)
class Pair:
    """A tokenised prompt with its target; the target ends with the end token, where the tokenizer has one."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)

    @property
    def shown(self) -> tuple[int, ...]:
        """The tokens that the model is shown: all but the last, which predicts nothing."""
        return (*self.prompt, *self.target)[:-1]


@dataclass(frozen=True)
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
        self.chat = ChatTemplate(tokenizer)
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise ModelError(f"{type(model).__name__} has no output layer over a vocabulary; it is no language model")
        self.head = head
        self.context = _context(model)
        self._single_token = self.collate([Pair((0,), (0,))])

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
    def length(self, pair: Pair) -> int:
        """How much of the model's context a pair takes."""

    @abstractmethod
    def collate(self, pairs: Sequence[Pair]) -> Batch:
        """One batch of ``pairs`` on the model's device."""

    @abstractmethod
    def tokens(self, batch: Batch, names: Iterable[str], predicting: bool) -> dict[str, Bool[Tensor, "row token"]]:
        """Which tokens of a batch count at each named module: all real ones, or those that predict a target token."""

    @abstractmethod
    def entering(self, pair: Pair, stack: int) -> int:
        """How many tokens of a pair enter the blocks of one of the model's stacks."""

    @abstractmethod
    def room(self, prompt: int, most: int) -> int:
        """How many tokens an answer to a prompt of some length may take, at most ``most``."""

    @abstractmethod
    def _run(self, batch: Batch) -> Float[Tensor, "row place vocabulary"]: ...

    @abstractmethod
    def _greedy(self, asked: Int[Tensor, "row token"], room: int) -> list[tuple[int, ...]]: ...

    # -- text to tokens ------------------------------------------------------------------------------------------

    def tokenise(self, prompt: Prompt, target: str) -> Pair:
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
        pair = Pair(tuple(asked), tuple(answer))
        if self.context is not None and (length := self.length(pair)) > self.context:
            raise RequestError(
                f"prompt and target take {length} tokens, the model's context holds {self.context}: "
                f"shorten {'the target' if len(pair.target) > len(pair.prompt) else 'the prompt'} "
                f"({(target if len(pair.target) > len(pair.prompt) else str(prompt))[:40]!r}…)"
            )
        return pair

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer: the tokenizer's end token, and the one that ends a turn of a conversation."""
        return frozenset((self.tokenizer.eos_token_id, self.chat.end)) - {None}

    @cached_property
    def _nothing(self) -> list[int]:
        """What the tokenizer makes of an empty text."""
        return self._strip_end(self.ids(""))

    def ids(self, text: str, framed: bool = True) -> list[int]:
        """Token ids of a text; ``framed``: with what the tokenizer puts around it, but never begun twice."""
        ids = list(self.tokenizer(text, add_special_tokens=framed, verbose=False).input_ids)
        begin = self.tokenizer.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids

    def _strip_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    # -- running the model ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the token embedding."""
        return device_of(self.model.get_input_embeddings())

    def target_logits(self, batch: Batch) -> Float[Tensor, "target vocabulary"]:
        """The logits that predict each target token, and no others.

        The hidden states are gathered on their way into the output layer, so the product with the vocabulary is taken
        at the targets alone; whatever the model does to its logits afterwards (scaling, capping) still happens.
        """
        with gather_at(self.head, batch.row, batch.position):
            return self._run(batch)[0]

    def target_states(self, batch: Batch) -> Float[Tensor, "target d"]:
        """What the output layer sees at each target token: :meth:`logits` makes :meth:`target_logits` of it."""
        hidden = reach(self.head, lambda: self._run(batch))
        return hidden[batch.row.to(hidden.device), batch.position.to(hidden.device)]

    def logits(self, states: Float[Tensor, "target d"]) -> Float[Tensor, "target vocabulary"]:
        """The logits that the model makes of what its output layer sees.

        The model runs on one token, with the layer's input replaced, so that it scales or caps its logits as ever; call
        it with its blocks made hollow (:meth:`remend.models.prefix.Prefix.hollow`), or they run for nothing.
        """
        handle = self.head.register_forward_pre_hook(lambda head, args: (states[None], *args[1:]))
        try:
            return self._run(self._single_token)[0]
        finally:
            handle.remove()

    def loss(self, batch: Batch) -> Float[Tensor, " row"]:
        """−log p(target | prompt) of each pair, a target token's mean: the paper's l_e."""
        return target_loss(self.target_logits(batch), batch.target, batch.row, batch.rows)

    def answers(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 32, batch_size: int = 64
    ) -> list[tuple[int, ...]]:
        """Greedy answers, as token ids up to and with an end token (without it where the limit came first).

        Prompts of one length go together, so nothing is ever padded.
        """
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        by_length: dict[int, list[int]] = {}
        for index, prompt in enumerate(ids):
            by_length.setdefault(len(prompt), []).append(index)
        found: dict[int, tuple[int, ...]] = {}
        for length, members in by_length.items():
            room = self.room(length, max_new_tokens)
            if room < 1:
                raise RequestError(f"a prompt of {length} tokens leaves no room for an answer (context {self.context})")
            for start in range(0, len(members), batch_size):
                chunk = members[start : start + batch_size]
                asked = torch.tensor([ids[i] for i in chunk], device=self.device)
                with frozen(self.model), torch.no_grad():
                    found |= zip(chunk, self._greedy(asked, room), strict=True)
        return [found[i] for i in range(len(prompts))]

    def _decode(
        self, rows: int, room: int, step: Callable[[Tensor | None], Float[Tensor, "row vocabulary"]]
    ) -> list[tuple[int, ...]]:
        """The most probable token, ``room`` times or until every row has ended; ``step`` takes the last ones.

        Not ``generate``: that follows the model's own generation settings too (repetition penalties, forced tokens),
        and would then not be the argmax that evaluation reasons about.
        """
        ends = self.ends
        closing = torch.tensor(sorted(ends), device=self.device)
        chosen: list[Tensor] = []
        ended = torch.zeros(rows, dtype=torch.bool, device=self.device)
        while len(chosen) < room and not bool(ended.all()):
            token = step(chosen[-1] if chosen else None).argmax(-1)
            chosen.append(token)
            ended |= torch.isin(token, closing)
        return [_up_to(row, ends) for row in torch.stack(chosen, 1).tolist()]

    def text(self, answer: Sequence[int]) -> str:
        """An answer's token ids as text."""
        return self.decoded(answer, skip_special_tokens=True).strip()

    def decoded(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Token ids as the text that they are, spaces before punctuation included."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )


def closed(ids: list[int], end: int | None) -> list[int]:
    """An answer's token ids with one end token, at the end; none where nothing is answered."""
    body = ids[: ids.index(end)] if end in ids else ids
    return [*body, end] if body and end is not None else body


def _up_to(row: Sequence[int], ends: Container[int]) -> tuple[int, ...]:
    """A row up to and with its first end token, or all of it."""
    return tuple(row[: next((place for place, token in enumerate(row, start=1) if token in ends), len(row))])


@contextmanager
def gather_at(head: nn.Module, row: Int[Tensor, " target"], position: Int[Tensor, " target"]) -> Iterator[None]:
    """Within the block, ``head`` sees only the hidden states at the given rows and positions, as one long row."""

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[row.to(hidden.device), position.to(hidden.device)][None], *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def _context(model: PreTrainedModel) -> int | None:
    """How many tokens the model can read, or None where its configuration does not say."""
    length = getattr(model.config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
