"""``choose_strength``: the factor by which an edit is best multiplied, chosen on its requests' prompts and probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from remend.edit import Edit
from remend.evaluation.interventions import SharedEdit
from remend.evaluation.metrics.query_measurements import measure
from remend.evaluation.metrics.scorer import Scorer
from remend.request import EditRequest
from remend.tasks import Task

CANDIDATE_STRENGTHS = tuple(round(0.5 * 2 ** (step / 4), 3) for step in range(9))
"""0.5 to 2, in steps of a fourth of an octave."""

LOCALITY_METRICS = ("locality_near", "locality_far")
EVALUATION_ONLY = ("unseen_paraphrases", "portability", "outdated", "formats", "negated", "generation")
"""Fields of a request that are kept for evaluation, so nothing is chosen by them."""


@dataclass(frozen=True)
class StrengthScores:
    """The metrics of an edit at one strength, means over its requests.

    Attributes:
        strength: the factor that the edit is multiplied with.
        reliability: the share of requests whose prompt is answered with the whole target.
        generality: the share of paraphrases that are.
        locality: the share of near and far probes that are answered as before; the mean of both shares.
    """

    strength: float
    reliability: float
    generality: float
    locality: float

    @property
    def sort_key(self) -> tuple[float, float, float]:
        """The order of strengths: reliability first, then generality and locality, then the distance from 1."""
        # Rounded, so that sums that differ in the last bits only count as equal.
        return (
            self.reliability, round(self.generality + self.locality, 9), -max(self.strength, 1 / self.strength)
        )  # fmt: skip


def choose_strength(
    task: Task,
    edit: Edit,
    requests: Sequence[EditRequest],
    max_new_tokens: int = 32,
) -> tuple[StrengthScores, list[StrengthScores]]:
    """Return the best strength for an edit, and all that were tried (:data:`CANDIDATE_STRENGTHS`).

    The best strength has the highest reliability; of those, the highest sum of generality and locality; of equals, it
    is the one nearest to 1, for which the editor was trained. The choice is as good as the probes: where no request has
    near ones, nothing says how far an edit reaches, and it is not made stronger than 1 unless its prompts need that.

    Args:
        task: the base model.
        edit: the edit, as its editor made it.
        requests: what the edit is for, with their paraphrases and probes.
        max_new_tokens: the longest answer of the unedited model.
    """
    edit.base.check(task.model, "this edit")
    # Choosing by what is kept for evaluation would make an evaluation of the result worthless.
    requests = [request.model_copy(update=dict.fromkeys(EVALUATION_ONLY, ())) for request in requests]
    scorer = Scorer(task, requests, max_new_tokens, ("reliability", "generality", *LOCALITY_METRICS))
    # No free answers: whether an answer is the expected one is known without decoding it.
    interventions = [SharedEdit(task, edit.scaled(strength), decode_answers=False) for strength in CANDIDATE_STRENGTHS]
    measured = measure(task, interventions, [scorer.queries(request) for request in requests])
    tried = []
    for strength, by_request in zip(CANDIDATE_STRENGTHS, measured, strict=True):
        values = [
            {
                name: modes["generated"]
                for name, modes in scorer.values(request, measurements).items()
                if "generated" in modes
            }
            for request, measurements in zip(requests, by_request, strict=True)
        ]
        tried.append(_scores(strength, values))
    highest = max(scores.reliability for scores in tried)
    needed = min(scores.strength for scores in tried if scores.reliability == highest)
    if any(request.near for request in requests):
        allowed = tried
    else:
        allowed = [scores for scores in tried if scores.strength <= max(1, needed)]
    return max(allowed, key=lambda scores: scores.sort_key), tried


def _scores(strength: float, values: Sequence[Mapping[str, float]]) -> StrengthScores:
    """Average the metrics of all requests; what a request has no prompts for counts as perfect."""
    localities = [[metrics[name] for name in LOCALITY_METRICS if name in metrics] for metrics in values]
    return StrengthScores(
        strength,
        reliability=_mean([metrics["reliability"] for metrics in values]),
        generality=_mean([metrics.get("generality", 1.0) for metrics in values]),
        locality=_mean([_mean(shares or [1.0]) for shares in localities]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
