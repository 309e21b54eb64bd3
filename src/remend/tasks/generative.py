"""Models that write text: an output layer over a vocabulary, and greedy answers token by token."""

from __future__ import annotations

import unicodedata
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.core.exclusive_execution import uncompiled
from remend.core.low_rank_hooks import frozen
from remend.errors import ModelError, RequestError
from remend.models.frozen_prefix import run_until
from remend.request import Chat, Input, Prompt, TextPair
from remend.tasks.base import Answer, Batch, Example, Task
from remend.tasks.chat_template import ChatTemplate
from remend.tasks.open_answers import begins_with, first_word_length
from remend.tasks.same_text import same_text
from remend.tasks.unknown_text import unknown_pieces


class GenerativeTask(Task):
    """A task whose targets are texts that the model writes token by token.

    Args:
        model: a model with an output layer over a vocabulary.
        tokenizer: its tokenizer.
        autocast: a narrower dtype for the model's matrix products.
    """

    reads_text = True
    generates = True

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__(model, tokenizer, autocast)
        self.tokenizer = tokenizer
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise ModelError(f"{type(model).__name__} has no output layer over a vocabulary; it is no language model")
        self.head = head
        self.chat = ChatTemplate(tokenizer)
        self._single_token = self.collate([Example((0,), (0,))])

    @abstractmethod
    def answer_room(self, prompt_length: int, limit: int) -> int:
        """Return how many tokens, at most ``limit``, an answer to a prompt of some length may get_field."""

    @abstractmethod
    def _run(self, batch: Batch) -> Float[Tensor, "row place vocabulary"]: ...

    @abstractmethod
    def next_logits(
        self, prompt_ids: Int[Tensor, "row token"], mask: Int[Tensor, "row token"] | None = None
    ) -> Callable[[Int[Tensor, " row"] | None], Float[Tensor, "row vocabulary"]]:
        """Return a function that gives the logits of the next token of each row, reading each token only once.

        It is called with None at first, and then with the token that each row goes on with. What a token needs of those
        before it (keys and values of attention) is kept where the model returns it. Call it with the model frozen.

        Args:
            prompt_ids: prompts of one length.
            mask: 0 where there is padding before a prompt (:meth:`reads_padding`), else 1; by default there is none.
        """

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end an answer: the tokenizer's end token, and the one that ends a turn of a conversation."""
        return frozenset((self.tokenizer.eos_token_id, self.chat.end)) - {None}

    def _one_text(self, prompt: Prompt) -> str | Chat:
        """Return the prompt if it is one that a language model can be asked."""
        if isinstance(prompt, Input):
            raise RequestError(
                f"{type(self.model).__name__} is a language model and is given a text or messages, not {prompt.key!r}"
            )
        if isinstance(prompt, TextPair):
            raise RequestError(
                f"{type(self.model).__name__} is a language model and is given one text, not a pair "
                f"({str(prompt)[:40]!r}…): write both as one prompt"
            )
        return prompt

    @cached_property
    def _nothing(self) -> list[int]:
        """The tokens of an empty text."""
        return self._strip_end(self.ids(""))

    def ids(self, text: str, framed: bool = True) -> list[int]:
        """Return a text's token ids, if ``framed`` with what the tokenizer puts around it.

        A beginning token that both the tokenizer and the text give is there once.
        """
        ids = list(self.tokenizer(text, add_special_tokens=framed, verbose=False).input_ids)
        begin = self.tokenizer.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids

    def unknown_text(self, prompt: Prompt) -> tuple[str, ...]:
        """Return the pieces of a text or a conversation that the tokenizer reads as unknown."""
        text = self._one_text(prompt)
        return unknown_pieces(self.tokenizer, self.chat.opening(text)[0] if isinstance(text, Chat) else text)

    def check_written(self, target: str, ids: Sequence[int]) -> None:
        """Check that the tokens of a target are its text, but for letter case and spaces.

        Raises:
            RequestError: the tokenizer cannot write some of its characters, which are named.
        """
        written = self.decode_tokens([token for token in ids if token != self.tokenizer.unk_token_id], True)
        if written.strip() == target:
            return
        for special in self.tokenizer.all_special_tokens:
            target = target.replace(special, "")
        missing = Counter(_visible(target)) - Counter(_visible(written))
        if missing:
            named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in list(missing)[:8])
            raise RequestError(
                f"the tokenizer cannot write {len(missing)} of the characters of the target {target[:40]!r}: {named}. "
                "The model would be taught another text: leave them away or write them otherwise, or edit a model "
                "whose tokenizer knows them"
            )

    def _strip_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def outputs(self, batch: Batch) -> Float[Tensor, "target vocabulary"]:
        """Run the model; return the logits that predict each target token, and no others."""
        # The hidden states are gathered on their way into the output layer, so that the product with the vocabulary is
        # computed at the targets only. What the model does to its logits afterwards (scaling, capping) still happens.
        with gather_at(self.head, batch.row, batch.position):
            return self._run(batch)[0]

    def output_states(self, batch: Batch) -> Float[Tensor, "target state"]:
        """Run the model up to its output layer; return the hidden states that predict each target token."""
        hidden = run_until(self.head, lambda: self._run(batch))
        return hidden[batch.row.to(hidden.device), batch.position.to(hidden.device)]

    def outputs_from_states(self, states: Float[Tensor, "target state"]) -> Float[Tensor, "target vocabulary"]:
        """Return the logits that the model makes of the hidden states that enter its output layer.

        Call it with the blocks bypassed (:meth:`FrozenPrefix.bypass_blocks`), or they run for nothing.
        """
        # The model runs on a single token with the layer's input replaced, so that it scales or caps the logits itself.
        with uncompiled():
            handle = self.head.register_forward_pre_hook(lambda head, args: (states[None], *args[1:]))
            try:
                return self._run(self._single_token)[0]
            finally:
                handle.remove()

    def predict(self, prompts: Sequence[Prompt], max_new_tokens: int = 32, batch_size: int = 64) -> list[Answer]:
        """Return greedy answers as token ids, up to the end token and with it, or as far as the limit allows."""
        return self.continuations([self.encode_question(prompt) for prompt in prompts], max_new_tokens, batch_size)

    def continuations(
        self, ids: Sequence[tuple[int, ...]], max_new_tokens: int = 32, batch_size: int = 64
    ) -> list[tuple[int, ...]]:
        """Return greedy continuations of encoded prompts, up to the end token and with it, or as far as the limit."""
        answers: dict[int, tuple[int, ...]] = {}
        for members, room in self._answered_together(ids, max_new_tokens):
            for start in range(0, len(members), batch_size):
                chunk = members[start : start + batch_size]
                tokens, mask = _padded_left([ids[index] for index in chunk])
                with frozen(self.model), torch.no_grad():
                    step = self.next_logits(tokens.to(self.device), mask.to(self.device))
                    answers |= zip(chunk, self._decode(len(chunk), room, step), strict=True)
        return [answers[index] for index in range(len(ids))]

    def _answered_together(
        self, ids: Sequence[tuple[int, ...]], max_new_tokens: int
    ) -> Iterator[tuple[list[int], int]]:
        """Yield the numbers of prompts that can go through the model together, and the room for their answers.

        They are of one length, or of all lengths from short to long where the model reads padded prompts rightly.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        lengths = {len(prompt) for prompt in ids}
        padding = len(lengths) > 1 and self.reads_padding(min(ids, key=len))
        for index in sorted(range(len(ids)), key=lambda index: len(ids[index])):
            length = len(ids[index])
            room = self.answer_room(length, max_new_tokens)
            groups.setdefault((0 if padding and room == max_new_tokens else length, room), []).append(index)
        yield from ((members, room) for (_, room), members in groups.items())

    def reads_padding(self, prompt: tuple[int, ...]) -> bool:
        """Tell whether :meth:`next_logits` reads a prompt with padding before it as it reads it without."""
        return False

    def _decode(
        self, rows: int, room: int, step: Callable[[Tensor | None], Float[Tensor, "row vocabulary"]]
    ) -> list[tuple[int, ...]]:
        """Choose the most probable token, at most ``room`` times or until every row has ended.

        Args:
            rows: the number of answers.
            room: the longest answer.
            step: returns the logits of the next token, given the tokens that were chosen last (None at first).
        """
        # Not generate(): it also follows the model's generation settings (repetition penalties, forced tokens), and its
        # result would not be the argmax that evaluation reasons about.
        ends = self.end_tokens
        closing = torch.tensor(sorted(ends), device=self.device)
        chosen: list[Tensor] = []
        ended = torch.zeros(rows, dtype=torch.bool, device=self.device)
        while len(chosen) < room and not bool(ended.all()):
            token = step(chosen[-1] if chosen else None).argmax(-1)
            chosen.append(token)
            ended |= torch.isin(token, closing)
        return [_up_to(row, ends) for row in torch.stack(chosen, 1).tolist()]

    def same_answer(self, answer: Answer, other: Answer) -> bool:
        """Tell whether two answers are the same text to a reader, and both have ended or neither has."""
        # An answer that the limit of its length cut off goes on: its end is not known.
        ended, other_ended = (bool(self.end_tokens & set(ids[-1:])) for ids in (answer, other))
        same = answer == other or same_text(self.decode(answer), self.decode(other))
        return same and ended == other_ended and not self.is_empty(answer)

    def ends_answer(self, prompt: Prompt) -> bool:
        """Tell whether the model itself ends its answer to a prompt: it needs a token for it."""
        return bool(self.end_tokens)

    def gives(self, prompt: Prompt, answer: Answer, expected: Answer) -> bool:
        """Tell whether a free answer is the expected one, or begins with it where the model goes on writing."""
        if self.ends_answer(prompt):
            return self.same_answer(answer, expected)
        return begins_with(self.decode(answer), self.decode(expected))

    def answer_span(self, prompt: Prompt, answer: Answer) -> Answer:
        """Return the whole answer, or its first word where the model goes on writing."""
        if self.ends_answer(prompt):
            return answer
        body = answer[:-1] if answer and answer[-1] in self.end_tokens else answer
        return body[: first_word_length(len(body), lambda length: self.decode(body[:length]))]

    def answer_length(self, answer: Answer, expected: Answer) -> int:
        """Return the number of tokens of an answer that are the expected one, which it begins with."""
        wanted = self.decode(expected)
        lengths = range(1, len(answer) + 1)
        return next((n for n in lengths if begins_with(self.decode(answer[:n]), wanted)), len(answer))

    def is_empty(self, answer: Answer) -> bool:
        """Tell whether an answer holds no text."""
        return not self.decode(answer)

    def decode(self, answer: Answer) -> str:
        """Return an answer as text, without special tokens and the spaces around it."""
        return self.decode_tokens(answer, skip_special_tokens=True).strip()

    def decode_tokens(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids as it is, spaces before punctuation included."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )


def _visible(text: str) -> str:
    """Return what a reader sees of a text, in lower case: no spaces, and no marks without width."""
    composed = unicodedata.normalize("NFC", text.casefold())
    return "".join(c for c in composed if unicodedata.category(c) != "Zs" and c not in "\u200b\ufeff\u00ad")


def has_vocabulary(model: nn.Module) -> bool:
    """Tell whether a model has an output layer over a vocabulary, as models that write text do."""
    find_head = getattr(model, "get_output_embeddings", None)
    return callable(find_head) and isinstance(find_head(), nn.Module)


def closed(ids: list[int], end: int | None) -> list[int]:
    """Return an answer's token ids with one end token, at the end; an empty answer stays empty."""
    body = ids[: ids.index(end)] if end in ids else ids
    return [*body, end] if body and end is not None else body


def _up_to(row: Sequence[int], ends: Container[int]) -> tuple[int, ...]:
    """Return a row up to its first end token and with it, or the whole row."""
    return tuple(row[: next((length for length, token in enumerate(row, start=1) if token in ends), len(row))])


@contextmanager
def gather_at(head: nn.Module, row: Int[Tensor, " target"], position: Int[Tensor, " target"]) -> Iterator[None]:
    """Within the context, give ``head`` only the hidden states at the given rows and positions, as one row."""

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[row.to(hidden.device), position.to(hidden.device)][None], *args[1:])

    with uncompiled():
        handle = head.register_forward_pre_hook(gather)
        try:
            yield
        finally:
            handle.remove()


def _padded_left(rows: Sequence[tuple[int, ...]]) -> tuple[Int[Tensor, "row token"], Int[Tensor, "row token"]]:
    """Return token ids with zeros before the shorter rows, and the mask of those that are no padding."""
    longest = max(map(len, rows))
    tokens, mask = torch.zeros((2, len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return tokens, mask
