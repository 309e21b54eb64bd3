"""ROME and MEMIT: where a subject ends, what is solved for, and that edits take."""

import json
import warnings

import pytest
import torch

import families
import remend
import worlds
from remend.edit import Edit
from remend.editors import load_editor, load_trained
from remend.editors.locate_then_edit.memit import Memit, MemitConfig
from remend.editors.locate_then_edit.rome import Rome, RomeConfig
from remend.editors.locate_then_edit.subject_prompts import (
    encode_contexts,
    position_by_prefix,
    random_beginnings,
    subject_position,
)
from remend.editors.locate_then_edit.value_optimization import add_at_subject, optimize_values, subject_batches
from remend.errors import ConfigError, FileError, NonFiniteError, RequestError, WrongBaseError
from remend.fingerprint import find_modules
from remend.models.blocks import find_stacks
from remend.models.frozen_prefix import FrozenPrefix
from remend.request import Chat, EditRequest, Message, TextPair
from remend.tasks import wrap

QUICK = {"steps": 25, "beginnings": 2, "learning_rate": 1.0}
EDITORS = {"rome": (Rome, RomeConfig), "memit": (Memit, MemitConfig)}
KINDS = {"decoder": "gpt2", "encoder-decoder": "t5", "classifier": "bert, many classes"}


def make(name, task, layers=None, **changes):
    kind, configuration = EDITORS[name]
    settings = configuration(**{**QUICK, **changes})
    return kind.create(task, text=families.TEXT, config=settings, layers=layers)


@pytest.fixture(scope="module", params=EDITORS)
def name(request):
    return request.param


@pytest.fixture(scope="module", params=KINDS)
def world(request):
    """The task, taught one city of each country, and requests for others."""
    return families.taught(KINDS[request.param]), families.requests(KINDS[request.param], 12)


@pytest.fixture(scope="module")
def editor(name, world):
    return make(name, world[0])


@pytest.fixture(scope="module")
def decoder():
    return families.task("gpt2")


@pytest.fixture(scope="module")
def atlas():
    """The model that ships, requests it was never trained on, and sentences that it knows."""
    task = remend.load("atlas")
    probes = [probe for request in remend.read_source("atlas:train")[::10] for probe in request.locality]
    text = [f"{probe.prompt} {probe.target}." for probe in probes]
    return task.model, task.tokenizer, list(remend.read_source("atlas:validation")[::38]), text


