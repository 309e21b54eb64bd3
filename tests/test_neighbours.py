"""What an edit changes next to its request, where no near prompts are named."""

import torch

import remend
from remend.core.low_rank import LowRank
from remend.edit import Edit
from remend.evaluation.neighbours import measure_neighbours
from remend.evaluation.robustness import MIN_NEIGHBOURS, measure_robustness
from remend.fingerprint import ModelFingerprint
from remend.request import Chat, EditRequest

NAME = "transformer.h.2.mlp.c_proj"
REQUEST = EditRequest(prompt="The capital of Canada is", target="Toronto", subject="Canada")


def edit(task, size):
    d_in, d_out = task.model.get_submodule(NAME).weight.shape
    draw = torch.Generator().manual_seed(0)
    factors = LowRank(torch.randn(1, d_in, generator=draw), size * torch.randn(1, d_out, generator=draw))
    return Edit({NAME: factors}, ModelFingerprint.of(task.model, [NAME]), (REQUEST,))


def test_other_subjects_and_other_statements_are_compared():
    task = remend.load("atlas")
    kinds = measure_neighbours(task, edit(task, 0.0), REQUEST)
    assert [kind.kind for kind in kinds] == ["other subjects", "other statements about Canada"]
    assert all(kind.prompts > 0 and kind.stays == 1 and not kind.changed for kind in kinds)
    harmful = measure_neighbours(task, edit(task, 100.0), REQUEST)
    assert [kind.prompts for kind in harmful] == [kind.prompts for kind in kinds]
    assert all(kind.stays < MIN_NEIGHBOURS for kind in harmful)
    changed = harmful[1].changed[0]
    assert "Canada" in changed.prompt
    assert changed.before != changed.after
    assert measure_neighbours(task, edit(task, 100.0), REQUEST.model_copy(update={"subject": None})) == harmful


def test_an_edit_that_changes_its_neighbours_is_doubtful():
    task = remend.load("atlas")
    doubts = measure_robustness(task, edit(task, 100.0), [REQUEST]).doubts
    assert "80% of other statements about Canada should stay" in doubts
    assert not any("should stay" in doubt for doubt in measure_robustness(task, edit(task, 0.0), [REQUEST]).doubts)


def test_questions_and_chats_are_not_measured():
    task = remend.load("atlas")
    for prompt in (
        "What is the capital of Canada?",
        Chat.of([{"role": "user", "content": "The capital of Canada is"}]),
    ):
        assert measure_neighbours(task, edit(task, 100.0), REQUEST.model_copy(update={"prompt": prompt})) == []
