"""Perplexity of an ordinary text, which an edit should leave as it is: the text in windows, and the metric."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.low_rank_hooks import frozen
from remend.errors import ConfigError
from remend.evaluation.interventions import Intervention
from remend.evaluation.metrics.edit_outcome import VALUE, EditOutcome, PromptScore
from remend.tasks.base import Example, Task

WINDOW_LENGTH = 128
"""Tokens of one window of text, at most."""
WINDOWS_PER_BATCH = 32


def perplexity_drawdown(outcome: EditOutcome) -> Iterator[PromptScore]:
    """Score an edit by the perplexity that it adds, where a text was given to :func:`remend.evaluate`."""
    if outcome.text_perplexity is not None:
        before, after = outcome.text_perplexity
        yield PromptScore({VALUE: after - before})


class PerplexityText:
    """The first tokens of a text, in windows; each token but a window's first is predicted from those before it.

    Args:
        task: the base model.
        passages: the text.
        tokens: how many tokens, about.

    Attributes:
        tokens: how many tokens are predicted.
        perplexity: the base model's perplexity.

    Raises:
        ConfigError: the model is no causal language model, or the text is too short.
    """

    def __init__(self, task: Task, passages: Sequence[str], tokens: int) -> None:
        if not task.causal:
            raise ConfigError(
                f"perplexity on a text is defined for causal language models, and {type(task.model).__name__} is none: "
                "omit the text"
            )
        self.task = task
        length = min(WINDOW_LENGTH, task.context or WINDOW_LENGTH)
        ids = [token for passage in passages if passage.strip() for token in task.encode_input(passage)][:tokens]
        windows = [ids[start : start + length] for start in range(0, len(ids), length)]
        # A window of one token predicts nothing.
        self.windows = [Example(tuple(window[:1]), tuple(window[1:])) for window in windows if len(window) > 1]
        if not self.windows:
            raise ConfigError("the text to measure perplexity on has fewer than two tokens: give a longer one")
        self.tokens = sum(len(window.target) for window in self.windows)
        self.perplexity = self.measure(Intervention(task), 1)[0]

    @torch.no_grad()
    def measure(self, intervention: Intervention, requests: int) -> list[float]:
        """Return the perplexity after an intervention, for each of the requests that it tells apart."""
        # Requests whose edits act on their rows only share batches; each sees all windows.
        rows = [(number, window) for number in range(requests) for window in self.windows]
        log_probs: list[list[Tensor]] = [[] for _ in range(requests)]
        task = intervention.task
        with frozen(task.model):
            for start in range(0, len(rows), WINDOWS_PER_BATCH):
                numbers, windows = zip(*rows[start : start + WINDOWS_PER_BATCH], strict=True)
                with intervention.applied(numbers):
                    batch = task.collate(windows)
                    log_p = task.distribution.log_prob(task.outputs(batch), batch.target)
                lengths = [len(window.target) for window in windows]
                for number, of_window in zip(numbers, log_p.split(lengths), strict=True):
                    log_probs[number].append(of_window)
        return [perplexity(torch.cat(of_request)) for of_request in log_probs]


def perplexity(log_p: Float[Tensor, " token"]) -> float:
    """Return the exponential of the mean −log p of a text's tokens; the paper's measure for generation (section 5)."""
    # A ruined model would reach infinity; the bound keeps means over edits finite.
    return math.exp(min(-float(log_p.double().mean()), 80.0))
