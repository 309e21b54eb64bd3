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
from remend.tasks.own_words import TARGET_AS_GIVEN
from remend.tasks.separators import without_outer_spaces

BEGINNING_WORDS = (3, 8)
"""The least and the most words of a random beginning."""


Located = tuple[Example, int]
"""A text, and the position of the subject's last token in it."""


@dataclass(frozen=True)
class PromptContexts:
    """The texts about one subject, each with the position of the subject's last token.

    Attributes:
        examples: prompts with targets, first the request's own.
        kept: other prompts that name the subject; what the model says next to them should stay.
        mentions: other texts that name the subject.
        lookalikes: prompts about other subjects whose names end alike.
        near: the common questions that may be answered otherwise, too, by name.
        openings: of the target of each example, the tokens of the model's own words before what it should say.
        kept_weight: how much the prompts that should stay count.
        apart: texts that are not about the subject, at no token of which a change should act.
    """

    examples: tuple[Located, ...]
    kept: tuple[Located, ...] = ()
    mentions: tuple[Located, ...] = ()
    lookalikes: tuple[Located, ...] = ()
    near: frozenset[str] = frozenset()
    openings: tuple[int, ...] = ()
    kept_weight: float = 1.0
    apart: tuple[Example, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of prompts of either kind; subjects that go through a model together have the same."""
        return len(self.examples), len(self.kept)


def random_beginnings(text: Sequence[str], count: int, seed: int) -> list[str]:
    """Draw stretches of some words from passages, as beginnings of prompts that have nothing to do with them."""
    rng = random.Random(f"{seed} beginnings")
    passages = [words for passage in text if (words := passage.split())]
    beginnings = []
    for _ in range(count if passages else 0):
        words = rng.choice(passages)
        length = rng.randint(*BEGINNING_WORDS)
        start = rng.randrange(max(1, len(words) - length + 1))
        beginnings.append(" ".join(words[start : start + length]).rstrip(".,;:!?") + ".")
    return beginnings


def phrasings_of(request: EditRequest, prompts: Sequence[Prompt]) -> list[EditRequest]:
    """Return a request in other words: the same target for other prompts."""
    return [request.model_copy(update={"prompt": prompt, "given_paraphrases": ()}) for prompt in prompts]


def encode_contexts(
    task: Task,
    request: EditRequest,
    beginnings: Sequence[str],
    kept: Sequence[Prompt] = (),
    phrasings: Sequence[EditRequest] | None = None,
) -> PromptContexts:
    """Encode a request with its phrasings, each by itself and behind beginnings, and locate its subject.

    A classifier judges all of its text, so it reads no random beginnings. Where a beginning does not fit into the
    context, the prompt by itself takes its place, because requests that are fitted together need as many examples.

    Args:
        task: the model.
        request: the request.
        beginnings: texts to put before the prompt, or before one of those in turn.
        kept: prompts about the subject after which the next token should stay.
        phrasings: the request in other words, each with its own target and name of the subject; by default its given
            paraphrases.

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
        request = request.model_copy(update={"subject": subject})
        if phrasings is None:
            phrasings = phrasings_of(request, request.given_paraphrases)
        asked = [request, *phrasings]
        behind = [
            _with_beginning(beginning, asked[number % len(asked)].prompt)
            for number, beginning in enumerate(beginnings if task.generates else ())
        ]
        task.choose_answer_forms([*(each.prompt for each in asked), *behind])  # together, in few passes
        located = [located_subject(task, each.prompt, str(each.subject), each.target) for each in asked]
        openings = [_opening(task, each) for each in asked]
        for number, prompt in enumerate(behind):
            own = number % len(asked)
            try:
                located.append(located_subject(task, prompt, str(asked[own].subject), asked[own].target))
            except RequestError:  # too long: by itself the prompt is valid, so nothing else can be wrong
                located.append(located[own])
            openings.append(openings[own])
        others = [located_subject(task, prompt, subject) for prompt in kept]
    return PromptContexts(tuple(located), tuple(others), openings=tuple(openings))


def _opening(task: Task, request: EditRequest) -> int:
    """Return the number of a target's tokens before the words that a user gave, where the model's own stand around."""
    given = (request.model_extra or {}).get(TARGET_AS_GIVEN)
    if not isinstance(given, str) or given not in request.target:
        return 0
    beginning = request.target[: request.target.index(given)].rstrip()
    if not beginning:
        return 0
    both = (task.encode(request.prompt, text).target for text in (request.target, beginning))
    pairs = enumerate(zip(*both, strict=False))
    return next((place for place, (token, other) in pairs if token != other), 0)


def join_contexts(parts: Sequence[PromptContexts]) -> PromptContexts:
    """Return the contexts of several requests about one subject as those of one.

    What one of them should keep is not kept where another one changes it.
    """
    asked_by_all = set(parts[0].kept).intersection(*(part.kept for part in parts))
    return PromptContexts(
        tuple(located for part in parts for located in part.examples),
        tuple(located for located in parts[0].kept if located in asked_by_all),
        parts[0].mentions,
        tuple(located for part in parts for located in part.lookalikes),
        frozenset().union(*(part.near for part in parts)),
        tuple(length for part in parts for length in part.openings),
        min(part.kept_weight for part in parts),
        tuple(example for part in parts for example in part.apart),
    )


def located_subject(task: Task, prompt: Prompt, subject: str, target: str | None = None) -> Located:
    """Return a prompt with its target, or with an arbitrary one, and the position of the subject's last token."""
    example = Example(tuple(task.encode_input(prompt)), (0,)) if target is None else task.encode(prompt, target)
    return example, subject_position(task, prompt, subject, example)


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
