"""``Lookup``: an editor that learns nothing and looks answers up (Mitchell et al., arXiv 2110.11309, App. G)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor

from remend.config import Config
from remend.core.exclusive_execution import without_autocast
from remend.core.low_rank_hooks import frozen, remove_hooks
from remend.editors.base import Editor
from remend.editors.info import EditorInfo
from remend.editors.lookup_edit import LookupEdit, output_layer
from remend.editors.request_checks import refuse_conflicts
from remend.editors.saved_editor import SavedEditor
from remend.request import EditRequest
from remend.tasks.base import Example, Task, in_batches


@dataclass(frozen=True)
class LookupConfig(Config):
    """Settings of the lookup editor.

    Attributes:
        radius: the distance from a stored state up to which a final hidden state is answered from the table, as a share
            of the usual distance between those of unrelated texts.
    """

    radius: PositiveFloat = 0.5


class Lookup(Editor):
    """Keeps edits as pairs of a final hidden state and an answer.

    Attributes:
        distance: the median distance between the final hidden states of unrelated inputs.
    """

    info: ClassVar[EditorInfo] = EditorInfo(
        "lookup",
        "Mitchell et al. (arXiv 2110.11309), App. G",
        "nothing",
        "outside",
        batches=True,
        options=("text",),
        requires={"distribution.discrete": "it looks up tokens or labels, and their targets are numbers"},
    )
    config_class: ClassVar[type[Config]] = LookupConfig
    distance: float = 1.0

    def prepare(self, task: Task, text: Sequence[str], seed: int) -> None:
        """Measure the median distance between final hidden states."""
        examples = task.ordinary_examples(text, seed)
        # One state of each input, its last: neighboring tokens of one text would be nearer than unrelated texts are.
        last = [Example(task.tokens_read(example), example.target[-1:]) for example in examples]
        states = torch.cat(_final_states(task, last))
        self.distance = float(torch.pdist(states).median()) if len(states) > 1 else 1.0

    def edit(self, task: Task, requests: Sequence[EditRequest]) -> LookupEdit:
        """Return one edit of all ``requests``.

        Raises:
            RequestError: there is no request, or one does not fit the model's context.
            WrongBaseError: the editor is for another kind of model.
        """
        edits = self.edit_each(task, requests)
        refuse_conflicts(task, requests)
        keys, values = torch.cat([edit.keys for edit in edits]), torch.cat([edit.values for edit in edits])
        return replace(edits[0], keys=keys, values=values, requests=tuple(requests))

    @without_autocast()
    def edit_each(self, task: Task, requests: Sequence[EditRequest]) -> list[LookupEdit]:
        """Return one edit for each request. Raises as :meth:`edit`."""
        base = self.check(task, requests)
        examples = [task.encode(request.prompt, request.target) for request in requests]
        reach, editor = self.config.radius * self.distance, self.describe()
        return [
            LookupEdit(keys, torch.tensor(example.target), reach, base, (request,), editor)
            for keys, example, request in zip(_final_states(task, examples), examples, requests, strict=True)
        ]

    def saved_fields(self) -> dict[str, Any]:
        """Return the measured distance."""
        return {"distance": self.distance}

    def restore(self, saved: SavedEditor) -> None:
        """Take over the measured distance."""
        super().restore(saved)
        self.distance = saved.field("distance", float)


@torch.no_grad()
def _final_states(task: Task, examples: Sequence[Example]) -> list[Float[Tensor, "target d"]]:
    """Return what the output layer reads where the targets of each example are predicted."""
    by_example: list[Tensor] = []
    head = output_layer(task.model)
    for part in in_batches(examples):
        batch = task.collate(part)
        inputs: list[Tensor] = []
        handle = head.register_forward_hook(
            lambda module, args, output, inputs=inputs: inputs.append(args[0].detach().float())
        )
        try:
            with frozen(task.model):
                task.outputs(batch)
        finally:
            remove_hooks([handle])
        states = inputs[-1]
        if states.shape[:-1] == batch.mask.shape and not task.generates:
            states = states[batch.row, batch.position]  # a classifier that reads every token and answers at one
        states = states.reshape(-1, states.shape[-1]).cpu()
        by_example += states.split(torch.bincount(batch.row, minlength=batch.rows).tolist())
    return by_example
