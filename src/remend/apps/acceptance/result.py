"""The verdict: an edit is tried, everything that was asked of it is measured, and it is taken off again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from remend.apps.acceptance.criteria import STANDARD, TEXT_TOKENS, AcceptanceCriteria
from remend.core.layers import is_quantized, weight_of
from remend.edit import AppliedEdit, Edit
from remend.errors import EditError
from remend.evaluation.before_after import AnswerComparison, ask, before_after
from remend.evaluation.interventions import Intervention
from remend.evaluation.metrics.perplexity import PerplexityText
from remend.evaluation.robustness import measure_robustness
from remend.fingerprint import find_modules
from remend.request import EditRequest, Probe
from remend.tasks import Task
from remend.tasks.causal_lm import CausalLM

KINDS = {
    "takes": "the requests' prompts get their answers",
    "changes": "what must change does",
    "follows": "paraphrases follow",
    "stays": "what must stay does",
    "near": "near prompts stay",
    "far": "far prompts stay",
    "elsewhere": "choices on other input stay",
    "perplexity": "an ordinary text is predicted as before",
    "size": "the change is small",
}


@dataclass(frozen=True)
class Check:
    """One thing that was asked of an edit.

    Attributes:
        name: which, among :data:`KINDS`.
        measured: a share, the perplexity as a multiple of the one before, or the largest ‖ΔW‖ / ‖W‖.
        bound: what it must be at least; of the last two, at most.
        ok: whether it is.
        count: of how many prompts, choices, tokens or matrices.
        failed: answers that are not what they should be.
    """

    name: str
    measured: float
    bound: float
    ok: bool
    count: int
    failed: tuple[AnswerComparison, ...] = ()

    @property
    def said(self) -> str:
        """What was found, in words."""
        if self.name == "perplexity":
            return f"{KINDS[self.name]}: {self.measured:.3f} times the perplexity (at most {self.bound:g})"
        if self.name == "size":
            return f"{KINDS[self.name]}: {self.measured:.3f} of the largest matrix's norm (at most {self.bound:g})"
        return f"{KINDS[self.name]}: {self.measured:.1%} of {self.count} (at least {self.bound:.0%})"


@dataclass(frozen=True)
class AcceptanceResult:
    """Everything that was measured of one edit.

    Attributes:
        checks: what was asked and could be measured.
        missing: what nothing was given for, so that nothing is known of it.
        unmet: what of that the acceptance asks for by name: it cannot have been met.
    """

    checks: tuple[Check, ...]
    missing: tuple[str, ...]
    unmet: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the edit may act."""
        return all(check.ok for check in self.checks) and not self.unmet

    @property
    def reasons(self) -> list[str]:
        """Why it may not, in words."""
        unmet = [f"{KINDS[name]}: asked, with nothing to measure it on" for name in self.unmet]
        return [check.said for check in self.checks if not check.ok] + unmet

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        checks = [asdict(check) for check in self.checks]
        return {"ok": self.ok, "checks": checks, "missing": list(self.missing), "unmet": list(self.unmet)}


class RejectedError(EditError):
    """An edit did not pass what was asked of it; nothing was left on the model.

    Attributes:
        verdict: what was measured.
    """

    def __init__(self, verdict: AcceptanceResult) -> None:
        super().__init__(f"the edit was not accepted and is off again: {'; '.join(verdict.reasons)}")
        self.verdict = verdict


