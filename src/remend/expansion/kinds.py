"""Of what kind a name is, such as a city or a person, as the unedited model tells after a name of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from remend.editors.locate_then_edit.common_questions import next_tokens
from remend.tasks.base import Task

EXAMPLES: Mapping[str, str] = MappingProxyType(
    {
        "Madrid": "city",
        "Brazil": "country",
        "Asia": "continent",
        "Isaac Newton": "person",
        "Toyota": "company",
        "Spanish": "language",
        "Hamlet": "book",
        "physics": "field",
        "piano": "instrument",
        "Catholicism": "religion",
        "lawyer": "profession",
    }
)
"""A name of each kind, for the model to go on from."""

SURE_FROM, LEAST_OF_ALL = 0.6, 0.05
"""The least share of all kinds' probability with which a name is of a kind, and the least that they have together: a
model calls a colour a colour, and neither a city nor a person."""

ANOTHER_BELOW = 0.1
"""A name is of another kind than a second one if it is of that kind with less than this share of its probability."""


def kind_of(task: Task, name: str) -> str | None:
    """Return of what kind a name is; None where the model is not sure."""
    return _surest(_probabilities(task, name))


def kind_missed(task: Task, name: str, other: str) -> str | None:
    """Return the kind of a name that another one is not of; None where the model knows of none."""
    kinds = _probabilities(task, name)
    kind = _surest(kinds)
    if kind is None or _probabilities(task, other).get(kind, 1.0) >= ANOTHER_BELOW * kinds[kind]:
        return None
    return kind


def _surest(kinds: Mapping[str, float]) -> str | None:
    """Return the most probable kind, where it is sure."""
    together = sum(kinds.values())
    best = max(kinds, key=lambda kind: kinds[kind], default=None)
    return best if best and together >= LEAST_OF_ALL and kinds[best] >= SURE_FROM * together else None


def _probabilities(task: Task, name: str) -> dict[str, float]:
    """Return how probable each kind's word is after a name.

    None of them is returned if the model's context has no room for the examples, or two words begin alike.
    """
    told = [f"{example} is the name of a {kind}." for example, kind in EXAMPLES.items() if example != name]
    asked, kinds = " ".join([*told, f"{name} is the name of a"]), list(EXAMPLES.values())
    if task.context is not None and len(task.encode_input(asked)) >= task.context:
        return {}
    first = [task.encode(asked, kind).target[0] for kind in kinds]
    if len(set(first)) < len(first):
        return {}
    return dict(zip(kinds, next_tokens(task, [asked])[0, first].tolist(), strict=True))
