"""Free answers without and with an edit, in words: to show to people, and to verify one edit at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remend.edit import Edit
from remend.editors.lookup_edit import LookupEdit
from remend.request import EditRequest, Prompt
from remend.tasks import Task


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
        ok: whether the answer after is the expected one, given whole and closed with the end token (if there is one).
    """

    kind: str
    prompt: str
    wanted: str | None
    before: str
    after: str
    ok: bool | None


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
    rows = [(number, kind, prompt) for number, request in enumerate(requests) for kind, prompt in _prompts(request)]
    prompts = [prompt for _, _, prompt in rows]
    # All prompts of all requests together, which are far fewer passes than prompt by prompt.
    before = task.predict(prompts, max_new_tokens)
    with edit.applied(task.model):
        after = task.predict(prompts, max_new_tokens)
    comparisons: list[list[AnswerComparison]] = [[] for _ in requests]
    for (number, kind, prompt), old, new in zip(rows, before, after, strict=True):
        must_stay = kind in ("near", "far")
        target = requests[number].target
        expected = old if must_stay else task.encode(prompt, target).target
        # Without an end token an answer never stops by itself, so only its beginning is compared.
        compared = new if task.end_tokens else new[: len(expected)]
        comparisons[number].append(
            AnswerComparison(
                kind=kind,
                prompt=str(prompt),
                wanted=task.decode(expected) if must_stay else target,
                before=task.decode(old),
                after=task.decode(new),
                ok=task.same_answer(compared, expected),
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
    before = after = task.predict(prompts, max_new_tokens)
    if edit is not None:
        with edit.applied(task.model):
            after = task.predict(prompts, max_new_tokens)
    return [
        AnswerComparison("asked", str(prompt), None, task.decode(old), task.decode(new), None)
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]


def _prompts(request: EditRequest) -> list[tuple[str, Prompt]]:
    """List the prompts of a request with what each is to the edit."""
    prompts: list[tuple[str, Prompt]] = [("prompt", request.prompt)]
    prompts += [("paraphrase", prompt) for prompt in request.paraphrases]
    prompts += [("unseen paraphrase", prompt) for prompt in request.unseen_paraphrases]
    prompts += [("near", probe.prompt) for probe in request.near]
    prompts += [("far", probe.prompt) for probe in request.locality]
    return prompts
