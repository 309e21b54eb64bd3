"""Check an edit against acceptance criteria: apply it, measure, take it off again, and say whether it passed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from remend.apps.acceptance.criteria import MAX_PERPLEXITY_TOKENS, STANDARD_CRITERIA, AcceptanceCriteria
from remend.core.layers import is_quantized, weight_of
from remend.edit import AppliedEdit, Edit
from remend.errors import EditError, RequestError
from remend.evaluation.before_after import AnswerComparison, Asked, before_after, compare_answers
from remend.evaluation.interventions import SharedEdit
from remend.evaluation.ordinary_text import TEXT_TOKENS, Elsewhere, OrdinaryText
from remend.fingerprint import find_modules
from remend.request import Chat, EditRequest, Message, Probe, Prompt, in_form_of
from remend.tasks import Task

SYSTEM_ROLES = ("system", "developer")
"""Roles of messages that say how a model should answer, whatever it is asked."""

CHECK_TITLES = {
    "takes": "the requests' prompts get their answers",
    "changes": "what must change does",
    "follows": "paraphrases follow",
    "stays": "what must stay does",
    "near": "near prompts stay",
    "far": "far prompts stay",
    "elsewhere": "choices on ordinary text stay",
    "perplexity": "an ordinary text is predicted as before",
    "size": "the change is small",
}
"""The name of every check, and what it means when it passes."""

MULTIPLES_OF = {"perplexity": "the perplexity before", "size": "its matrix's norm"}
"""The checks whose measured value is no share of prompts but a multiple of something, and of what."""


@dataclass(frozen=True)
class AcceptanceCheck:
    """One criterion and what was measured for it.

    Attributes:
        name: a key of :data:`CHECK_TITLES`.
        measured: a share of prompts, the perplexity as a multiple of the one before, or the largest ‖ΔW‖ / ‖W‖.
        bound: the smallest allowed value; for ``perplexity`` and ``size``, the largest.
        ok: whether ``measured`` is within the bound.
        count: the number of prompts, choices, tokens or matrices that were measured.
        failed: the answers that are wrong.
    """

    name: str
    measured: float
    bound: float
    ok: bool
    count: int
    failed: tuple[AnswerComparison, ...] = ()

    @property
    def description(self) -> str:
        """The check and its result in words."""
        title = CHECK_TITLES[self.name]
        if self.name in MULTIPLES_OF:
            return f"{title}: {self.measured:.3f} times {MULTIPLES_OF[self.name]} (at most {self.bound:g})"
        return f"{title}: {self.measured:.1%} of {self.count} (at least {self.bound:.0%})"


@dataclass(frozen=True)
class AcceptanceResult:
    """The result of checking one edit.

    Attributes:
        checks: the criteria that could be measured.
        elsewhere: what the edit changes on ordinary text.
        missing: the names of checks for which there was nothing to measure.
        unmet: those of the missing checks that the criteria set explicitly; they count as failed.
    """

    checks: tuple[AcceptanceCheck, ...]
    elsewhere: Elsewhere
    missing: tuple[str, ...]
    unmet: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the edit meets all criteria."""
        return all(check.ok for check in self.checks) and not self.unmet

    @property
    def reasons(self) -> list[str]:
        """Why the edit is not accepted, in words."""
        unmet = [f"{CHECK_TITLES[name]}: asked, with nothing to measure it on" for name in self.unmet]
        return [check.description for check in self.checks if not check.ok] + unmet

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        return {
            "ok": self.ok,
            "checks": [asdict(check) for check in self.checks],
            "elsewhere": self.elsewhere.to_json(),
            "missing": list(self.missing),
            "unmet": list(self.unmet),
        }


class RejectedError(EditError):
    """The edit does not meet the acceptance criteria; nothing was left on the model.

    Attributes:
        result: what was measured.
    """

    def __init__(self, result: AcceptanceResult) -> None:
        super().__init__(f"the edit was not accepted and is off again: {'; '.join(result.reasons)}")
        self.result = result


def check_acceptance(
    task: Task,
    edit: Edit,
    criteria: AcceptanceCriteria = STANDARD_CRITERIA,
    active: Sequence[Edit] = (),
    max_new_tokens: int = 32,
) -> AcceptanceResult:
    """Apply an edit to a model, measure what the criteria ask for, and take it off again.

    Args:
        task: the base model.
        edit: the edit, with its requests.
        criteria: what the edit must meet.
        active: edits that are in use already: the answers before the edit are those of the model with these.
        max_new_tokens: the longest answer that is decoded, in tokens.

    Raises:
        WrongBaseError: the edit is of another model.
    """
    edit.base.check(task.model, "this edit")
    with Edit.sum(active).applied(task.model) if active else nullcontext():
        added = edit.beside(active)
        elsewhere = _elsewhere(task, added, criteria)
        checks = _checks(task, added, criteria, elsewhere, max_new_tokens)
    measured = {check.name for check in checks}
    missing = tuple(name for name in CHECK_TITLES if name not in measured and name not in ("changes", "stays"))
    required = {name for name in criteria.model_fields_set if getattr(criteria, name)}  # a share of 0 requires nothing
    return AcceptanceResult(checks, elsewhere, missing, tuple(name for name in missing if name in required))


def apply_if_accepted(
    task: Task,
    edit: Edit,
    criteria: AcceptanceCriteria = STANDARD_CRITERIA,
    **options: Any,
) -> tuple[AppliedEdit, AcceptanceResult]:
    """Apply an edit if it is accepted, and return its handle with the result.

    Args:
        task: the base model.
        edit: the edit, with its requests.
        criteria: what the edit must meet.
        options: further arguments of :func:`check_acceptance`.

    Raises:
        RejectedError: the edit is not accepted; nothing is left on the model.
    """
    result = check_acceptance(task, edit, criteria, **options)
    if not result.ok:
        raise RejectedError(result)
    return edit.apply(task.model), result


