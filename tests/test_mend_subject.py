"""MEND at the subject: it learns, answers only its subject, is saved and loaded, and refuses what it cannot edit."""

from dataclasses import replace

import pytest
import torch
import transformers as hf

import families
import worlds
from remend.editors import load_editor
from remend.editors.mend.subject import SubjectExample, SubjectMend, SubjectMendConfig
from remend.editors.mend.value_network import Inputs, ValueNetwork
from remend.errors import ConfigError, RequestError
from remend.tasks import wrap
from remend.training import TrainingConfig, train
from remend.training.episodes import Episodes

NETWORK = SubjectMendConfig(steps=2, rank=32)
SETTINGS = TrainingConfig(
    batch_size=8,
    learning_rate=3e-3,
    alpha_learning_rate=3e-3,
    edit_weight=1.0,
    max_steps=60,
    validate_every=15,
)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def world(request):
    """The task, taught one city of each country, and requests for others."""
    return families.taught(request.param), families.requests(request.param, 24)


def trained(task, requests, network=NETWORK, settings=SETTINGS, **more):
    editor = SubjectMend.create(task, network)
    return train(task, requests, config=settings, editor=editor, text=families.TEXT, **more)


@pytest.fixture(scope="module", params=["units", "low-rank"])
def editor(world, request):
    return trained(*world, network=replace(NETWORK, kind=request.param))


def test_training_makes_edits_of_unseen_subjects_better(editor):
    history = editor.trained["history"]
    share = 0.97 if editor.config.kind == "units" else 0.995
    assert min(entry["edit"] for entry in history) < share * history[0]["edit"]


def test_an_edit_is_one_unit_that_answers_its_subject(world, editor):
    task, requests = world
    weights = [parameter.clone() for parameter in task.model.parameters()]
    plain = families.losses(task, requests)
    for number, edit in enumerate(editor.edit_each(task, requests[:5])):
        (change,) = edit.changes.values()
        assert (change.rank, bool(change.reads)) == (1, editor.config.kind == "units")
        moved = (families.losses(task, requests, edit) - plain).abs()
        others = [i for i, request in enumerate(requests) if request.subject != requests[number].subject]
        if editor.config.kind == "units":  # a linear change of a matrix of 16 columns answers every other key, too
            assert moved[others].median() < 0.5 * moved[number]
    assert all(torch.equal(p, w) for p, w in zip(task.model.parameters(), weights, strict=True))


def test_saved_and_loaded(world, editor, tmp_path):
    task, requests = world
    loaded = load_editor(editor.save(tmp_path / "editor"))
    assert loaded.trained == editor.trained
    for one, other in zip(editor.edit_each(task, requests[:3]), loaded.edit_each(task, requests[:3]), strict=True):
        for name, change in one.changes.items():
            assert torch.equal(change.u, other.changes[name].u)
            assert torch.equal(change.delta, other.changes[name].delta)


def test_requests_of_one_subject_share_a_unit_and_a_subject_is_found(world, editor):
    task, requests = world
    first = requests[0]
    again = first.model_copy(update={"prompt": first.paraphrases[0], "target": requests[1].target})
    other = next(request for request in requests if request.subject != first.subject)
    (change,) = editor.edit(task, [first, again, other]).changes.values()
    assert change.rank == 2
    (named,), (unnamed,) = (
        editor.edit(task, [request]).changes.values() for request in (first, first.model_copy(update={"subject": None}))
    )
    assert torch.equal(named.delta, unnamed.delta)


def test_given_paraphrases_are_read_with_the_prompt(world, editor):
    task, requests = world
    first, second = requests[:2]
    with_given = [r.model_copy(update={"given_paraphrases": r.paraphrases[:1], "paraphrases": ()}) for r in requests]
    asked = [request.model_copy(update={"prompt": request.paraphrases[0]}) for request in requests]
    after = []
    for made_of in (with_given, requests):
        edits = editor.edit_each(task, made_of)
        after.append(torch.cat([families.losses(task, [of], e) for of, e in zip(asked, edits, strict=True)]).mean())
    assert after[0] < after[1]  # on average: the networks were trained for seconds
    given = with_given[0]
    read, alone = (editor.edit(task, [request]) for request in (given, first))
    ((name, change),) = read.changes.items()
    assert not torch.equal(change.delta, alone.changes[name].delta)
    # Requests with and without are edited together as each alone.
    together = editor.edit_each(task, [given, second])
    for one, other in zip(together, (read, editor.edit(task, [second])), strict=True):
        torch.testing.assert_close(one.changes[name].delta, other.changes[name].delta, rtol=1e-3, atol=1e-4)
    with pytest.raises(RequestError, match="does not hold its subject"):
        editor.edit(task, [first.model_copy(update={"given_paraphrases": ("Another question",)})])


def test_episodes_hold_the_place_of_the_subject(world):
    task, requests = world
    editor = SubjectMend.create(task, NETWORK)
    edit = Episodes(task, requests, seed=0, editor=editor).episodes[0].edit
    assert isinstance(edit, SubjectExample)
    assert task.decode(edit.input[: edit.position + 1]).endswith(str(requests[0].subject))
    with pytest.raises(RequestError, match="does not hold its subject"):
        editor.encode_edit(task, requests[0].model_copy(update={"subject": "Atlantis"}))


def test_where_answers_do_not_end_paraphrases_teach_the_same_word_end_as_the_edit_pair(world, monkeypatch):
    task, requests = world
    editor = SubjectMend.create(task, NETWORK)
    before = Episodes(task, requests, seed=0, editor=editor).episodes
    assert all(other.target == episode.edit.target for episode in before for other in episode.neighbours)
    monkeypatch.setattr(type(task), "ends_answer", lambda self, prompt: False)
    for episode, request in zip(Episodes(task, requests, seed=0, editor=editor).episodes, requests, strict=True):
        taught = task.encode(request.prompt, request.target).target
        assert episode.edit.target[:-1] == taught
        assert [other.target for other in episode.neighbours] == [episode.edit.target] * len(episode.neighbours)
        assert isinstance(episode.edit, SubjectExample)


def test_an_untrained_network_is_the_identity_on_the_gradient():
    torch.manual_seed(0)
    inputs = Inputs(torch.randn(3, 6), *(torch.randn(3, 4) for _ in range(4)), torch.rand(3))
    found = ValueNetwork(2, 6, 4, 8)(inputs, 1)
    torch.testing.assert_close(found, inputs.delta / inputs.delta.square().mean(1, keepdim=True).sqrt())


def test_models_that_it_cannot_edit_are_refused():
    with pytest.raises(ConfigError, match="where a decoder has read the subject"):
        SubjectMend.create(families.task("t5"))
    config = hf.OPTConfig(
        vocab_size=len(worlds.tokenizer()), hidden_size=16, word_embed_proj_dim=8, num_hidden_layers=3,
        ffn_dim=32, num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="8 and 16 dimensions"):
        SubjectMend.create(wrap(hf.OPTForCausalLM(config), worlds.tokenizer()))
