"""Conflicts between edits: find them by asking the model before the later edit is activated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from remend.edit import Edit
from remend.errors import EditError
from remend.evaluation.before_after import compare_answers
from remend.tasks import Task

DISAGREES, UNDOES = "disagrees", "undoes"


@dataclass(frozen=True)
class Conflict:
    """A prompt at which a new edit conflicts with an active one.

    Attributes:
        kind: ``disagrees``: the edits have different targets for the prompt; ``undoes``: with the new edit, the model
            no longer gives the active edit's target.
        edit: the number of the active edit.
        prompt: the prompt.
        wanted: the active edit's target.
        instead: the new edit's target (``disagrees``), or the answer with both edits (``undoes``).
    """

    kind: str
    edit: int
    prompt: str
    wanted: str
    instead: str

    @property
    def description(self) -> str:
        """The conflict in words."""
        if self.kind == DISAGREES:
            return f"edit {self.edit} says {self.wanted!r} at {self.prompt!r}, this one {self.instead!r}"
        return f"edit {self.edit} ({self.wanted!r} at {self.prompt!r}) is undone: {self.instead!r} is answered"

    def to_json(self) -> dict[str, Any]:
        """Return the conflict as a JSON object."""
        return asdict(self)


class ConflictError(EditError):
    """The edit conflicts with an active one; it was not activated.

    Attributes:
        conflicts: the conflicts, one for each prompt.
    """

    def __init__(self, conflicts: list[Conflict]) -> None:
        descriptions = "; ".join(conflict.description for conflict in conflicts[:3])
        more = f" and {len(conflicts) - 3} more" if len(conflicts) > 3 else ""
        disagree = all(conflict.kind == DISAGREES for conflict in conflicts)
        super().__init__(
            f"the edit was not activated: {descriptions}{more}. Revert the active edit first, "
            f"{'have this one replace it, ' if disagree else ''}or force the activation"
        )
        self.conflicts = conflicts


def find_disagreements(task: Task, edit: Edit, active: Mapping[int, Edit]) -> list[Conflict]:
    """Return where an edit wants other answers than active ones do, as their requests say."""
    targets = {task.encode_input(request.prompt): request.target for request in edit.requests}
    return [
        Conflict(DISAGREES, number, str(request.prompt), request.target, target)
        for number, active_edit in active.items()
        for request in active_edit.requests
        if (target := targets.get(task.encode_input(request.prompt))) is not None
        and not task.same_target(request.prompt, request.target, target)
    ]


def find_conflicts(
    task: Task,
    edit: Edit,
    active: Mapping[int, Edit],
    max_new_tokens: int = 32,
) -> list[Conflict]:
    """Return the conflicts of an edit with the active ones.

    Args:
        task: the base model.
        edit: the edit that is to be activated.
        active: the active edits by number, in the order of activation.
        max_new_tokens: the longest answer that is decoded, in tokens.
    """
    conflicts = find_disagreements(task, edit, active)
    disagreeing = {(conflict.edit, conflict.prompt) for conflict in conflicts}
    numbered = [(number, request) for number, active_edit in active.items() for request in active_edit.requests]
    if not numbered:
        return conflicts
    asked = [("asked", request.prompt, request.target) for _, request in numbered]
    task.choose_answer_forms(prompt for _, prompt, _ in asked)  # by the unedited model
    acting = list(active.values())
    with Edit.sum(acting).applied(task.model):
        answers = compare_answers(task, edit.beside(acting), asked, max_new_tokens)
    for (number, request), answer in zip(numbered, answers, strict=True):
        if answer.already and not answer.ok and (number, str(request.prompt)) not in disagreeing:
            conflicts.append(Conflict(UNDOES, number, str(request.prompt), request.target, answer.after))
    return conflicts