def _checks(
    task: Task, edit: Edit, criteria: AcceptanceCriteria, elsewhere: Elsewhere, max_new_tokens: int
) -> tuple[AcceptanceCheck, ...]:
    """Measure everything that can be measured."""
    answers = [answer for row in before_after(task, edit, edit.requests, max_new_tokens) for answer in row]
    by_kind = {kind: [a for a in answers if a.kind == kind] for kind in ("prompt", "paraphrase", "near", "far")}
    named = compare_answers(task, edit, _named_in(criteria, edit.requests), max_new_tokens)
    changed, stayed = ([answer for answer in named if answer.kind == kind] for kind in ("changes", "stays"))
    checks = [
        _share_check("takes", by_kind["prompt"], criteria.takes),
        _share_check("changes", changed, criteria.takes),
        _share_check("follows", by_kind["paraphrase"], criteria.follows),
        _share_check("stays", stayed, criteria.stays),
        _share_check("near", by_kind["near"], criteria.near),
        _share_check("far", by_kind["far"], criteria.far),
    ]
    share, bound = elsewhere.stays.mean, criteria.elsewhere
    checks.append(AcceptanceCheck("elsewhere", share, bound, share >= bound, elsewhere.choices))
    if criteria.perplexity is not None and elsewhere.perplexity_ratio is not None:
        ratio, most = elsewhere.perplexity_ratio.mean, criteria.perplexity.most
        checks.append(AcceptanceCheck("perplexity", ratio, most, ratio <= most, elsewhere.choices))
    checks.append(_size_check(task.model, edit, criteria.size, with_units="size" in criteria.model_fields_set))
    return tuple(check for check in checks if check is not None)


def _share_check(name: str, answers: Sequence[AnswerComparison], bound: float) -> AcceptanceCheck | None:
    """Check the share of right answers; return None where there are no answers."""
    if not answers:
        return None
    wrong = tuple(answer for answer in answers if not answer.ok)
    share = 1 - len(wrong) / len(answers)
    return AcceptanceCheck(name, share, bound, share >= bound, len(answers), wrong)


def _named_in(criteria: AcceptanceCriteria, requests: Sequence[EditRequest]) -> list[Asked]:
    """List what the criteria name: each must get its named answer or, without one, the answer before the edit.

    A text is asked in the form of the edit's own requests: of a chat model, as a conversation under the same system
    message. Where the requests have several forms, it is asked in each.
    """
    forms = _forms(requests)
    named: list[tuple[str, Prompt | Probe]] = [("changes", probe) for probe in criteria.must_change]
    named += [("stays", item) for item in criteria.must_stay]
    questions: list[Asked] = []
    for kind, item in named:
        prompt, target = (item.prompt, item.target) if isinstance(item, Probe) else (item, None)
        try:
            prompts = dict.fromkeys(in_form_of(form, prompt) for form in forms)
        except ValueError as error:
            raise RequestError(f"{kind} of the acceptance file: {error}") from None
        questions += [(kind, prompt, target) for prompt in prompts]
    return questions


def _forms(requests: Sequence[EditRequest]) -> list[Prompt | None]:
    """Return a prompt of each form that the requests have; None where there is no request to tell one.

    Conversations are of one form if they have the same system messages; of other prompts, the kind is their form.
    """
    forms: dict[object, Prompt | None] = {}
    for request in requests:
        prompt = request.prompt
        if isinstance(prompt, Chat):
            system = (message for message in prompt.messages if message.role in SYSTEM_ROLES)
            prompt = Chat((*system, Message("user", "")))  # only the question differs from prompt to prompt
        forms.setdefault(prompt if isinstance(prompt, Chat) else type(prompt), prompt)
    return list(forms.values()) or [None]


def _elsewhere(task: Task, edit: Edit, criteria: AcceptanceCriteria) -> Elsewhere:
    """Measure the edit on the text that the criteria give or, without one, on the model's own."""
    given = criteria.perplexity.text if criteria.perplexity is not None and task.causal else ()
    text = OrdinaryText(task, given, MAX_PERPLEXITY_TOKENS if given else TEXT_TOKENS)
    return text.measure(SharedEdit(task, edit))[0]


@torch.no_grad()
def _size_check(model: nn.Module, edit: Edit, bound: float, with_units: bool) -> AcceptanceCheck | None:
    """Check the largest ‖ΔW‖ / ‖W‖; return None where no weight can be read.

    Of hidden units, which are measured only ``with_units``, ΔW is the columns that they add to the narrowing projection
    W: a large one is no sign of a ruined model, since other inputs are not answered.
    """
    changed = {name: change for name, change in edit.changes.items() if with_units or not change.reads}
    change_norms, weight_norms = edit.norms(), {}
    change_norms |= {name: float(change.delta.float().norm()) for name, change in changed.items() if change.reads}
    for name, module in find_modules(model, changed).items():
        # Quantized weights are packed, and offloaded ones are on the meta device: neither has a norm to compare with.
        if not is_quantized(module) and not weight_of(module).is_meta:
            weight_norms[name] = float(weight_of(module).float().norm())
    if not weight_norms:
        return None
    largest = max(change_norms[name] / max(norm, 1e-30) for name, norm in weight_norms.items())
    return AcceptanceCheck("size", largest, bound, largest <= bound, len(weight_norms))
