"""How well a model predicts an ordinary text: what an edit must not cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from remend.core.hooks import frozen
from remend.errors import ConfigError
from remend.evaluation.interventions import Intervention
from remend.evaluation.metrics.functions import log_probabilities, perplexity
from remend.tasks.base import Example, Task
from remend.tasks.causal_lm import CausalLM

WINDOW = 128
"""Tokens of one stretch of text, at most."""
ROWS_AT_ONCE = 32


class PerplexityText:
    """The first tokens of a text, in windows; each token but a window's first is predicted from those before it.

    Args:
        task: the base model.
        passages: the text.
        tokens: how many tokens, about.

    Raises:
        ConfigError: the model is no causal language model, or the text is too short.
    """

    def __init__(self, task: Task, passages: Sequence[str], tokens: int) -> None:
        if not isinstance(task, CausalLM):
            raise ConfigError(
                f"perplexity on a text is a causal language model's; {type(task.model).__name__} reads a text and "
                "answers: leave the text away"
            )
        self.task = task
        length = min(WINDOW, task.context or WINDOW)
        ids = [token for passage in passages if passage.strip() for token in task.encode_input(passage)][:tokens]
        windows = [ids[start : start + length] for start in range(0, len(ids), length)]
        self.windows = [Example(tuple(own[:1]), tuple(own[1:])) for own in windows if len(own) > 1]
        if not self.windows:
            raise ConfigError("the text to measure perplexity on holds less than two tokens: name a longer one")
        self.tokens = sum(len(pair.target) for pair in self.windows)
        self.perplexity = self.after(Intervention(task), 1)[0]

    @torch.no_grad()
    def after(self, change: Intervention, requests: int) -> list[float]:
        """The text's perplexity after a change, for each of the requests that it tells apart."""
        rows = [(number, pair) for number in range(requests) for pair in self.windows]
        found: list[list[Tensor]] = [[] for _ in range(requests)]
        with frozen(change.task.model):
            for start in range(0, len(rows), ROWS_AT_ONCE):
                chunk = rows[start : start + ROWS_AT_ONCE]
                with change.acting([number for number, _ in chunk]):
                    batch = change.task.collate([pair for _, pair in chunk])
                    log_p = log_probabilities(change.task.outputs(batch), batch.target)
                for (number, _), own in zip(chunk, log_p.split([len(pair.target) for _, pair in chunk]), strict=True):
                    found[number].append(own)
        return [perplexity(torch.cat(own)) for own in found]
