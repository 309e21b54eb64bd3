"""Where a request's prompt names its subject, and in what contexts the model reads the subject for an edit."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from remend.errors import RequestError, prefix_request_errors
from remend.request import Chat, EditRequest, Prompt, TextPair
from remend.tasks.base import Example, Task
from remend.tasks.generative import GenerativeTask

WORDS = (3, 8)
"""How many words of a passage a random beginning takes: at least and at most."""


@dataclass(frozen=True)
class Reading:
    """One request as the model reads it: by itself, and behind random beginnings.

    Attributes:
        pairs: the prompt with its target, first by itself. Every request has as many.
        places: in each of them, which token of the prompt is the subject's last.
        about: the subject alone, of a causal model, whose next token shows what the model takes it to be; or None.
    """

    pairs: tuple[Example, ...]
    places: tuple[int, ...]
    about: Example | None = None

    @property
    def all_pairs(self) -> tuple[Example, ...]:
        """The pairs and, where there is one, the subject alone."""
        return self.pairs if self.about is None else (*self.pairs, self.about)

    @property
    def all_places(self) -> tuple[int, ...]:
        """The places in :attr:`all_pairs`; alone, the subject's last token is the prompt's."""
        return self.places if self.about is None else (*self.places, len(self.about.input) - 1)


def beginnings(text: Sequence[str], count: int, seed: int) -> list[str]:
    """Random stretches of some words from passages, as beginnings of prompts that have nothing to do with them."""
    draw = random.Random(f"{seed} beginnings")
    passages = [words for passage in text if (words := passage.split())]
    found = []
    for _ in range(count):
        words = draw.choice(passages)
        length = draw.randint(*WORDS)
        start = draw.randrange(max(1, len(words) - length + 1))
        found.append(" ".join(words[start : start + length]).rstrip(".,;:!?") + ".")
    return found


def reading(task: Task, request: EditRequest, begun: Sequence[str]) -> Reading:
    """A request with its subject found, by itself and behind each of ``begun``.

    A classifier judges all of its text, so it reads no random beginnings; where one leaves no room in the context, the
    prompt by itself stands in.

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
        first = task.encode(request.prompt, request.target)
        found = [(first, subject_place(task, request.prompt, subject, first))]
        for beginning in begun if isinstance(task, GenerativeTask) else ():
            prompt = _behind(beginning, request.prompt)
            try:
                pair = task.encode(prompt, request.target)
            except RequestError:  # no room: by itself it fits, so nothing else can be wrong
                found.append(found[0])
            else:
                found.append((pair, subject_place(task, prompt, subject, pair)))
        causal = isinstance(task, GenerativeTask) and not task.model.config.is_encoder_decoder
        about = Example(tuple(task.encode_input(subject)), (0,)) if causal else None
    return Reading(tuple(pair for pair, _ in found), tuple(place for _, place in found), about)


def subject_place(task: Task, prompt: Prompt, subject: str, pair: Example) -> int:
    """Which token of a pair's prompt is the last of the subject, where the prompt names it last.

    Raises:
        RequestError: the prompt does not hold the subject.
    """
    texts, framed = _texts(task, prompt)
    spans = [(number, span) for number, text in enumerate(texts) for span in _spans(text, subject)]
    if not spans:
        raise RequestError(
            f"the prompt {str(prompt)[:60]!r} does not hold its subject {subject!r}: give the subject as the prompt "
            "writes it"
        )
    number, span = spans[-1]
    place = (_by_offsets if task.processor.is_fast else _by_beginning)(task.processor, texts, framed, number, span)
    # A beginning token that both a tokenizer and its chat template write stands in the pair only once.
    ids = _ids(task.processor, texts, framed)
    return place if tuple(ids[: len(pair.input)]) == pair.input else place - 1


def _behind(beginning: str, prompt: Prompt) -> Prompt:
    """A prompt behind a random beginning; in a conversation, its last message."""
    if isinstance(prompt, Chat):
        return prompt.asking(f"{beginning} {prompt.messages[-1].content}")
    assert isinstance(prompt, str), "tokenising refused a pair of texts"
    return f"{beginning} {prompt}"


def _texts(task: Task, prompt: Prompt) -> tuple[list[str], bool]:
    """What the tokenizer is given for a prompt, and whether it puts its own tokens around that."""
    if isinstance(prompt, TextPair):
        return [prompt.first.strip(), prompt.second.strip()], True
    if isinstance(prompt, Chat):
        assert isinstance(task, GenerativeTask), "tokenising refused it"
        return [task.chat.opening(prompt)[0]], False
    assert isinstance(prompt, str), "encoding refused it"
    return [prompt.strip(" " if task.generates else None)], True


def _spans(text: str, subject: str) -> list[tuple[int, int]]:
    """Where a text holds a subject: as it is written or, failing that, in other cases."""
    for flags in (0, re.IGNORECASE):
        if found := [match.span() for match in re.finditer(re.escape(subject), text, flags)]:
            return found
    return []


def _by_offsets(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], framed: bool, number: int, span: tuple[int, int]
) -> int:
    """The last token that covers some of a span of one of the texts."""
    encoded = tokenizer(*texts, add_special_tokens=framed, return_offsets_mapping=True, verbose=False)
    whose = encoded.sequence_ids(0)
    covering = [
        place
        for place, (start, end) in enumerate(encoded["offset_mapping"])
        if whose[place] == number and start < span[1] and end > span[0] and start < end
    ]
    if not covering:
        raise RequestError("the tokenizer knows no token of its subject: give another part of the prompt as subject")
    return covering[-1]


def _by_beginning(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], framed: bool, number: int, span: tuple[int, int]
) -> int:
    """The last token that the texts and their beginning up to the end of a span have in common.

    For tokenizers that tell no offsets. Where the token after the common ones begins within the span, it covers the
    span's end together with what follows, and is the last.
    """
    whole, begun = _ids(tokenizer, texts, framed), _ids(tokenizer, [*texts[:number], texts[number][: span[1]]], framed)
    while begun and begun[-1] in tokenizer.all_special_ids:  # the end of a text
        begun.pop()
    common = next((place for place, (a, b) in enumerate(zip(whole, begun, strict=False)) if a != b), len(begun))
    return min(common, len(begun) - 1)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], framed: bool) -> list[int]:
    return list(tokenizer(*texts, add_special_tokens=framed, verbose=False).input_ids)
