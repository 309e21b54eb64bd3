"""``InContext``: an editor that states the fact in the prompt (Zheng et al., arXiv 2305.12740, no demonstrations)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from remend.editors.base import Editor
from remend.editors.context_edit import ContextEdit
from remend.editors.info import EditorInfo
from remend.editors.request_checks import refuse_conflicts
from remend.request import EditRequest
from remend.tasks.base import Task


class InContext(Editor):
    """States the fact in the prompt, rather than editing the model."""

    info: ClassVar[EditorInfo] = EditorInfo(
        "in-context",
        "Zheng et al. (arXiv 2305.12740)",
        "nothing",
        "outside",
        batches=True,
        options=(),
        requires={"reads_text": "it puts the fact before the prompt, which must be text"},
    )

    def edit(self, task: Task, requests: Sequence[EditRequest]) -> ContextEdit:
        """Return all facts as one edit; they must fit into the model's context with the prompts that follow.

        Raises:
            RequestError: there is no request, or one does not fit the model's context.
            WrongBaseError: the editor is for another kind of model.
        """
        self.check(task, requests)
        refuse_conflicts(task, requests)
        return ContextEdit(tuple(requests))

    def edit_each(self, task: Task, requests: Sequence[EditRequest]) -> list[ContextEdit]:
        """Return one edit for each fact. Raises as :meth:`edit`."""
        self.check(task, requests)
        return [ContextEdit((request,)) for request in requests]
