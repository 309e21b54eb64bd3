"""Metrics of what an edit must leave alone: unrelated prompts, related ones, and those with the edit before them."""

from __future__ import annotations

from collections.abc import Iterator

from remend.evaluation.metrics.edit_outcome import VALUE, EditOutcome, ModeScores, PromptScore, kind_of
from remend.evaluation.metrics.query_measurements import body_length
from remend.request import Probe, Prompt


def locality_far(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each unrelated prompt: whether its answer is the unedited model's."""
    for probe in outcome.request.locality:
        yield PromptScore(outcome.unchanged(probe.prompt, outcome.probe_query(probe)))


def locality_near(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each related prompt that must stay, by the kinds that the request names."""
    for probe in outcome.request.near:
        yield PromptScore(outcome.unchanged(probe.prompt, outcome.probe_query(probe)), kind_of(probe))


def locality_adversarial(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each unrelated prompt with the edit put before it (:meth:`EditOutcome.adversarial_prompts`)."""
    for prompt in outcome.adversarial_prompts():
        yield PromptScore(outcome.unchanged(prompt, outcome.base_query(prompt)))


def kl_far(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each unrelated prompt by the divergence along the unedited model's answer."""
    return (_divergence(outcome, probe.prompt) for probe in outcome.request.locality)


def kl_near(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each related prompt by the divergence along the unedited model's answer, by kind."""
    return (_divergence(outcome, probe.prompt, kind_of(probe)) for probe in outcome.request.near)


def kl_adversarial(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each unrelated prompt with the edit put before it by the divergence along the unedited model's answer."""
    return (_divergence(outcome, prompt) for prompt in outcome.adversarial_prompts())


def accuracy_drawdown(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score each unrelated prompt: 1 where its true answer was given before the edit only, −1 where after it only."""
    return (PromptScore(_accuracy_lost(outcome, probe)) for probe in outcome.request.locality)


def _divergence(outcome: EditOutcome, prompt: Prompt, kind: str = "") -> PromptScore:
    measurement = outcome.measurement(outcome.base_query(prompt))
    return PromptScore({} if measurement is None else {VALUE: measurement.divergence}, kind)


def _accuracy_lost(outcome: EditOutcome, probe: Probe) -> ModeScores:
    query = outcome.probe_query(probe)
    measurement = outcome.measurement(query)
    if measurement is None:
        return {}
    body = body_length(outcome.task, query.expected)
    forced = float(all(measurement.correct_before[:body])) - float(all(measurement.correct[:body]))
    answer = outcome.answer(probe.prompt)
    if answer is not None:
        before, after = (outcome.matches(query, candidate) for candidate in (outcome.base_answer(probe.prompt), answer))
    else:
        before, after = (float(all(correct)) for correct in (measurement.correct_before, measurement.correct))
    return {"teacher_forced": forced, "generated": before - after}
