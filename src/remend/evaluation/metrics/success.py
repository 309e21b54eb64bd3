"""Metrics of what an edit should change: its prompt, other phrasings and forms of it, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from remend.evaluation.metrics.edit_outcome import VALUE, EditOutcome, PromptScore, kind_of, prompt_form
from remend.evaluation.metrics.word_overlap import contains
from remend.request import Prompt

SUBJECT_REPLACED = ("same_object", "same_relation", "same_answer")
"""The kinds of near prompts that ask the same about another subject."""

PAIR_MODES = ("generated", "teacher_forced")


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


def negated_before(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score how the unedited model answers each prompt that denies the fact: 1 where not as it answers the prompt.

    What ``portability_negated`` is to be compared with: a model that does not understand denial says so itself.
    """
    old = outcome.task.decode(outcome.base_query(outcome.request.prompt).expected)
    for prompt in outcome.request.negated:
        yield PromptScore({VALUE: 1 - contains(outcome.task.decode(outcome.base_answer(prompt)), old)})


def outdated(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each prompt that the old fact answered: 1 where its answer does not hold that any more, by kind."""
    for probe in outcome.request.outdated:
        if (answer := outcome.answer(probe.prompt)) is not None:
            yield PromptScore({VALUE: 1 - contains(outcome.task.decode(answer), probe.target)}, kind_of(probe))


def pair_consistency(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score the prompt and the same about another subject together: 1 where both are answered rightly.

    Changing the subject is the least change of a prompt that changes its right answer (Kaushik et al., ICLR 2020).
    """
    edited = outcome.correctness(outcome.target_query)
    for probe in outcome.request.near:
        if kind_of(probe) in SUBJECT_REPLACED:
            kept = outcome.unchanged(probe.prompt, outcome.probe_query(probe))
            yield PromptScore(
                {mode: edited[mode] * kept[mode] for mode in PAIR_MODES if mode in edited and mode in kept}
            )


def _target_given(outcome: EditOutcome, prompts: Iterable[Prompt]) -> Iterator[PromptScore]:
    return (PromptScore(outcome.correctness(outcome.query(prompt))) for prompt in prompts)
