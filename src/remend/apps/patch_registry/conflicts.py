"""Edits that do not go together: found by asking the model, before the later one acts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from remend.edit import Edit
from remend.errors import EditError
from remend.evaluation.before_after import ask
from remend.tasks import Task

DISAGREES, UNDOES = "disagrees", "undoes"


@dataclass(frozen=True)
class Conflict:
    """A prompt at which an edit is not to be had with one that acts already.

    Attributes:
        kind: ``disagrees``: both have a target for the prompt, and not the same; ``undoes``: the later one changes what
            the earlier one had the model answer.
        edit: the number of the earlier one.
        prompt: the prompt.
        wanted: what the earlier edit is for.
        instead: the later one's target, or what is answered with both.
    """

    kind: str
    edit: int
    prompt: str
    wanted: str
    instead: str

    @property
    def said(self) -> str:
        """It in words."""
        if self.kind == DISAGREES:
            return f"edit {self.edit} says {self.wanted!r} at {self.prompt!r}, this one {self.instead!r}"
        return f"edit {self.edit} ({self.wanted!r} at {self.prompt!r}) is undone: {self.instead!r} is answered"

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


class ConflictError(EditError):
    """An edit does not go together with one that acts; it was not activated.

    Attributes:
        conflicts: at which prompts.
    """

    def __init__(self, conflicts: list[Conflict]) -> None:
        shown = "; ".join(conflict.said for conflict in conflicts[:3])
        more = f" and {len(conflicts) - 3} more" if len(conflicts) > 3 else ""
        super().__init__(f"the edit was not activated: {shown}{more}. Revert the other one first, or force it")
        self.conflicts = conflicts


def find_conflicts(
    task: Task,
    edit: Edit,
    active: Mapping[int, Edit],
    max_new_tokens: int = 32,
) -> list[Conflict]:
    """Where an edit contradicts, or undoes, those that act.

    Args:
        task: the base model.
        edit: what is to act too.
        active: what acts, by number, in order.
        max_new_tokens: how far answers are decoded.
    """
    targets = {request.prompt: request.target for request in edit.requests}
    found = [
        Conflict(DISAGREES, number, str(request.prompt), request.target, targets[request.prompt])
        for number, other in active.items()
        for request in other.requests
        if targets.get(request.prompt, request.target) != request.target
    ]
    told = {(conflict.edit, conflict.prompt) for conflict in found}
    owned = [(number, request) for number, other in active.items() for request in other.requests]
    if not owned:
        return found
    with ExitStack() as stack:
        for other in active.values():
            stack.enter_context(other.applied(task.model))
        answers = ask(task, edit, [request.prompt for _, request in owned], max_new_tokens)
    for (number, request), answer in zip(owned, answers, strict=True):
        undone = answer.before == request.target != answer.after
        if undone and (number, str(request.prompt)) not in told:
            found.append(Conflict(UNDOES, number, str(request.prompt), request.target, answer.after))
    return found
