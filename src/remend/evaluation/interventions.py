"""What can lie between before and after: edits, another checkpoint, the fact in the prompt, or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType

import torch

from remend.core.hooks import changes_applied
from remend.core.low_rank import LowRank, stack
from remend.edit import Edit
from remend.editors.edit_types import AnyEdit
from remend.editors.in_context import ContextEdit
from remend.editors.lookup import LookupEdit
from remend.fingerprint import find_modules
from remend.request import Prompt
from remend.tasks.base import Task


class Intervention:
    """What happens to a model for some requests, which are told apart by number.

    By itself it is another model, whatever made it: its task.

    Args:
        task: the model that is asked afterwards.
        free: whether its free answers are wanted, too.
    """

    acts = True
    """Whether the model says anything else afterwards than it did before."""
    known: Mapping[Prompt, tuple[int, ...]] = MappingProxyType({})
    """Free answers afterwards that are known beforehand."""

    def __init__(self, task: Task, free: bool = True) -> None:
        self.task = task
        self.free = free

    def asked(self, number: int, prompt: Prompt, room: int) -> Prompt | None:
        """What is asked afterwards in a prompt's place; None where it is too long with ``room`` tokens of an answer."""
        return prompt

    @contextmanager
    def acting(self, numbers: Sequence[int]) -> Iterator[None]:
        """Within it the model is changed; row i of what goes through it belongs to request ``numbers[i]``."""
        yield


class NoIntervention(Intervention):
    """The model stays as it is.

    Args:
        task: the model.
        answers: its free answers, which need not be decoded again.
    """

    acts = False

    def __init__(self, task: Task, answers: Mapping[Prompt, tuple[int, ...]]) -> None:
        super().__init__(task)
        self.known = answers


class SeparateEdits(Intervention):
    """Each request's own edit, acting on its own rows alone.

    Args:
        task: the base model.
        edits: one for each request.
        scale: what they are multiplied with.
        free: whether free answers are wanted.
    """

    def __init__(self, task: Task, edits: Sequence[Edit], scale: float = 1.0, free: bool = True) -> None:
        super().__init__(task, free)
        self.changes = {name: change.scaled(scale) for name, change in _stacked(edits).items()}
        self.modules = find_modules(task.model, self.changes)

    @contextmanager
    def acting(self, numbers: Sequence[int]) -> Iterator[None]:
        """The rows' own edits as side branches."""
        rows = torch.tensor(numbers)
        own = {name: change.select(rows.to(change.u.device)) for name, change in self.changes.items()}
        with changes_applied(self.modules, own):
            yield


class SharedEdit(Intervention):
    """One edit for all requests."""

    def __init__(self, task: Task, edit: Edit | LookupEdit, free: bool = True) -> None:
        super().__init__(task, free)
        self.edit = edit

    @contextmanager
    def acting(self, numbers: Sequence[int]) -> Iterator[None]:
        """The edit, whoever asks."""
        with self.edit.applied(self.task.model):
            yield


class FactsInContext(Intervention):
    """Facts put before each prompt: what a model does that is told, rather than edited.

    Args:
        task: the base model.
        edits: for each request what it is told.
    """

    def __init__(self, task: Task, edits: Sequence[ContextEdit]) -> None:
        super().__init__(task)
        self.edits = edits

    def asked(self, number: int, prompt: Prompt, room: int) -> Prompt | None:
        """The prompt after the facts; None where they do not fit into the context, or stand there already."""
        return self.edits[number].told(self.task, prompt, room)


def together(task: Task, edit: AnyEdit, requests: int) -> Intervention:
    """One edit, of whatever kind, for so many requests."""
    return FactsInContext(task, [edit] * requests) if isinstance(edit, ContextEdit) else SharedEdit(task, edit)


def _stacked(edits: Sequence[Edit]) -> dict[str, LowRank]:
    """One batched change for each module that any of the edits touches; an edit that does not adds nothing there."""
    stacked = {}
    for name in dict.fromkeys(name for edit in edits for name in edit.changes):
        like = next(edit.changes[name] for edit in edits if name in edit.changes)
        nothing = replace(like, u=like.u[:0], delta=like.delta[:0])
        stacked[name] = stack([edit.changes.get(name, nothing) for edit in edits])
    return stacked
