"""Find the subject of a prompt that names none: the part whose replacement changes the model's answer most."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from remend.core.low_rank_hooks import frozen
from remend.errors import RequestError
from remend.request import Chat, Prompt, TextPair
from remend.tasks.base import Example, Task, in_batches

LONGEST = 6
"""The most words of a subject that is found."""

LAST_WORDS = 64
"""Words at the end of a prompt that alone are read to find its subject: what a long prompt asks, it asks at the end."""

PLACEHOLDER = "it"
"""What takes the place of a candidate."""


@torch.no_grad()
def find_subject(task: Task, prompt: Prompt) -> str:
    """Return the part of a prompt that it is about.

    Of the names in it (words that begin with a capital letter or a digit, with what stands between them), or of all its
    parts where there is no name, it is the one without which the answer's distribution changes most.

    Raises:
        RequestError: the prompt holds no such part.
    """
    text = _end_of(_own_text(prompt))
    candidates = list(dict.fromkeys(_names(text))) or list(dict.fromkeys(_parts(text)))
    if not candidates:
        raise RequestError(f"the prompt {text[:60]!r} names nothing that an edit could be about: give subject=…")
    if len(candidates) == 1:
        return candidates[0]
    texts = [text, *(text.replace(candidate, PLACEHOLDER) for candidate in candidates)]
    prompts = [_with_text(prompt, changed) for changed in texts]
    examples = [Example(tuple(task.encode_input(changed)), (0,)) for changed in prompts]
    outputs = []
    with frozen(task.model):
        for part in in_batches(examples):
            outputs.append(task.outputs(task.collate(part)).float())
    answers = torch.cat(outputs).log_softmax(-1)
    divergence = (answers[0].exp() * (answers[0] - answers[1:])).sum(-1)
    return candidates[int(divergence.argmax())]


def _end_of(text: str) -> str:
    """Return the last words of a text."""
    words = list(re.finditer(r"\S+", text))
    return text[words[-LAST_WORDS].start() :] if len(words) > LAST_WORDS else text


def _own_text(prompt: Prompt) -> str:
    """Return the text in which the subject is looked for."""
    if isinstance(prompt, Chat):
        return prompt.messages[-1].content
    if isinstance(prompt, TextPair):
        return prompt.second
    return str(prompt)


def _with_text(prompt: Prompt, text: str) -> Prompt:
    """Return the prompt with another text in that place."""
    if isinstance(prompt, Chat):
        return prompt.with_last_message(text)
    if isinstance(prompt, TextPair):
        return TextPair(first=prompt.first, second=text)
    return text


def _names(text: str) -> Iterator[str]:
    """Yield the names in a text: runs of words that begin with a capital letter or a digit.

    Short words in lower case between two such words belong to a name ("Bay of Pigs"). The text's first word counts only
    together with the next one: it has a capital letter whatever it is.
    """
    word = r"[^\W_a-zà-öø-ÿ][^\s,;:!?\"]*"
    pattern = rf"{word}(?:\s+(?:(?:[a-zà-öø-ÿ]{{1,3}}\s+){{0,2}}{word}))*"
    for match in re.finditer(rf"(?<![\w'’-]){pattern}", text):
        name = _without_possessive(match.group())
        if match.start() == 0 and " " in name:
            yield name.partition(" ")[2]
        if name and name.lower() not in _OPENING_WORDS:
            yield name


_OPENING_WORDS = frozenset(
    (
        *(
            "the",
            "a",
            "an",
            "in",
            "on",
            "at",
            "of",
            "to",
            "how",
            "is",
            "are",
            "was",
            "were",
            "do",
            "does",
            "did",
            "can",
        ),
        *("what", "who", "whom", "whose", "which", "where", "when", "why"),
    )
)
"""Words that begin a sentence with a capital letter and are no name."""


def _without_possessive(name: str) -> str:
    return re.sub(r"['’]s$", "", name.rstrip(".,;:!?'\"’)"))


def _parts(text: str) -> Iterator[str]:
    """Yield all parts of a text of up to :data:`LONGEST` words, without the last word."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    for first in range(len(words)):
        for last in range(first, min(first + LONGEST, len(words) - 1)):
            part = _without_possessive(text[words[first][0] : words[last][1]])
            if part:
                yield part
