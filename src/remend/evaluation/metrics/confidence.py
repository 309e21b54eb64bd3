"""Metrics of how sure the edited model is of the target, and of how sensibly it goes on after it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from remend.evaluation.metrics.edit_outcome import VALUE, EditOutcome, PromptScore


def target_probability(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score the prompt by the probability of the whole target (of a continuous one, its density)."""
    if (measurement := outcome.measurement(outcome.target_query)) is not None:
        yield PromptScore({VALUE: math.exp(measurement.log_p)})


def target_rank(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score the prompt by the rank of the target's first token among all tokens, 1 for the most probable."""
    measurement = outcome.measurement(outcome.target_query)
    if measurement is not None and measurement.rank is not None:
        yield PromptScore({VALUE: float(measurement.rank)})


def continuation_perplexity(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score the prompt by the perplexity of what follows the target, where the model does not end its answers."""
    answer = outcome.answer(outcome.request.prompt)
    if answer is not None and (continuation := outcome.continuation(outcome.target_query, answer)) is not None:
        yield PromptScore({VALUE: continuation.perplexity})