def judge(
    task: Task,
    edit: Edit,
    acceptance: AcceptanceCriteria = STANDARD,
    beneath: Sequence[Edit] = (),
    max_new_tokens: int = 32,
    seed: int = 0,
) -> AcceptanceResult:
    """Try an edit on a model, measure what is asked of it, and take it off again.

    Args:
        task: the base model.
        edit: the edit, with its requests.
        acceptance: what is asked.
        beneath: edits that act already: what is before is the model with these.
        max_new_tokens: how far answers are decoded.
        seed: of the model's input of its own.

    Raises:
        WrongBaseError: the edit is of another model.
    """
    edit.base.check(task.model, "this edit")
    with ExitStack() as stack:
        for other in beneath:
            stack.enter_context(other.applied(task.model))
        answers = [a for own in before_after(task, edit, edit.requests, max_new_tokens) for a in own]
        of = {kind: [a for a in answers if a.kind == kind] for kind in ("prompt", "paraphrase", "near", "far")}
        wanted = [EditRequest(prompt=probe.prompt, target=probe.target) for probe in acceptance.must_change]
        changed = [own[0] for own in before_after(task, edit, wanted, max_new_tokens)]
        stayed = _stayed(task, edit, acceptance, max_new_tokens)
        found = [
            _share("takes", of["prompt"], acceptance.takes),
            _share("changes", changed, acceptance.takes),
            _share("follows", of["paraphrase"], acceptance.follows),
            _share("stays", stayed, acceptance.stays),
            _share("near", of["near"], acceptance.near),
            _share("far", of["far"], acceptance.far),
        ]
        other_input = measure_robustness(task, edit, edit.requests, seed=seed)
        kept = other_input.elsewhere
        found.append(Check("elsewhere", kept, acceptance.elsewhere, kept >= acceptance.elsewhere, other_input.choices))
        if acceptance.perplexity is not None and isinstance(task, CausalLM):
            found.append(_perplexity(task, edit, acceptance))
        found.append(_size(task.model, edit, acceptance.size))
    checks = tuple(check for check in found if check is not None)
    measured = {check.name for check in checks}
    missing = tuple(name for name in KINDS if name not in measured and name not in ("changes", "stays"))
    asked = {name for name in acceptance.model_fields_set if getattr(acceptance, name)}  # a share of 0 asks for nothing
    return AcceptanceResult(checks, missing, tuple(name for name in missing if name in asked))


def guarded(
    task: Task,
    edit: Edit,
    acceptance: AcceptanceCriteria = STANDARD,
    **named: Any,
) -> tuple[AppliedEdit, AcceptanceResult]:
    """Apply an edit if it is accepted, and return its handle with the verdict. Arguments as of :func:`judge`.

    Raises:
        RejectedError: it is not; nothing is left on the model.
    """
    verdict = judge(task, edit, acceptance, **named)
    if not verdict.ok:
        raise RejectedError(verdict)
    return edit.apply(task.model), verdict


def _share(name: str, answers: Sequence[AnswerComparison], bound: float) -> Check | None:
    if not answers:
        return None
    wrong = tuple(answer for answer in answers if not answer.ok)
    share = 1 - len(wrong) / len(answers)
    return Check(name, share, bound, share >= bound, len(answers), wrong)


def _stayed(task: Task, edit: Edit, acceptance: AcceptanceCriteria, most: int) -> list[AnswerComparison]:
    """The answers to what must stay: as before, or as named."""
    named = [probe for probe in acceptance.must_stay if isinstance(probe, Probe)]
    plain = [prompt for prompt in acceptance.must_stay if not isinstance(prompt, Probe)]
    requests = [EditRequest(prompt=probe.prompt, target=probe.target) for probe in named]
    found = [own[0] for own in before_after(task, edit, requests, most)]
    asked = ask(task, edit, plain, most) if plain else []
    return [
        *found,
        *(AnswerComparison("stays", a.prompt, a.before, a.before, a.after, a.before == a.after) for a in asked),
    ]


def _perplexity(task: CausalLM, edit: Edit, acceptance: AcceptanceCriteria) -> Check:
    assert acceptance.perplexity is not None
    sample = PerplexityText(task, acceptance.perplexity.text, TEXT_TOKENS)
    with edit.applied(task.model):
        after = sample.measure(Intervention(task), 1)[0]
    ratio, most = after / sample.perplexity, acceptance.perplexity.most
    return Check("perplexity", ratio, most, ratio <= most, sample.tokens)


@torch.no_grad()
def _size(model: PreTrainedModel, edit: Edit, most: float) -> Check | None:
    """The largest ‖ΔW‖ / ‖W‖; nothing where no weight is at hand as numbers."""
    sizes, norms = edit.norms(), {}
    for name, module in find_modules(model, edit.changes).items():
        if not is_quantized(module) and not weight_of(module).is_meta:
            norms[name] = float(weight_of(module).float().norm())
    if not norms:
        return None
    largest = max(sizes[name] / max(norm, 1e-30) for name, norm in norms.items())
    return Check("size", largest, most, largest <= most, len(norms))
