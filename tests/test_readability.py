"""Whether an edit's numbers tell whom it is about."""

from dataclasses import replace

import pytest
import torch

import remend
import worlds
from remend.core.low_rank import LowRank
from remend.core.response import Response
from remend.edit import Edit
from remend.evaluation import evaluate
from remend.evaluation.readability import DECOYS, heard, singles_out
from remend.fingerprint import ModelFingerprint
from remend.tasks.base import Example

NAME = "transformer.h.2.mlp.c_proj"
NAMES = ["Canada", "Peru", "Kenya", "Norway", "Japan", "Italy", "Egypt", "Spain", "Poland", "Brazil"]


def listening_to(task, name):
    """Return an edit whose direction is what the last token of a name has and the other names do not."""
    layer = task.model.get_submodule(NAME)
    inputs = []
    handle = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0][0, -1]))
    with torch.no_grad():
        for each in NAMES:
            task.model(torch.tensor([task.encode_input(each)]))
    handle.remove()
    stacked = torch.stack(inputs).double()
    others = torch.cat([stacked[: NAMES.index(name)], stacked[NAMES.index(name) + 1 :]])
    own = stacked[NAMES.index(name)]
    # Least squares: what is left of the name's input outside the span of the others'.
    u = own - others.T @ torch.linalg.lstsq(others.T, own[:, None]).solution[:, 0]
    change = LowRank(u[None].float(), torch.ones(1, layer.weight.shape[1]))
    return Edit({NAME: change}, ModelFingerprint.of(task.model, [NAME]))


def test_the_name_that_an_edit_listens_to_stands_out():
    task = remend.load("atlas")
    edit = listening_to(task, "Kenya")
    loud = {name: heard(task, edit, Example(task.encode_input(name), (0,))) for name in NAMES}
    assert max(loud, key=loud.get) == "Kenya"
    assert singles_out(task, edit, "Kenya", [name for name in NAMES if name != "Kenya"])
    assert not singles_out(task, edit, "Norway", [name for name in NAMES if name != "Norway"])


def test_a_unit_hears_one_sign_only():
    task = remend.load("atlas")
    edit = listening_to(task, "Kenya")
    (change,) = edit.changes.values()
    example = Example(task.encode_input("Kenya"), (0,))
    against = replace(edit, changes={NAME: replace(change, u=-change.u)})
    assert heard(task, against, example) == heard(task, edit, example), "a linear change answers to both"
    unit = Response("silu", beta=20.0)
    one, other = (
        replace(each, changes={NAME: replace(each.changes[NAME], response=unit, reads=NAME)})
        for each in (edit, against)
    )
    assert heard(task, one, example) == heard(task, edit, example)
    assert heard(task, other, example) < heard(task, one, example)


class Listening:
    """An editor whose edits listen to the request's own subject, or all to one."""

    def __init__(self, edits):
        self.edits = edits

    def edit_each(self, task, requests):
        return [self.edits[request.subject] for request in requests]


@pytest.mark.parametrize("own", [True, False])
def test_it_is_reported_of_edits_as_they_are(own):
    task = remend.load("atlas")
    requests = [
        request.model_copy(update={"prompt": f"The capital of {name} is", "target": "Toronto", "subject": name})
        for name, request in zip(NAMES, worlds.requests(len(NAMES)), strict=True)
    ]
    edits = {name: listening_to(task, name if own else "Canada") for name in NAMES}
    report = evaluate(task, Listening(edits), requests, max_new_tokens=2, perturbed=True, text_tokens=0)
    assert len(NAMES) == DECOYS + 1
    assert report.metrics()["readability"]["value"].mean == (1.0 if own else 0.1)
    assert all("readability" not in case.values for cases in report.baselines.values() for case in cases)
    few = evaluate(task, Listening(edits), requests[1:], max_new_tokens=2, perturbed=True, text_tokens=0)
    assert "readability" not in few.metrics(), "of fewer names a guess would find it more often"
