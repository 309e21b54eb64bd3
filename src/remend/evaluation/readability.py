"""``singles_out``: whether an edit's numbers give away whom it is about.

Who has the unedited model, an edit's factors and a list of names can run each name through the model and see to which
the edit listens the most. A file with an edit is then as confidential as what it is about, also without the request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from remend.core.capture import record_inputs
from remend.edit import Edit
from remend.fingerprint import find_modules
from remend.tasks.base import Example, Task

DECOYS = 9
"""Other names among which a subject is looked for; a guess finds it once in one more."""


def singles_out(task: Task, edit: Edit, subject: str, decoys: Sequence[str]) -> bool:
    """Tell whether an edit listens to its subject's name more than to any of the decoys, each as a text of its own.

    Args:
        task: the unedited model.
        edit: the edit.
        subject: whom it is about.
        decoys: other names.
    """
    own, *others = (heard(task, edit, Example(task.encode_input(name), (0,))) for name in (subject, *decoys))
    return own > max(others)


@torch.no_grad()
def heard(task: Task, edit: Edit, example: Example) -> float:
    """Return how much of what an edit listens to is in a text: the greatest u·x of its tokens, over all pairs.

    Of a linear change the size counts, since it answers to both signs; a unit answers to one. What it does not answer
    at all may be far below 0, where a threshold is part of u.
    """
    names = {name: change.reads or name for name, change in edit.changes.items()}
    modules = find_modules(task.model, list(dict.fromkeys(names.values())))
    batch = task.collate([example])
    inputs = record_inputs(task.model, modules, batch.rows, partial(task.outputs, batch))
    found = -math.inf
    for name, change in edit.changes.items():
        x = inputs[names[name]].x
        answers: Float[Tensor, "token pair"] = x.reshape(-1, x.shape[-1]) @ change.u.to(x).mT
        # Of changes of several weights each counts as far as its pairs add to the output.
        weights = change.delta.to(x).norm(dim=-1) if len(edit.changes) > 1 else torch.ones(change.rank, device=x.device)
        heard = answers.abs() if change.response.linear else answers
        found = max(found, float((heard * weights).max()))
    return found
