"""``EditorInfo``: what an editor declares about itself, which the base class checks and the command line reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class EditorInfo:
    """What an editor needs before its first edit, which options it takes, and what its edits are.

    Attributes:
        name: its name on the command line and in files.
        source: the paper that it is from.
        needs: ``nothing``; ``text`` (it measures the model's activations on a text); or ``training`` (on requests about
            other subjects).
        result: what its edits are: ``low-rank``; ``dense`` (the change of a whole matrix, kept as factors of full rank,
            so that it is applied, reverted, saved and merged like any other); or ``outside`` (no weight is changed).
        batches: whether an edit of several requests can be more than the sum of their edits.
        sequence: what the next one of several edits is made of: the ``edited`` model, as the earlier ones leave it; the
            ``unedited`` one, where edits are added up so that each keeps what it adds (:meth:`Edit.sum
            <remend.edit.Edit.sum>`); or ``all`` requests at once, where edits cannot be added up.
        options: those of ``text``, ``modules`` and ``layers`` that :meth:`Editor.create` has a use for.
        experts: whether it edits matrices that hold those of several experts.
        requires: the attributes of a task that must be true, each with the reason, as the end of an error message.
    """

    name: str
    source: str
    needs: Literal["nothing", "text", "training"]
    result: Literal["low-rank", "dense", "outside"] = "low-rank"
    batches: bool = False
    sequence: Literal["edited", "unedited", "all"] = "edited"
    options: tuple[str, ...] = ("modules", "layers")
    experts: bool = False
    requires: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
