"""What every editor can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.edit import Edit
from remend.request import EditRequest


class Editor(Protocol):
    """Something that turns requests into edits of a model, and never touches the model itself."""

    def edit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]) -> Edit:
        """One edit that makes all the requests true at once."""
        ...

    def edit_each(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
    ) -> list[Edit]:
        """One edit for each request, each made from the unedited model."""
        ...
