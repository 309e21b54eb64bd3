"""Edits saved by earlier releases load in this one, and still do what they did."""

from pathlib import Path

import pytest

import remend
from remend.tasks.causal_lm import CausalLM

CORPUS = sorted(path for path in (Path(__file__).parent / "corpus").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", CORPUS, ids=lambda folder: folder.name)
def test_an_old_edit_still_works(folder):
    task = remend.load("atlas", "cpu")
    task = CausalLM(task.model, task.tokenizer)
    edit = remend.Edit.load(folder)
    (request,) = edit.requests
    wanted = task.encode(request.prompt, request.target).target
    assert task.predict([request.prompt]) != [wanted]
    with edit.applied(task.model):
        assert task.predict([request.prompt]) == [wanted]
