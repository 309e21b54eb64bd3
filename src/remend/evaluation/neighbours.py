"""``measure_neighbours``: what an edit changes next to its request, whose near prompts nobody has named.

The request's own prompt about well-known other subjects, and common statements about its own subject that ask something
else. Where the unedited model is sure what it says first, it should go on saying it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remend.edit import Edit
from remend.editors.locate_then_edit.common_questions import (
    frames,
    next_tokens,
    reference_subjects,
    statement_of,
)
from remend.editors.locate_then_edit.subject_finder import find_subject
from remend.request import EditRequest
from remend.tasks.base import Task
from remend.tasks.endings import asks

SURE = 0.2
"""The least probability of a first token that should stay."""


@dataclass(frozen=True)
class ChangedAnswer:
    """A prompt with the first token that the model says before and after an edit."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Neighbours:
    """What an edit changed among prompts of one kind.

    Attributes:
        kind: what they are, in words.
        prompts: their number.
        changed: those that are answered otherwise, first the one of which the unedited model is the surest.
    """

    kind: str
    prompts: int
    changed: tuple[ChangedAnswer, ...]

    @property
    def stays(self) -> float:
        """The share of them that stay."""
        return 1 - len(self.changed) / self.prompts


def measure_neighbours(task: Task, edit: Edit, request: EditRequest) -> list[Neighbours]:
    """Compare what the model says first to prompts near a request before and after an edit.

    Args:
        task: the base model.
        edit: the edit.
        request: what it is for; without a subject, that is looked for.

    Returns:
        The kinds of which there is a prompt that the model is sure about.
    """
    return [_compare(task, edit, kind, near) for kind, near in near_prompts(task, request).items() if near]


def near_prompts(task: Task, request: EditRequest) -> dict[str, list[tuple[str, int]]]:
    """Return prompts near a request that nobody has named, and the token that the model surely says first to each.

    Only of decoders and of prompts to complete: the answer to a question begins with the words of a sentence. By kind,
    the surest first.
    """
    if not task.causal or not isinstance(request.prompt, str) or asks(request.prompt):
        return {}
    subject = (request.subject or "").strip() or find_subject(task, request.prompt)
    statement = statement_of(request.model_copy(update={"subject": subject}))
    if statement is None:
        return {}
    others = [other for other in reference_subjects() if other.casefold() not in subject.casefold()]
    own = int(next_tokens(task, [request.prompt])[0].argmax())
    of_kinds = {
        "other subjects": [] if task.is_long(request.prompt) else [statement.replace("{}", other) for other in others],
        f"other statements about {subject}": [frame.about(subject) for frame in frames("statements")],
    }
    if task.context is not None:  # a text that fills it has no next token
        of_kinds = {
            kind: [text for text in texts if len(task.encode_input(text)) < task.context]
            for kind, texts in of_kinds.items()
        }
    return {kind: _surely_another(task, prompts, own) for kind, prompts in of_kinds.items()}


def _surely_another(task: Task, prompts: Sequence[str], own: int) -> list[tuple[str, int]]:
    """Return the prompts to which a model surely says another token than ``own``, which those that ask the same get."""
    if not prompts:
        return []
    surest, first = next_tokens(task, prompts).max(1)
    order = surest.argsort(descending=True).tolist()
    return [(prompts[i], int(first[i])) for i in order if surest[i] >= SURE and first[i] != own]


def _compare(task: Task, edit: Edit, kind: str, near: Sequence[tuple[str, int]]) -> Neighbours:
    with edit.applied(task.model):
        after = next_tokens(task, [prompt for prompt, _ in near]).argmax(1).tolist()
    changed = [
        ChangedAnswer(prompt, task.decode((first,)), task.decode((token,)))
        for (prompt, first), token in zip(near, after, strict=True)
        if token != first
    ]
    return Neighbours(kind, len(near), tuple(changed))
