"""Free answers without and with an edit, in words: to show to people, and to verify one edit at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remend.edit import Edit
from remend.editors.lookup_edit import LookupEdit
from remend.evaluation.continuations import Continuation, measure_continuations
from remend.request import EditRequest, Prompt
from remend.tasks import Task
from remend.tasks.same_text import same_text
from remend.tasks.unknown_text import warn_of_unknown_text

Asked = tuple[str, Prompt, str | None]
"""What a prompt is to an edit, the prompt, and the expected answer: None for the one that the unedited model gives."""


@dataclass(frozen=True)
class AnswerComparison:
    """The free answers to one prompt before and after an edit.

    Attributes:
        kind: what the prompt is to the edit: ``prompt``, ``paraphrase``, ``unseen paraphrase``, ``near``, ``far`` or
            ``asked``.
        prompt: the prompt, a conversation as people read it.
        wanted: the expected answer after the edit; None where there is none.
        before: the unedited model's answer.
        after: the edited model's answer.
        ok: whether the answer after is the expected one (:meth:`remend.tasks.Task.gives`) and goes on sensibly.
        already: whether the unedited model gives the target already.
        continuation: where the model does not end its answers, how the text goes on after the expected one.
    """

    kind: str
    prompt: str
    wanted: str | None
    before: str
    after: str
    ok: bool | None
    already: bool = False
    continuation: Continuation | None = None

    def to_json(self) -> dict[str, object]:
        """Return what reports and commands write of it."""
        names = ("kind", "prompt", "wanted", "before", "after", "ok")
        return {name: getattr(self, name) for name in names}


def before_after(
    task: Task,
    edit: Edit | LookupEdit,
    requests: Sequence[EditRequest],
    max_new_tokens: int = 32,
) -> list[list[AnswerComparison]]:
    """Return the answers to every prompt of each request, from the model as it is and with ``edit`` applied.

    The expected answer is the request's target at the prompt and its paraphrases, and the unedited model's answer at
    near and far prompts.
    """
    rows = [(number, asked) for number, request in enumerate(requests) for asked in _asked(request)]
    comparisons: list[list[AnswerComparison]] = [[] for _ in requests]
    compared = compare_answers(task, edit, [asked for _, asked in rows], max_new_tokens)
    for (number, _), comparison in zip(rows, compared, strict=True):
        comparisons[number].append(comparison)
    return comparisons


def compare_answers(
    task: Task,
    edit: Edit | LookupEdit,
    asked: Sequence[Asked],
    max_new_tokens: int = 32,
) -> list[AnswerComparison]:
    """Return the answers to prompts without and with ``edit``, each with its verdict.

    Args:
        task: the model.
        edit: the edit.
        asked: the prompts.
        max_new_tokens: the longest answer.
    """
    prompts = [prompt for _, prompt, _ in asked]
    task.choose_answer_forms(prompts)
    expected = [None if target is None else task.encode(prompt, target).target for _, prompt, target in asked]
    warn_of_unknown_text(task, prompts, "the prompts")
    # All prompts together, which are far fewer passes than prompt by prompt.
    before = task.predict(prompts, max_new_tokens)
    with edit.applied(task.model):
        after = task.predict(prompts, max_new_tokens)
    answers = [
        task.answer_span(prompt, old) if target is None else target
        for prompt, target, old in zip(prompts, expected, before, strict=True)
    ]
    continuations = measure_continuations(task, zip(prompts, answers, after, strict=True))
    comparisons = []
    for (kind, prompt, target), wanted, old, new in zip(asked, answers, before, after, strict=True):
        continuation = continuations.get((prompt, wanted, new))
        comparisons.append(
            AnswerComparison(
                kind=kind,
                prompt=str(prompt),
                # A text stays as the request writes it; a label may have been given by its number.
                wanted=target if target is not None and task.generates else task.decode(wanted),
                before=task.decode(old),
                after=task.decode(new),
                ok=task.gives(prompt, new, wanted) and (continuation is None or continuation.sensible),
                # A text that the limit cut off where the target ends says it too.
                already=target is not None
                and (task.gives(prompt, old, wanted) or same_text(task.decode(old), task.decode(wanted))),
                continuation=continuation,
            )
        )
    return comparisons


def ask(
    task: Task,
    edit: Edit | None,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 32,
) -> list[AnswerComparison]:
    """Return the answers to any prompts, without and with ``edit`` (the same twice where there is none)."""
    warn_of_unknown_text(task, prompts, "the prompts")
    before = after = task.predict(prompts, max_new_tokens)
    if edit is not None:
        with edit.applied(task.model):
            after = task.predict(prompts, max_new_tokens)
    return [
        AnswerComparison("asked", str(prompt), None, task.decode(old), task.decode(new), None)
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]


def _asked(request: EditRequest) -> list[Asked]:
    """List the prompts of a request with what each is to the edit, and its expected answer."""
    target = request.target
    asked: list[Asked] = [("prompt", request.prompt, target)]
    asked += [("paraphrase", prompt, target) for prompt in request.paraphrases]
    asked += [("unseen paraphrase", prompt, target) for prompt in request.unseen_paraphrases]
    asked += [("near", probe.prompt, None) for probe in request.near]
    asked += [("far", probe.prompt, None) for probe in request.locality]
    return asked
