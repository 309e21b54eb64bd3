"""How strongly an edit acts: chosen on its own requests' prompts and probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remend.edit import Edit
from remend.evaluation.interventions import SharedEdit
from remend.evaluation.metrics.measure import look
from remend.evaluation.metrics.scoring import Scorer
from remend.request import EditRequest
from remend.tasks import Task

SCALES = tuple(round(0.5 * 2 ** (step / 4), 3) for step in range(9))
"""0.5 to 2, in steps of a fourth of an octave."""

KEPT = ("locality_near", "locality_far")
UNASKED = ("unseen_paraphrases", "portability", "formats", "negated", "generation")
"""What a request has for evaluation alone: nothing is chosen by it."""


@dataclass(frozen=True)
class ScaledEdit:
    """What the requests' prompts and probes say about one scale, means over the requests.

    Attributes:
        scale: what the edit is multiplied with.
        taken: requests whose own prompt is answered with the whole target.
        reached: paraphrases that are (unseen ones are for evaluation, and not asked).
        kept: near and far probes that are answered as before; the mean of both shares.
    """

    scale: float
    taken: float
    reached: float
    kept: float

    @property
    def worth(self) -> tuple[float, float, float]:
        """What to compare: the prompts first, then both sides of the bargain, then how near the scale is to 1."""
        return self.taken, round(self.reached + self.kept, 9), -max(self.scale, 1 / self.scale)


def choose_scale(
    task: Task,
    edit: Edit,
    requests: Sequence[EditRequest],
    max_new_tokens: int = 32,
) -> tuple[ScaledEdit, list[ScaledEdit]]:
    """The best scale for an edit, and all that were tried (:data:`SCALES`).

    The best one lets the most requests' prompts take; among those, most paraphrases follow and most near and far
    probes stay; of equals, the one nearest to 1, what the editor was trained for. The result is as good as the probes
    it is chosen on: where no request names near ones, nothing says how far an edit may reach, and it is made no
    stronger than it is, unless its own prompts need that.

    Args:
        task: the base model.
        edit: the edit, as its editor made it.
        requests: what the edit is for, with their paraphrases and probes.
        max_new_tokens: how far the unedited model's own answers are decoded.
    """
    edit.base.check(task.model, "this edit")
    asked = [request.model_copy(update=dict.fromkeys(UNASKED, ())) for request in requests]
    judge = Scorer(task, asked, max_new_tokens)
    changes = [SharedEdit(task, edit.scaled(scale), free=False) for scale in SCALES]
    tried = []
    for scale, views in zip(SCALES, look(task, changes, [judge.questions(request) for request in asked]), strict=True):
        values = [
            {name: modes["generated"] for name, modes in judge.values(request, view).items() if "generated" in modes}
            for request, view in zip(asked, views, strict=True)
        ]
        tried.append(
            ScaledEdit(
                scale,
                taken=_mean([own["reliability"] for own in values]),
                reached=_mean([own.get("generality", 1.0) for own in values]),
                kept=_mean([_mean([own[name] for name in KEPT if name in own] or [1.0]) for own in values]),
            )
        )
    most = max(own.taken for own in tried)
    needed = min(own.scale for own in tried if own.taken == most)
    bounded = tried if any(request.near for request in requests) else [t for t in tried if t.scale <= max(1, needed)]
    return max(bounded, key=lambda own: own.worth), tried


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
