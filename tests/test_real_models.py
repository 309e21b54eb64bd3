"""One edit of a real language model. `make real` brings it; without it these tests are skipped."""

from pathlib import Path

import pytest
import torch

from remend import as_the_model_says, load
from remend.editors import default_editor, make, make_or_load
from remend.evaluation.continuations import measure_continuations
from remend.request import Chat, EditRequest, Message
from remend.tasks.wrapping import answers

FOLDER = Path(__file__).parent.parent / "build" / "real" / "smollm2"

pytestmark = pytest.mark.skipif(
    not (FOLDER / "source.json").is_file(), reason=f"{FOLDER} is missing: make real MODELS=smollm2"
)


@pytest.fixture(scope="module")
def task():
    return load(str(FOLDER), "cpu")


def test_it_knows_what_is_well_known(task):
    known = {
        "The capital of France is": "Paris",
        "The capital of Japan is": "Tokyo",
        "The chemical symbol for gold is": "Au",
    }
    assert [answer.split("\n")[0].strip(".") for answer in answers(task, list(known), 4)] == list(known.values())


@torch.no_grad()
def test_an_edit_takes_and_is_reverted_bit_for_bit(task):
    request = EditRequest(prompt="The capital of France is", target="Rome")
    before = {name: weight.clone() for name, weight in task.model.state_dict().items()}
    edit = make("finetune-local", task).edit(task, [request])
    handle = edit.merge(task.model)
    assert answers(task, [request.prompt], 4)[0].startswith("Rome")
    handle.revert()
    assert all(torch.equal(weight, before[name]) for name, weight in task.model.state_dict().items())
    assert answers(task, [request.prompt], 4)[0].startswith("Paris")


def test_the_default_editor_measures_once_and_edits(task, tmp_path, monkeypatch):
    monkeypatch.setenv("REMEND_CACHE", str(tmp_path))
    default = default_editor(task)
    assert (default.name, default.config.kind) == ("fit", "units")
    passages = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").split("\n\n")[:40]
    request = EditRequest(prompt="The capital of France is", target="Rome")
    said, edits = [], []
    for _ in range(2):
        editor = make_or_load(default.name, task, passages, config=default.config, announce=said.append)
        edits.append(editor.edit(task, [request]))
    assert [message.partition(" ")[2].split()[0].strip(",") for message in said] == ["once", "before"]
    first, second = (next(iter(edit.changes.values())) for edit in edits)
    assert torch.equal(first.delta, second.delta)
    with edits[1].applied(task.model):
        assert answers(task, [request.prompt], 4)[0].startswith("Rome")


def test_it_goes_on_after_completions_and_ends_its_turns(task):
    conversation = Chat((Message("user", "What is the capital of Australia?"),))
    assert not task.ends_answer("The capital of France is")
    assert task.encode("The capital of France is", "Rome").target == tuple(task.ids(" Rome", False))
    assert task.ends_answer(conversation)
    assert task.encode(conversation, "Sydney").target[-1] == task.chat.end
    request = EditRequest(prompt=conversation, target="Sydney")
    assert as_the_model_says(task, request).target == "The capital of Australia is Sydney."


def test_garbage_after_a_target_is_told(task):
    prompt = "The capital of France is"
    target = task.encode(prompt, "Rome").target
    texts = (
        " and is the largest city in the country.",
        " strugg strugg strugg strugg strugg",
        " Rome Rome Rome Rome Rome",
    )
    asked = [(prompt, target, (*target, *task.ids(text, False))) for text in texts]
    measured = measure_continuations(task, asked)
    assert [measured[item].sensible for item in asked] == [True, False, False]
