"""What every editor can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.editors.edit_types import AnyEdit
from remend.editors.info import EditorInfo
from remend.request import EditRequest


@runtime_checkable
class Editor(Protocol):
    """Something that turns requests into edits of a model, and never touches the model itself."""

    traits: ClassVar[EditorInfo]

    def edit(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
    ) -> AnyEdit:
        """One edit that makes all the requests true at once."""
        ...

    def edit_each(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
    ) -> Sequence[AnyEdit]:
        """One edit for each request, each made from the unedited model."""
        ...
