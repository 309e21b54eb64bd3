"""Metrics of free continuations: how varied they are, and how much they repeat themselves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from remend.evaluation.metrics.edit_outcome import VALUE, EditOutcome, PromptScore
from remend.tasks.base import Answer


def fluency(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each free continuation by the entropy of its n-grams."""
    return (PromptScore({VALUE: ngram_entropy(tokens)}) for tokens in _continuations(outcome))


def repetition(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each free continuation by the share of its trigrams that are repeated."""
    return (PromptScore({VALUE: repeated_trigrams(tokens)}) for tokens in _continuations(outcome))


def ngram_entropy(tokens: Sequence[int]) -> float:
    """Return the entropy in bits of a text's bigrams and trigrams, weighted 2/3 and 4/3 and halved.

    ROME's fluency (Meng et al., 2022, section 3.4 and appendix): 0 for one token again and again, and 0 for a text of
    fewer than three tokens.
    """
    return (2 / 3 * _entropy(_ngrams(tokens, 2)) + 4 / 3 * _entropy(_ngrams(tokens, 3))) / 2


def repeated_trigrams(tokens: Sequence[int]) -> float:
    """Return the share of a text's trigrams that occurred in it before; 0 if all differ (Welleck et al., 2019)."""
    trigrams = _ngrams(tokens, 3)
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def _continuations(outcome: EditOutcome) -> Iterator[Answer]:
    """Return the free continuations, without their end tokens, of the prompts that could be continued."""
    answers = (outcome.answer(prompt) for prompt in outcome.request.generation)
    return (answer[: outcome.body_length(answer)] for answer in answers if answer is not None)


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def _entropy(items: Sequence[tuple[int, ...]]) -> float:
    total = len(items)
    return -sum(count / total * math.log2(count / total) for count in Counter(items).values()) if total else 0.0
