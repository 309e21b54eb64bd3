"""What the model answers without and with an edit, in words: for people, and to verify one edit at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remend.edit import Edit
from remend.editors.lookup import LookupEdit
from remend.request import EditRequest, Prompt
from remend.tasks import Task


@dataclass(frozen=True)
class Answer:
    """One prompt's free answers.

    Attributes:
        kind: what the prompt is to the edit: ``prompt``, ``paraphrase``, ``unseen paraphrase``, ``near``, ``far`` or
            ``asked``.
        prompt: the prompt, a conversation as people read it.
        wanted: what should be answered after the edit; None where nobody says.
        before: the unedited model's answer.
        after: the edited model's answer.
        ok: whether the answer after is the wanted one, given whole and closed with the end token (if there is one).
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
) -> list[list[Answer]]:
    """Free answers to every prompt of each request, from ``model`` as it is and with ``edit`` applied.

    The wanted answer is the request's target at the prompt and its paraphrases, and at near and far prompts whatever
    the unedited model answers there.
    """
    rows = [(number, kind, prompt) for number, request in enumerate(requests) for kind, prompt in _prompts(request)]
    prompts = [prompt for _, _, prompt in rows]
    before = task.predict(prompts, max_new_tokens)
    with edit.applied(task.model):
        after = task.predict(prompts, max_new_tokens)
    found: list[list[Answer]] = [[] for _ in requests]
    for (number, kind, prompt), was, now in zip(rows, before, after, strict=True):
        must_stay = kind in ("near", "far")
        wanted = was if must_stay else task.encode(prompt, requests[number].target).target
        words = task.decode(wanted) if must_stay else requests[number].target
        # Without an end token an answer never stops by itself: it is right if it begins with what was wanted.
        given = now if task.end_tokens else now[: len(wanted)]
        found[number].append(Answer(kind, str(prompt), words, task.decode(was), task.decode(now), given == wanted))
    return found


def ask(
    task: Task,
    edit: Edit | None,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 32,
) -> list[Answer]:
    """Free answers to any prompts, without and with ``edit`` (the same twice where there is none)."""
    before = after = task.predict(prompts, max_new_tokens)
    if edit is not None:
        with edit.applied(task.model):
            after = task.predict(prompts, max_new_tokens)
    return [
        Answer("asked", str(prompt), None, task.decode(was), task.decode(now), None)
        for prompt, was, now in zip(prompts, before, after, strict=True)
    ]


def _prompts(request: EditRequest) -> list[tuple[str, Prompt]]:
    listed: list[tuple[str, Prompt]] = [("prompt", request.prompt)]
    listed += [("paraphrase", prompt) for prompt in request.paraphrases]
    listed += [("unseen paraphrase", prompt) for prompt in request.unseen_paraphrases]
    listed += [("near", probe.prompt) for probe in request.near]
    listed += [("far", probe.prompt) for probe in request.locality]
    return listed
