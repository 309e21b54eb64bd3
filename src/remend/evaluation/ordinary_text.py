"""``OrdinaryText``: how much of what a model does on ordinary text an edit changes, where it should change nothing.

The one definition of it: evaluations, acceptance checks, ``remend edit`` and the studio all measure it here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from remend.core.low_rank_hooks import frozen
from remend.errors import ConfigError
from remend.evaluation.interventions import Intervention
from remend.evaluation.summary import Summary
from remend.evaluation.unit_answers import rows_acted_on
from remend.tasks.base import Batch, Example, Task
from remend.tasks.kept_texts import log_p_or_kept, sampled_or_kept
from remend.tasks.ordinary_inputs import SAMPLED_TOKENS

TEXT_TOKENS = 1_024
"""Tokens of ordinary text at most, by default: 42 texts of the model's own, or 16 windows of a given text."""
TEXT_WINDOW = 64
"""Tokens of a window of a given text, at most: an interval over texts needs several."""
TEXT_SEED = 2**31 - 1
"""The seed of what is drawn: no editor's, which would be tested on the text that it was fitted to."""
TEXTS_PER_BATCH = 16
STORED_OUTPUTS = 2**26
"""Numbers of the unedited model's outputs that are kept between edits; what is beyond is computed again."""
MAX_LOG_PERPLEXITY = 80.0
"""A bound on −log p: a ruined model would reach infinity, and no mean over edits would be finite."""


@dataclass(frozen=True)
class Elsewhere:
    """What an edit changes on ordinary text; each mean is over all choices, with its interval over texts.

    Attributes:
        given: whether the text was given, and not the model's own.
        texts: the number of texts, or of other inputs.
        choices: the number of choices that the model makes there: after every token, or one for each input.
        stays: the share of the model's choices that stay.
        divergence: KL(unedited ‖ edited), in nats a choice.
        perplexity: the unedited model's perplexity; None of models that do not continue text.
        perplexity_ratio: the edited model's perplexity over the unedited one's.
    """

    given: bool
    texts: int
    choices: int
    stays: Summary
    divergence: Summary
    perplexity: float | None = None
    perplexity_ratio: Summary | None = None

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % intervals over texts, by the names of the metrics in reports."""
        named = {"elsewhere": self.stays, "kl_elsewhere": self.divergence, "perplexity_ratio": self.perplexity_ratio}
        return {name: summary.ci95 for name, summary in named.items() if summary is not None}

    @property
    def description(self) -> str:
        """All of it in words."""
        low, high = self.stays.ci95
        text = "the given" if self.given else "ordinary"
        ratio = "" if self.perplexity_ratio is None else f", perplexity × {self.perplexity_ratio.mean:.3f}"
        return (
            f"{self.stays.mean:.1%} of the model's {self.choices} choices on {text} text stayed (95 %: {low:.1%} to "
            f"{high:.1%}), with a divergence of {self.divergence.mean:.3f} nats{ratio}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the values as a JSON object."""
        return asdict(self)