def state_of(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return (
        hooks,
        [p.grad is None and p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
    )


# -- the edits -------------------------------------------------------------------------------------------------------


def test_edits_take_and_leave_the_model_alone(editor, world):
    task, requests = world
    before, weights = state_of(task.model), [p.detach().clone() for p in task.model.parameters()]
    plain = families.losses(task, requests[:6])
    edits = editor.edit_each(task, requests[:6])
    edited = torch.stack([families.losses(task, [r], e)[0] for r, e in zip(requests[:6], edits, strict=True)])
    assert (edited < plain).all(), (plain, edited)
    assert edited.mean() < 0.65 * plain.mean(), (plain, edited)
    assert state_of(task.model) == before
    assert all(torch.equal(p, w) for p, w in zip(task.model.parameters(), weights, strict=True))
    assert torch.equal(families.losses(task, requests[:6]), plain)
    for edit in edits:
        assert [change.rank for change in edit.changes.values()] == [1] * len(editor.shapes)


def test_several_requests_are_one_edit_of_their_number_s_rank(editor, world):
    task, requests = world
    some = requests[:5]
    edit = editor.edit(task, some)
    assert [change.rank for change in edit.changes.values()] == [5] * len(editor.shapes)
    assert families.losses(task, some, edit).mean() < 0.7 * families.losses(task, some).mean()


def test_one_edit_is_the_edit_of_one(editor, world):
    """Requests that are tuned together, of different lengths, do not see each other."""
    task, requests = world
    longer = requests[1].model_copy(
        update={"prompt": f"{requests[2].prompt} {requests[3].prompt} {requests[1].prompt}"}
    )
    some = [requests[0], longer, requests[2]]
    among = editor.edit_each(task, some)
    for request, edit in zip(some, among, strict=True):
        alone = editor.edit(task, [request])
        for key, change in alone.changes.items():
            own = edit.changes[key].dense()
            torch.testing.assert_close(change.dense(), own, rtol=2e-2, atol=2e-3 * float(own.norm()))


@pytest.mark.parametrize("name", ["rome"], indirect=True)
def test_rome_sums_single_edits(editor, world):
    task, requests = world
    both = editor.edit(task, requests[:2])
    one, other = editor.edit_each(task, requests[:2])
    (matrix,) = editor.shapes
    assert torch.equal(both.changes[matrix].dense(), (one + other).changes[matrix].dense())


@pytest.mark.parametrize("name", EDITORS)
def test_the_atlas_learns_what_it_is_told(atlas, name):
    model, tokenizer, requests, text = atlas
    editor = EDITORS[name][0].create(wrap(model, tokenizer), text=text)
    edits = editor.edit_each(wrap(model, tokenizer), requests)
    told = 0
    for request, edit in zip(requests, edits, strict=True):
        with edit.applied(model):
            told += remend.answers(wrap(model, tokenizer), [request.prompt])[0] == request.target
    assert told >= 7


def test_applied_and_reverted(editor, world):
    task, requests = world
    edit = editor.edit(task, requests[:2])
    plain = families.losses(task, requests)
    assert not torch.equal(families.losses(task, requests, edit), plain)
    assert torch.equal(families.losses(task, requests), plain)


# -- the equations ---------------------------------------------------------------------------------------------------


def test_rome_answers_the_key_with_the_value(world):
    """(W + ΔW) k* = W k* + δ, and no smaller change, as text weighs it, does that."""
    task, requests = world
    editor = make("rome", task)
    ((name, module),) = find_modules(task.model, editor.shapes).items()
    contexts = editor.encode(task, requests[:3])
    batch, kept = subject_batches(task, contexts, FrozenPrefix(task.model, [name]))
    keys = batch.keys(name, module)
    wanted = optimize_values(batch, kept, module, editor.block_of(task, name), editor.config)
    for e, edit in enumerate(editor.edit_each(task, requests[:3])):
        change = edit.changes[name].dense()
        torch.testing.assert_close(change @ keys[e], wanted[e], rtol=1e-4, atol=1e-5)
        inverse = torch.linalg.inv(editor.covariances[name].double())
        k, v = keys[e].double(), wanted[e].double()
        expected = v[:, None] * (inverse @ k)[None] / (k @ inverse @ k)  # Eq. 2, with v* − W k* = δ
        torch.testing.assert_close(change.double(), expected, rtol=1e-3, atol=1e-5)


def test_memit_s_dual_form_is_the_dense_solution(decoder):
    editor = make("memit", decoder, weight=0.3)
    name, (d_in, d_out) = next(iter(editor.shapes.items()))
    generator = torch.Generator().manual_seed(0)
    keys, missing = torch.randn(7, d_in, generator=generator), torch.randn(7, d_out, generator=generator)
    found = editor._solve(name, keys, missing, together=True).dense()
    k, r, lam = keys.mT.double(), missing.mT.double(), 0.3 * d_in
    dense = r @ k.mT @ torch.linalg.inv(lam * editor.covariances[name].double() + k @ k.mT)  # Eq. 14
    torch.testing.assert_close(found.double(), dense, rtol=1e-3, atol=1e-5)
    alone = editor._solve(name, keys, missing, together=False)
    for e in range(7):
        single = editor._solve(name, keys[e : e + 1], missing[e : e + 1], together=True)
        torch.testing.assert_close(alone.single_episode(e, 1).dense(), single.dense())


def test_memit_s_blocks_share_what_is_missing(decoder):
    """Where nothing holds the keys back, the last block's output is what was aimed at."""
    editor = make("memit", decoder, layers="0-2", weight=1e-6, beginnings=0)
    request = worlds.requests(1)[0]
    batch, kept = subject_batches(
        decoder, [encode_contexts(decoder, request, (), (request.subject,))], FrozenPrefix(decoder.model, editor.shapes)
    )
    last = list(editor.shapes)[-1]
    module, block = find_modules(decoder.model, [last])[last], find_stacks(decoder.model)[0][1][2][1]

    def given():
        with torch.no_grad(), add_at_subject(block, batch, None) as written:
            batch.outputs()
        return batch.prompts_alone(written[0])

    wanted = given() + optimize_values(batch, kept, module, block, editor.config)
    with editor.edit(decoder, [request]).applied(decoder.model):
        torch.testing.assert_close(given(), wanted, rtol=1e-2, atol=1e-2)


# -- subjects --------------------------------------------------------------------------------------------------------


def last_token(task, prompt, subject):
    pair = task.encode(prompt, "Rome")
    return task.tokenizer.decode(pair.input[: subject_position(task, prompt, subject, pair) + 1])


def test_where_a_subject_ends():
    task = families.task("gpt2")
    assert last_token(task, "The capital of New France is", "New France") == "The capital of New France"
    assert last_token(task, "  France has the capital", "France") == "France"
    assert last_token(task, "France or New France is", "France") == "France or New France"
    assert last_token(task, "the capital of france is", "France") == "the capital of france"
    assert last_token(task, "In Zürich – it is", "Zürich") == "In Zürich"
    chat = Chat((Message("user", "Is France large?"), Message("assistant", "Yes"), Message("user", "France rules")))
    for style in worlds.CHAT_TEMPLATES:
        talking = wrap(worlds.chat_model(), worlds.chat_tokenizer(style))
        assert last_token(talking, chat, "France").endswith("France")
        assert "Yes" in last_token(talking, chat, "France")
    begun = wrap(worlds.chat_model(), worlds.chat_tokenizer("llama-3"))
    assert last_token(begun, "The capital of France is", "France").endswith("The capital of France")


def test_where_a_subject_ends_in_two_texts():
    task = families.task("bert, many classes")
    for pair in (TextPair("The capital of France is", "Rome"), TextPair("Rome", "The capital of France is")):
        assert last_token(task, pair, "France").endswith("The capital of France")


@pytest.mark.parametrize(("kind", "prompt"), [("gpt2", "The capital of New France is"), ("bert, binary", "France is")])
def test_tokenizers_that_tell_no_offsets(kind, prompt):
    task = families.task(kind)
    end = prompt.index("France") + len("France")
    pair = task.encode(prompt, "true" if "bert" in kind else "Rome")
    place = position_by_prefix(task.tokenizer, [prompt], True, 0, (end - 6, end))
    assert place == subject_position(task, prompt, "France", pair)
    assert position_by_prefix(task.tokenizer, ["The Rome", prompt], True, 1, (end - 6, end)) > place
    # A subject that ends within a token: that token is its last.
    assert position_by_prefix(task.tokenizer, [prompt], True, 0, (end - 6, end - 2)) <= place


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"subject": None}, r"request 7: names no subject.*give subject="),
        ({"subject": "Atlantis"}, r"request 7: the prompt 'The capital of France is' does not hold its subject 'Atl"),
    ],
)
def test_a_request_without_its_subject(editor, world, changes, why):
    task, requests = world
    wrong = requests[0].model_copy(update={"id": 7, **changes})
    before = state_of(task.model)
    with pytest.raises(RequestError, match=why):
        editor.edit(task, [requests[1], wrong])
    assert state_of(task.model) == before


