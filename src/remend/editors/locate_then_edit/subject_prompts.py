"""Find the subject in a request's prompt, and put the prompt behind random beginnings."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from remend.errors import RequestError, prefix_request_errors
from remend.request import Chat, EditRequest, Prompt, TextPair, as_completion
from remend.tasks.base import Example, Task
from remend.tasks.separators import without_outer_spaces

BEGINNING_WORDS = (3, 8)
"""The least and the most words of a random beginning."""


@dataclass(frozen=True)
class PromptContexts:
    """The prompt of one request with its target, by itself and behind random beginnings.

    Attributes:
        examples: the prompt with the target, first by itself. Every request has as many.
        positions: the position of the subject's last token in the prompt of each example.
        subject_alone: of a causal model, the subject without the prompt, whose next token shows what the model takes it
            to be; else None.
    """

    examples: tuple[Example, ...]
    positions: tuple[int, ...]
    subject_alone: Example | None = None

    @property
    def all_examples(self) -> tuple[Example, ...]:
        """The examples and, where there is one, the subject alone."""
        return self.examples if self.subject_alone is None else (*self.examples, self.subject_alone)

    @property
    def all_positions(self) -> tuple[int, ...]:
        """The positions in :attr:`all_examples`; alone, the subject's last token is the prompt's."""
        if self.subject_alone is None:
            return self.positions
        return (*self.positions, len(self.subject_alone.input) - 1)


def random_beginnings(text: Sequence[str], count: int, seed: int) -> list[str]:
    """Draw stretches of some words from passages, as beginnings of prompts that have nothing to do with them."""
    rng = random.Random(f"{seed} beginnings")
    passages = [words for passage in text if (words := passage.split())]
    beginnings = []
    for _ in range(count):
        words = rng.choice(passages)
        length = rng.randint(*BEGINNING_WORDS)
        start = rng.randrange(max(1, len(words) - length + 1))
        beginnings.append(" ".join(words[start : start + length]).rstrip(".,;:!?") + ".")
    return beginnings


def encode_contexts(task: Task, request: EditRequest, beginnings: Sequence[str]) -> PromptContexts:
    """Encode a request by itself and behind each of the beginnings, and locate its subject.

    A classifier judges all of its text, so it reads no random beginnings. Where a beginning does not fit into the
    context, the prompt by itself takes its place, because all requests need as many examples.

    Raises:
        RequestError: the request names no subject, its prompt does not hold it, or it does not fit the context.
    """
    with prefix_request_errors(f"request {request.id if request.id is not None else str(request.prompt)[:60]!r}"):
        subject = (request.subject or "").strip()
        if not subject:
            raise RequestError(
                "names no subject, and this editor changes what the model recalls of one: give subject=…, a part of "
                "the prompt"
            )
        example = task.encode(request.prompt, request.target)
        located = [(example, subject_position(task, request.prompt, subject, example))]
        for beginning in beginnings if task.generates else ():
            prompt = _with_beginning(beginning, request.prompt)
            try:
                example = task.encode(prompt, request.target)
            except RequestError:  # too long: by itself the prompt is valid, so nothing else can be wrong
                located.append(located[0])
            else:
                located.append((example, subject_position(task, prompt, subject, example)))
        alone = Example(tuple(task.encode_input(subject)), (0,)) if task.causal else None
    examples, positions = zip(*located, strict=True)
    return PromptContexts(examples, positions, alone)


def subject_position(task: Task, prompt: Prompt, subject: str, example: Example) -> int:
    """Return the position of the subject's last token in a prompt, where the prompt names it last.

    Raises:
        RequestError: the prompt does not hold the subject.
    """
    texts, special_tokens = _tokenizer_texts(task, prompt)
    spans = [(index, span) for index, text in enumerate(texts) for span in _spans(text, subject)]
    if not spans:
        raise RequestError(
            f"the prompt {str(prompt)[:60]!r} does not hold its subject {subject!r}: give the subject as the prompt "
            "writes it"
        )
    index, span = spans[-1]
    locate = position_by_offsets if task.processor.is_fast else position_by_prefix
    position = locate(task.processor, texts, special_tokens, index, span)
    # A beginning token that both a tokenizer and its chat template write is in the example only once.
    ids = _ids(task.processor, texts, special_tokens)
    return position if tuple(ids[: len(example.input)]) == example.input else position - 1


def _with_beginning(beginning: str, prompt: Prompt) -> Prompt:
    """Return a prompt behind a random beginning; of a conversation, the last message is behind it."""
    if isinstance(prompt, Chat):
        return prompt.with_last_message(f"{beginning} {prompt.messages[-1].content}")
    assert isinstance(prompt, str), "a generative task refuses a pair of texts before"
    return as_completion(f"{beginning} {prompt}", getattr(prompt, "separator", None))


def _tokenizer_texts(task: Any, prompt: Prompt) -> tuple[list[str], bool]:
    """Return the texts that the tokenizer is given for a prompt, and whether it adds special tokens to them."""
    if isinstance(prompt, TextPair):
        return [prompt.first.strip(), prompt.second.strip()], True
    if isinstance(prompt, Chat):
        return [task.chat.opening(prompt)[0]], False  # only generative tasks, which have a template, encode a Chat
    assert isinstance(prompt, str), "encoding refused it"
    return [without_outer_spaces(prompt) if task.causal else prompt.strip(" " if task.generates else None)], True


def _spans(text: str, subject: str) -> list[tuple[int, int]]:
    """Return where a text holds a subject: as it is written or, failing that, in other letter cases."""
    for flags in (0, re.IGNORECASE):
        if spans := [match.span() for match in re.finditer(re.escape(subject), text, flags)]:
            return spans
    return []


def position_by_offsets(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special_tokens: bool, index: int, span: tuple[int, int]
) -> int:
    """Return the position of the last token that overlaps a span of text number ``index``, for fast tokenizers."""
    encoded = tokenizer(*texts, add_special_tokens=special_tokens, return_offsets_mapping=True, verbose=False)
    text_numbers = encoded.sequence_ids(0)
    overlapping = [
        position
        for position, (start, end) in enumerate(encoded["offset_mapping"])
        if text_numbers[position] == index and start < span[1] and end > span[0] and start < end
    ]
    if not overlapping:
        raise RequestError("the tokenizer knows no token of its subject: give another part of the prompt as subject")
    return overlapping[-1]


def position_by_prefix(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special_tokens: bool, index: int, span: tuple[int, int]
) -> int:
    """Return the position of the last token that the texts and their prefix up to the end of a span share.

    For tokenizers without offsets. Where the token after the shared ones begins within the span, it covers the span's
    end together with what follows, and is the last.
    """
    whole = _ids(tokenizer, texts, special_tokens)
    prefix = _ids(tokenizer, [*texts[:index], texts[index][: span[1]]], special_tokens)
    while prefix and prefix[-1] in tokenizer.all_special_ids:  # the end of a text
        prefix.pop()
    shared = next((i for i, (a, b) in enumerate(zip(whole, prefix, strict=False)) if a != b), len(prefix))
    return min(shared, len(prefix) - 1)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special_tokens: bool) -> list[int]:
    return list(tokenizer(*texts, add_special_tokens=special_tokens, verbose=False).input_ids)