class OrdinaryText:
    """Ordinary text, or other ordinary inputs, and what the unedited model does there.

    Args:
        task: the unedited model.
        passages: the text; by default what the model writes by itself (of models that do not write: random inputs).
        tokens: how many tokens of it, at most.
        keep: whether what the model writes, and its perplexity there, is kept on disk for later runs
            (:mod:`remend.disk_cache`).

    Attributes:
        examples: the inputs; of causal models, the first token of each text with the others as targets.
        given: whether a text was given.

    Raises:
        ConfigError: the text holds no two tokens, or this kind of model reads none.
        NonFiniteError: the model's outputs are not finite.
    """

    def __init__(self, task: Task, passages: Sequence[str] = (), tokens: int = TEXT_TOKENS, keep: bool = False) -> None:
        self.task, self.given, self.keep = task, bool(passages), keep and not passages
        count = max(1, tokens // SAMPLED_TOKENS)
        if self.keep:
            drawn = sampled_or_kept(task, TEXT_SEED, count)
        else:
            drawn = task.ordinary_examples(passages, TEXT_SEED, count)
        if task.causal:  # it makes a choice after every token, and each of them is compared
            windows = [example.input[:TEXT_WINDOW] for example in drawn]
            drawn = [Example(window[:1], window[1:]) for window in windows if len(window) > 1]
        self.examples: list[Example] = []
        room = tokens
        for example in drawn:
            room -= task.context_length(example)
            if self.examples and room < 0:
                break
            self.examples.append(example)
        if not self.examples:
            where = "the text" if passages else "what the model writes by itself"
            raise ConfigError(f"{where} has no two tokens to measure an edit on: give a longer text")
        self._stored: dict[int, Tensor] = {}

    @property
    def choices(self) -> int:
        """The number of choices that the model makes."""
        return sum(len(example.target) for example in self.examples)

    @cached_property
    def perplexity(self) -> float | None:
        """The unedited model's perplexity; None of models that do not continue text."""
        return _exp(-float(self._log_p.sum() / self.choices)) if self.task.causal else None

    @cached_property
    def _log_p(self) -> Float[Tensor, " text"]:
        """The sum of the unedited model's log p of each text's tokens, which is kept on disk where texts are."""
        return log_p_or_kept(self.task, self.examples, self._measure_log_p) if self.keep else self._measure_log_p()

    @torch.no_grad()
    def _measure_log_p(self) -> Float[Tensor, " text"]:
        sums = torch.zeros(len(self.examples), dtype=torch.float64)
        for start, batch in self._batches(self.task):
            log_p = self.task.distribution.log_prob(self._before(start, batch), batch.target)
            sums.index_add_(0, start + batch.row.cpu(), log_p.double().cpu())
        return sums

    @property
    def description(self) -> Mapping[str, float]:
        """The numbers of texts and choices and, of causal models, the perplexity before any edit, for reports."""
        counts = {"texts": float(len(self.examples)), "tokens": float(self.choices), "given": float(self.given)}
        return counts if self.perplexity is None else {**counts, "perplexity": self.perplexity}

    @torch.no_grad()
    def measure(self, intervention: Intervention, requests: int = 1) -> list[Elsewhere]:
        """Return what an intervention changes, for each of the requests that it tells apart."""
        distribution, task = self.task.distribution, intervention.task
        lengths = torch.tensor([len(example.target) for example in self.examples])
        # Sums over the choices of each text: those that stay, the divergence, log p before and after.
        sums = torch.zeros(requests, 4, len(lengths), dtype=torch.float64)
        for start, batch in self._batches(task):
            of_batch = self.examples[start : start + batch.rows]
            for number, acted_on in enumerate(rows_acted_on(intervention, of_batch, requests)):
                texts, others = (start + rows.nonzero()[:, 0] for rows in (acted_on, ~acted_on))
                if len(others):
                    sums[number, 0, others] = lengths[others].double()
                    if task.causal:
                        sums[number, 2:, others] = self._log_p[others]
                if not len(texts):
                    continue
                # Texts alone are run anew without the edit, too: rounding depends on what is computed together.
                part = task.collate([self.examples[text] for text in texts]) if len(others) else batch
                before = self._run(part) if len(others) else self._before(start, batch)
                target, each = part.target.to(before.device), torch.arange(len(part.row), device=before.device)
                with frozen(task.model), intervention.applied([number] * part.rows):
                    after = task.outputs(part).to(before.device)
                columns = [
                    distribution.unchanged(before, after),
                    distribution.divergence(before, after, each, len(each)),
                ]
                if task.causal:
                    columns += [distribution.log_prob(outputs, target) for outputs in (before, after)]
                values = torch.stack([column.double().cpu() for column in columns])
                sums[number, : len(values)].index_add_(1, texts[part.row.cpu()], values)
        return [self._summarize(of_request, lengths) for of_request in sums]

    def _batches(self, task: Task) -> list[tuple[int, Batch]]:
        """Return the batches of inputs, each with the number of its first one."""
        starts = range(0, len(self.examples), TEXTS_PER_BATCH)
        return [(start, task.collate(self.examples[start : start + TEXTS_PER_BATCH])) for start in starts]

    def _before(self, start: int, batch: Batch) -> Float[Tensor, "target output"]:
        """Return the unedited model's outputs at a batch, which are computed once as far as there is room for them."""
        if start in self._stored:
            return self._stored[start]
        outputs = self._run(batch)
        if sum(stored.numel() for stored in self._stored.values()) + outputs.numel() <= STORED_OUTPUTS:
            self._stored[start] = outputs
        return outputs

    def _run(self, batch: Batch) -> Float[Tensor, "target output"]:
        with frozen(self.task.model):
            return self.task.outputs(batch)

    def _summarize(self, sums: Float[Tensor, "4 text"], lengths: Int[Tensor, " text"]) -> Elsewhere:
        """Return the means over all choices of some sums over the choices of each text."""
        stays, divergence, log_ratio = (
            Summary.of((values / lengths).tolist(), weights=lengths.tolist())
            for values in (sums[0], sums[1], sums[2] - sums[3])
        )
        perplexity = ratio = None
        if self.task.causal:
            low, high = map(_exp, log_ratio.ci95)
            perplexity = _exp(-float(sums[2].sum() / lengths.sum()))
            ratio = Summary(_exp(log_ratio.mean), (low, high), log_ratio.n)
        return Elsewhere(self.given, len(lengths), int(lengths.sum()), stays, divergence, perplexity, ratio)


def _exp(log_perplexity: float) -> float:
    return math.exp(min(log_perplexity, MAX_LOG_PERPLEXITY))