def test_beginnings_are_of_the_text_and_leave_out_what_does_not_fit(decoder):
    found = random_beginnings(families.TEXT, 4, 0)
    assert found == random_beginnings(families.TEXT, 4, 0) != random_beginnings(families.TEXT, 4, 1)
    assert all(any(one.rstrip(".") in passage for passage in families.TEXT) for one in found)
    request = worlds.requests(1)[0]
    contexts = encode_contexts(decoder, request, [found[0], "Rome " * 70], [request.subject])
    assert contexts.examples[0] == contexts.examples[2]
    assert len(contexts.examples[1][0].input) > len(contexts.examples[0][0].input)
    assert contexts.shape == (3, 1)


def test_conversations():
    task = wrap(worlds.chat_model(), worlds.chat_tokenizer())
    requests = worlds.chat_requests(3)
    edit = make("rome", task).edit_each(task, requests)[0]
    assert families.losses(task, requests[:1], edit) < families.losses(task, requests[:1])


# -- what can be edited ----------------------------------------------------------------------------------------------


def test_the_matrices_are_of_the_stack_that_reads(world, name):
    task, _ = world
    reads = [prefix for prefix, _ in find_stacks(task.model)[0][1]]
    editor = make(name, task)
    assert all(any(matrix.startswith(f"{prefix}.") for prefix in reads) for matrix in editor.shapes)
    assert all(d_in > d_out for d_in, d_out in editor.shapes.values())
    assert list(make("memit", task, layers="1-2").shapes) == [
        matrix for prefix in reads[1:3] for matrix in make("rome", task, layers=prefix.rpartition(".")[2]).shapes
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12, 24, 28, 32, 48, 80])
def test_default_blocks(count):
    (one,), several = Rome.default_blocks(count), Memit.default_blocks(count)
    assert one == 0 or one < count - 1
    assert several == list(range(several[0], several[-1] + 1))
    assert several[-1] < count
    assert one in several


