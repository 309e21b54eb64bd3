"""``Intervention``: what differs between before and after: edits, another checkpoint, or facts in the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from remend.core.low_rank import LowRank, layer_names, stack
from remend.core.low_rank_hooks import changes_applied
from remend.edit import Edit
from remend.editors.context_edit import ContextEdit
from remend.editors.edit_types import AnyEdit
from remend.editors.lookup_edit import LookupEdit
from remend.fingerprint import find_modules
from remend.request import Prompt
from remend.tasks.base import Answer, Task


class Intervention:
    """What happens to a model for some requests, which are told apart by number.

    The base class puts another model in the place of the first: its task, whatever made it.

    Args:
        task: the model that runs afterwards.
        decode_answers: whether free answers are decoded too.
    """

    changes_outputs = True
    """Whether outputs differ from those before."""
    known_answers: Mapping[Prompt, Answer] = MappingProxyType({})
    """Free answers afterwards that are known without decoding."""
    units: Mapping[str, nn.Module] = MappingProxyType({})
    """Where all that is changed are hidden units: the layers that they read and change, by name. Else empty."""
    on_text = True
    """Whether it is measured on ordinary text."""

    def __init__(self, task: Task, decode_answers: bool = True) -> None:
        self.task = task
        self.decode_answers = decode_answers

    def prompt_for(self, number: int, prompt: Prompt, room: int) -> Prompt | None:
        """Return the prompt that takes the place of a request's prompt; None if it does not fit the context.

        Args:
            number: the request.
            prompt: the prompt as it is without the intervention.
            room: tokens that the context must have left for an answer.
        """
        return prompt

    @contextmanager
    def applied(self, numbers: Sequence[int]) -> Iterator[None]:
        """Change the model within a ``with`` block; row i of its inputs belongs to request ``numbers[i]``."""
        yield


class NoIntervention(Intervention):
    """The model stays as it is.

    Args:
        task: the model.
        answers: its free answers, which need not be decoded again.
    """

    changes_outputs = False
    on_text = False

    def __init__(self, task: Task, answers: Mapping[Prompt, Answer]) -> None:
        super().__init__(task)
        self.known_answers = answers


class SeparateEdits(Intervention):
    """An edit for each request, which acts on that request's rows only.

    Args:
        task: the base model.
        edits: one for each request.
        strength: what they are multiplied with.
        decode_answers: whether free answers are decoded too.
        on_text: whether they are measured on ordinary text.
    """

    def __init__(
        self,
        task: Task,
        edits: Sequence[Edit],
        strength: float = 1.0,
        decode_answers: bool = True,
        on_text: bool = True,
    ) -> None:
        super().__init__(task, decode_answers)
        self.on_text = on_text
        # Stacked once here: `applied` is entered for every batch, and only selects the rows of its requests.
        self.changes = {name: change.scaled(strength) for name, change in _stack_changes(edits).items()}
        self.modules = find_modules(task.model, layer_names(self.changes))
        if not any(change.response.linear for change in self.changes.values()):
            self.units = self.modules

    @contextmanager
    def applied(self, numbers: Sequence[int]) -> Iterator[None]:
        """Apply each row's edit to it as side branches of the edited modules."""
        rows = torch.tensor(numbers)
        by_row = {name: change.select(rows.to(change.u.device)) for name, change in self.changes.items()}
        with changes_applied(self.modules, by_row):
            yield


class SharedEdit(Intervention):
    """One edit, which acts on the rows of all requests."""

    def __init__(self, task: Task, edit: Edit | LookupEdit, decode_answers: bool = True) -> None:
        super().__init__(task, decode_answers)
        self.edit = edit
        if isinstance(edit, Edit) and not any(change.response.linear for change in edit.changes.values()):
            self.units = find_modules(task.model, layer_names(edit.changes))

    @contextmanager
    def applied(self, numbers: Sequence[int]) -> Iterator[None]:
        """Apply the edit, whichever requests the rows belong to."""
        with self.edit.applied(self.task.model):
            yield


class FactsInContext(Intervention):
    """Facts before each prompt: what the model does if it is told rather than edited.

    Args:
        task: the base model.
        edits: the facts for each request.
    """

    on_text = False

    def __init__(self, task: Task, edits: Sequence[ContextEdit]) -> None:
        super().__init__(task)
        self.edits = edits

    def prompt_for(self, number: int, prompt: Prompt, room: int) -> Prompt | None:
        """Return the prompt after the facts; None if they do not fit the context, or stand there already."""
        return self.edits[number].with_facts(self.task, prompt, room)


def shared_intervention(task: Task, edit: AnyEdit, requests: int) -> Intervention:
    """Return the intervention of one edit, of whatever kind, for a number of requests."""
    return FactsInContext(task, [edit] * requests) if isinstance(edit, ContextEdit) else SharedEdit(task, edit)


def _stack_changes(edits: Sequence[Edit]) -> dict[str, LowRank]:
    """Return one batched change for each module that any of the edits touches, with an entry for each edit."""
    stacked = {}
    for name in dict.fromkeys(name for edit in edits for name in edit.changes):
        example = next(edit.changes[name] for edit in edits if name in edit.changes)
        # An edit that leaves the module alone takes part with a change of rank 0.
        nothing = replace(example, u=example.u[:0], delta=example.delta[:0], keys=None, owners=None)
        stacked[name] = stack([edit.changes.get(name, nothing) for edit in edits])
    return stacked
