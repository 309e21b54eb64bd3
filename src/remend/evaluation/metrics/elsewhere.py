"""Metrics of an edit as a whole: on ordinary text (:mod:`remend.evaluation.ordinary_text`), and of its numbers."""

from __future__ import annotations

from collections.abc import Iterator

from remend.evaluation.metrics.edit_outcome import VALUE, EditOutcome, PromptScore


def elsewhere(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score an edit by the share of the model's choices that stay."""
    if outcome.elsewhere is not None:
        yield PromptScore({VALUE: outcome.elsewhere.stays.mean})


def kl_elsewhere(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score an edit by the divergence from the unedited model, in nats a choice."""
    if outcome.elsewhere is not None:
        yield PromptScore({VALUE: outcome.elsewhere.divergence.mean})


def perplexity_ratio(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score an edit by the edited model's perplexity over the unedited one's."""
    if outcome.elsewhere is not None and outcome.elsewhere.perplexity_ratio is not None:
        yield PromptScore({VALUE: outcome.elsewhere.perplexity_ratio.mean})


def perplexity_drawdown(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score an edit by the perplexity that it adds on a text that was given (MEND, section 5)."""
    found = outcome.elsewhere
    if found is not None and found.given and found.perplexity is not None and found.perplexity_ratio is not None:
        yield PromptScore({VALUE: found.perplexity * (found.perplexity_ratio.mean - 1)})


def readability(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score an edit by whether its numbers single out its subject (:mod:`remend.evaluation.readability`), 1 if so."""
    if outcome.singled_out is not None:
        yield PromptScore({VALUE: float(outcome.singled_out)})
