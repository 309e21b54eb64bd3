"""Metrics of what an edit should change: its prompt, other phrasings and forms of it, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from remend.evaluation.metrics.edit_outcome import VALUE, EditOutcome, PromptScore, kind_of, prompt_form
from remend.evaluation.metrics.word_overlap import contains
from remend.request import Prompt


def reliability(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score the prompt: whether it is answered with the target."""
    return _target_given(outcome, [outcome.request.prompt])


def generality(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each paraphrase: whether it is answered with the target."""
    return _target_given(outcome, outcome.request.paraphrases)


def generality_unseen(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each paraphrase that is kept for evaluation: whether it is answered with the target."""
    return _target_given(outcome, outcome.request.unseen_paraphrases)


def edit_success(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score the prompt and its paraphrases together (paper, Eq. 1)."""
    return _target_given(outcome, [outcome.request.prompt, *outcome.request.paraphrases])


def format_shift(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score the same request in other forms; the kinds are the forms."""
    for prompt in outcome.request.formats:
        yield PromptScore(outcome.correctness(outcome.query(prompt)), prompt_form(prompt))


def portability(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each prompt whose answer follows from the edit, by the kinds that the request names."""
    for probe in outcome.request.portability:
        yield PromptScore(outcome.correctness(outcome.probe_query(probe)), kind_of(probe))


def portability_negated(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each prompt that denies the fact: 1 where it is not answered with the target."""
    for prompt in outcome.request.negated:
        if (answer := outcome.answer(prompt)) is not None:
            yield PromptScore({VALUE: 1 - contains(outcome.task.decode(answer), outcome.request.target)})


def _target_given(outcome: EditOutcome, prompts: Iterable[Prompt]) -> Iterator[PromptScore]:
    return (PromptScore(outcome.correctness(outcome.query(prompt))) for prompt in prompts)
