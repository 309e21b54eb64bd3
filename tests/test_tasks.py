"""A kind of model that another package adds: its inputs, its edits and their evaluation, without a change of remend."""

import json
import sys

import pytest
import torch
from torch import nn

import remend
from remend.editors import make
from remend.errors import ModelError, RequestError
from remend.registries import TASKS
from remend.request import parse_request

CODE = '''
"""Classifiers of the rows of a table."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from remend.registries import TaskEntry
from remend.request import Input
from remend.tasks.base import Batch, Example, Task
from remend.tasks.hashable_tensor import TensorInput


@dataclass(frozen=True)
class Row(Input):
    key: ClassVar[str] = "row"
    cells: tuple

    @classmethod
    def from_json(cls, value):
        if not isinstance(value, dict):
            raise ValueError(f"should be an object of columns, not {value!r}")
        return cls(tuple(sorted(value.items())))

    def to_json(self):
        return dict(self.cells)


class Columns(tuple):
    """The names of a table's columns: the processor."""


class TableClassification(Task):
    kind = "table-classification"
    output_size = 2
    state_bytes = 64

    @classmethod
    def accepts(cls, model, processor):
        return isinstance(processor, Columns)

    def encode_input(self, prompt):
        return TensorInput(torch.tensor([dict(prompt.cells)[column] for column in self.processor]))

    def encode_target(self, encoded, prompt, target):
        return (("no", "yes").index(target),)

    def collate(self, examples):
        rows = len(examples)
        inputs = {"x": torch.stack([example.input.tensor for example in examples])}
        target = torch.tensor([example.target[0] for example in examples])
        return Batch(inputs, torch.ones(rows, 1).bool(), torch.arange(rows), torch.zeros(rows).long(), target)

    def states_length(self, example, stack):
        return None

    def outputs(self, batch):
        return self.model(batch.inputs["x"])[batch.row]

    def predict(self, prompts, max_new_tokens=32, batch_size=64):
        examples = [Example(self.encode_input(prompt), (0,)) for prompt in prompts]
        with torch.no_grad():
            return [(label,) for label in self.outputs(self.collate(examples)).argmax(-1).tolist()]

    def decode(self, answer):
        return ("no", "yes")[answer[0]]

    def ordinary_examples(self, text=(), seed=0, count=256):
        generator = torch.Generator().manual_seed(seed)
        return [Example(TensorInput(row), (0,)) for row in torch.randn(64, len(self.processor), generator=generator)]


ENTRY = TaskEntry("table", TableClassification, "Rows of tables.", input_key="row", input_type=Row)
'''


def row(**columns):
    return {"row": columns, "target": "yes"}


def test_a_kind_of_model_is_added_from_outside(other_package, tmp_path):
    other_package(TASKS, CODE, table="other_package:ENTRY")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)).eval()
    import other_package as package

    task = remend.wrap(model, package.Columns(("age", "height")))
    assert task.kind == "table-classification"
    written = {
        **row(age=0.5, height=1.0),
        "paraphrases": [{"age": 0.6, "height": 1.0}],
        "locality": [row(age=9.0, height=9.0)],
    }
    request = parse_request(json.dumps(written), "here")
    assert isinstance(request.locality[0].prompt, package.Row)
    assert parse_request(json.dumps(request.to_json()), "again") == request
    (before,) = remend.answers(task, [request.prompt])
    request = request.model_copy(update={"target": {"no": "yes", "yes": "no"}[before]})
    editor = make("ridge", task)
    edit = editor.edit(task, [request])
    edit.save(tmp_path / "edit")
    with remend.Edit.load(tmp_path / "edit").applied(task):
        assert remend.answers(task, [request.prompt]) == [request.target]
    assert remend.answers(task, [request.prompt]) == [before]
    metrics = remend.evaluate(task, editor, [request]).metrics()
    assert metrics["reliability"]["generated"].mean == 1
    assert metrics.keys() >= {"generality", "locality_far"}
    with pytest.raises(RequestError, match="row: should be an object of columns, not 7"):
        parse_request('{"row": 7, "target": "yes"}', "here")


def test_a_model_of_no_known_kind_is_refused():
    with pytest.raises(
        ModelError, match="no task accepts a Linear with NoneType as its processor: give a language model"
    ):
        remend.wrap(nn.Linear(2, 2))
    assert "other_package" not in sys.modules