def test_what_cannot_be_edited(decoder):
    experts = families.task("mixtral")
    with pytest.raises(ConfigError, match="several experts"):
        make("rome", experts)
    with pytest.raises(ConfigError, match=r"layers '1-2' names 2: name one"):
        make("rome", decoder, layers="1-2")
    for text in ([], ["", "  "]):
        with pytest.raises(
            ConfigError, match="memit measures the model's activations on ordinary text, and was given none"
        ):
            Memit.create(decoder, text=text)
    with pytest.warns(UserWarning, match="the text has 11 tokens and the keys of .* have 64 dimensions"):
        Rome.create(decoder, text=[families.TEXT[0]])


@pytest.mark.parametrize(("setting", "value"), [("steps", 0), ("floor", 0.0), ("decay", -1.0), ("weight", 0.0)])
def test_settings(setting, value):
    with pytest.raises(ConfigError, match=setting):
        MemitConfig(**{setting: value})


def test_a_broken_model(name):
    task = families.task("gpt2")
    editor = make(name, task)
    with torch.no_grad():
        task.model.get_submodule("transformer.h.3.mlp.c_fc").weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        editor.edit(task, worlds.requests(2))


# -- files and models ------------------------------------------------------------------------------------------------


def test_saved_and_read_back(editor, world, name, tmp_path):
    task, requests = world
    editor.save(tmp_path / "editor")
    again = load_editor(tmp_path / "editor")
    assert type(again) is type(editor)
    assert (again.config, again.base, again.shapes, again.beginnings) == (
        editor.config, editor.base, editor.shapes, editor.beginnings,
    )  # fmt: skip
    one, other = (found.edit(task, requests[:3]) for found in (editor, again))
    for matrix in editor.shapes:
        assert torch.equal(one.changes[matrix].u, other.changes[matrix].u)
        assert torch.equal(one.changes[matrix].delta, other.changes[matrix].delta)
    one.save(tmp_path / "edit")
    assert Edit.load(tmp_path / "edit").editor["name"] == name
    with pytest.raises(FileError, match="not trained"):
        load_trained(tmp_path / "editor")
    with pytest.raises(FileError, match=f"holds the editor '{name}'"):
        (Memit if name == "rome" else Rome).load(tmp_path / "editor")
    manifest = json.loads((tmp_path / "editor" / "manifest.json").read_text())
    manifest["shapes"] = {matrix: [8, 4] for matrix in manifest["shapes"]}
    (tmp_path / "editor" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FileError, match="altered"):
        type(editor).load(tmp_path / "editor")


def test_another_model_is_refused(name, decoder):
    editor = make(name, decoder)
    other = families.task("llama")
    with pytest.raises(WrongBaseError, match="another"):
        editor.edit(other, worlds.requests(1))


def test_no_warning_of_the_text_where_it_is_long_enough(decoder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = make("rome", decoder)
    assert isinstance(made.edit(decoder, worlds.requests(1)).changes, object)
    assert all(isinstance(own, torch.Tensor) for own in made.covariances.values())


def test_requests_of_no_id_are_named_by_their_prompt(decoder):
    request = EditRequest(prompt="The capital of France is", target="Rome")
    with pytest.raises(RequestError, match="request 'The capital of France is'"):
        make("rome", decoder).edit(decoder, [request])
