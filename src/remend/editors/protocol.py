"""What every editor can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

from remend.editors.edit_types import AnyEdit
from remend.editors.info import EditorInfo
from remend.request import EditRequest
from remend.tasks import Task


@runtime_checkable
class Editor(Protocol):
    """Something that turns requests into edits of a model, and never touches the model itself."""

    traits: ClassVar[EditorInfo]

    def edit(self, task: Task, requests: Sequence[EditRequest]) -> AnyEdit:
        """One edit that makes all the requests true at once."""
        ...

    def edit_each(self, task: Task, requests: Sequence[EditRequest]) -> Sequence[AnyEdit]:
        """One edit for each request, each made from the unedited model."""
        ...
