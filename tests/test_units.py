"""Hidden units as edits: beside a model, merged into wider MLPs, in files, summed; and refused where they cannot be."""

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

import families
import worlds
from families import block_names, unit_edit
from remend.apps.acceptance import AcceptanceCriteria, check_acceptance
from remend.apps.hub.model_card import render_model_card
from remend.apps.patch_registry import PatchRegistry
from remend.apps.studio import Workspace
from remend.apps.studio.html_fragments import matrices_html
from remend.apps.studio.workspace import reactions
from remend.cli import run
from remend.core.low_rank import LowRank, layer_names
from remend.core.low_rank_hooks import changes_applied
from remend.core.response import ACTIVATIONS, LINEAR, Response
from remend.edit import EDIT_FORMAT, RESPONSES_FORMAT, Edit
from remend.editors import Mend
from remend.errors import EditError, FileError, ModelError, PrecisionError, WrongBaseError
from remend.evaluation.interventions import SeparateEdits
from remend.fingerprint import ModelFingerprint, find_modules
from remend.formats import diff_checkpoints, save_adapter, save_merged
from remend.models import block_mlp
from remend.saved_folders import MANIFEST, read_manifest

KINDS = ["gpt2", "llama", "t5-gated", "opt", "bert, binary", "phi3", "bart"]
SILU = {"activation": "silu", "gated": True, "beta": 10.0, "threshold": 0.0}
PLACES = {
    # reads, down, activation, gated, whether there may be a threshold
    "gpt2": ("mlp.c_fc", "mlp.c_proj", "gelu_new", False, True),
    "gpt-neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "gelu", False, True),
    "falcon": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "gelu", False, False),
    "opt": ("fc1", "fc2", "relu", False, True),
    "bart": ("fc1", "fc2", "gelu", False, True),
    "llama": ("mlp.gate_proj", "mlp.down_proj", "silu", True, False),
    "gemma3": ("mlp.gate_proj", "mlp.down_proj", "gelu_new", True, False),
    "phi3": ("mlp.gate_up_proj", "mlp.down_proj", "silu", True, False),
    "t5": ("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo", "relu", False, False),
    "t5-gated": ("layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wo", "gelu_new", True, False),
    "bert, binary": ("intermediate.dense", "output.dense", "gelu", False, True),
    "modernbert, binary": ("mlp.Wi", "mlp.Wo", "gelu", True, False),
    "a class that no library knows": ("thinking.door", "thinking.slim", "sigmoid", True, True),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def task(kind):
    return families.task(kind)


@pytest.fixture
def model():
    return worlds.llama()


# -- responses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("gated", "threshold"), [(True, 0.0), (False, 0.3)])
def test_a_response_is_the_activation_with_1_at_the_key(activation, gated, threshold):
    response = Response(activation, gated, 5.0, threshold)
    q = torch.linspace(-2, 3, 41, dtype=torch.float64)
    beta = 1.0 if activation.startswith("relu") else 5.0
    inner = ACTIVATIONS[activation](beta * (q - threshold)) * (q if gated else 1)
    wanted = inner / ACTIVATIONS[activation](torch.tensor(beta * (1 - threshold), dtype=torch.float64))
    torch.testing.assert_close(response(q), wanted)
    torch.testing.assert_close(response(torch.ones(1)), torch.ones(1))
    assert Response.from_json(json.loads(json.dumps(response.to_json()))) == response


def test_there_is_one_way_to_say_that_a_response_is_linear_or_scale_free():
    assert Response.from_gate(0.0) is LINEAR
    assert Response("relu", beta=7.0) == Response("relu")
    for wrong, message in (
        ({"gated": True}, "name an activation"),
        ({"activation": "glu"}, "did you mean 'gelu'"),
        ({"activation": "silu", "beta": 0.0}, "a number above 0"),
        ({"activation": "silu", "beta": float("nan")}, "a number above 0"),
        ({"activation": "relu", "threshold": 1.0}, "from 0 to below 1"),
        ({"activation": "silu", "beta": 1e-4}, "by which its answer is divided"),
    ):
        with pytest.raises(EditError, match=message):
            Response(**wrong)


def test_responses_of_batched_units_have_gradients(model):
    mlp = block_mlp(model, block_names(model)[1])
    ids = torch.arange(3, 15).view(2, 6)
    torch.manual_seed(0)
    u, delta = (torch.randn(2, 3, 16, requires_grad=True) for _ in range(2))
    change = LowRank(u, delta, mlp.response(), reads=mlp.reads)
    modules = find_modules(model, layer_names({mlp.down: change}))
    with changes_applied(modules, {mlp.down: change}):
        together = model(ids).logits
    together.square().sum().backward()
    assert all(factor.grad.isfinite().all() and factor.grad.abs().sum() > 0 for factor in (u, delta))
    for episode in range(2):
        alone = LowRank(u[episode], delta[episode], change.response, reads=mlp.reads)
        with changes_applied(modules, {mlp.down: alone}):
            torch.testing.assert_close(model(ids[episode : episode + 1]).logits[0], together[episode])


# -- how MLPs compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PLACES)
def test_how_an_mlp_computes_is_found_out(family):
    model = families.make(family)
    block = block_names(model)[-2]
    mlp = block_mlp(model, block)
    reads, down, activation, gated, threshold = PLACES[family]
    assert (mlp.reads, mlp.down) == (f"{block}.{reads}", f"{block}.{down}")
    assert (mlp.activation, mlp.gated, mlp.threshold) == (activation, gated, threshold)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "quick_gelu", "silu", "relu2", "mish"])
def test_activations_are_told_apart_in_any_dtype(activation):
    for made in (worlds.llama(hidden_act=activation), worlds.gpt2(activation_function=activation)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            mlp = block_mlp(copy.deepcopy(made).to(dtype), block_names(made)[0])
            assert mlp.activation == activation


class Normed(nn.Module):
    """An activation that reads all units: no sum of units."""

    def forward(self, x):
        return torch.softmax(x, -1)


def test_mlps_that_hold_no_units_are_refused(model):
    with pytest.raises(ModelError, match="several experts"):
        block_mlp(families.make("mixtral"), "model.layers.1")
    model.model.layers[1].mlp.act_fn = Normed()
    with pytest.raises(ModelError, match="no known function"):
        block_mlp(model, "model.layers.1")
    model.model.layers[2].mlp.forward = lambda x: x
    with pytest.raises(ModelError, match="did not call"):
        block_mlp(model, "model.layers.2")


# -- on a model ------------------------------------------------------------------------------------------------------


def test_units_beside_the_model_are_those_of_a_wider_mlp(task, kind):
    """Beside the model and merged; taken off again bit for bit, the very parameters."""
    before = families.logits(task, kind)
    parameters = dict(task.model.named_parameters())
    values = {name: parameter.clone() for name, parameter in parameters.items()}
    shown = repr(task.model)
    edit = unit_edit(task.model)
    with edit.applied(task.model):
        expected = families.logits(task, kind)
    assert (expected - before).abs().max() > 1e-2
    with edit.merge(task.model) as merged:
        torch.testing.assert_close(families.logits(task, kind), expected, rtol=0, atol=1e-4)
        assert repr(task.model) != shown, "the MLPs are wider"
        assert max(merged.lost.values()) < 1e-6
        with pytest.raises(WrongBaseError, match="differ in this model"):
            edit.apply(task.model)
    assert repr(task.model) == shown
    for name, parameter in task.model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, values[name])
    torch.testing.assert_close(families.logits(task, kind), before, rtol=0, atol=0)


def test_a_sum_of_units_acts_like_both(task, kind, tmp_path):
    first, second = unit_edit(task.model), unit_edit(task.model, (1, 2), seed=1)
    with first.applied(task.model), second.applied(task.model):
        expected = families.logits(task, kind)
    total = first + second.scaled(2.0).scaled(0.5)
    assert [change.rank for change in total.changes.values()] == [3, 3]
    total.save(tmp_path / "edit")
    again = Edit.load(tmp_path / "edit")
    assert [(c.response, c.reads) for c in again.changes.values()] == [
        (c.response, c.reads) for c in total.changes.values()
    ]
    for edit in (total, again):
        with edit.applied(task.model):
            torch.testing.assert_close(families.logits(task, kind), expected, rtol=0, atol=1e-5)
        with edit.merge(task.model):
            torch.testing.assert_close(families.logits(task, kind), expected, rtol=0, atol=1e-4)


def test_a_copy_of_a_model_with_units_has_them_too(model):
    task = worlds.task(model)
    edit = unit_edit(model)
    handle = edit.apply(model)
    expected = families.logits(task, "llama")
    copied = copy.deepcopy(model)
    handle.revert()
    plain = families.logits(task, "llama")
    for _ in range(2):
        torch.testing.assert_close(families.logits(task, "llama", copied), expected)
    assert not torch.allclose(plain, expected)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "distilbert, binary", "modernbert, binary", "gpt-j", "gpt-neo"])
def test_a_checkpoint_with_units_is_an_ordinary_one(kind, tmp_path):
    """All MLPs of the checkpoint have one width, which its configuration says; the model is left as it was."""
    task = families.task(kind)
    edit = unit_edit(task.model)
    settings = ModelFingerprint.of(task.model, ()).config
    with edit.applied(task.model):
        expected = families.logits(task, kind)
    parameters = dict(task.model.named_parameters())
    save_merged(edit, tmp_path / "merged", task)
    loaded = type(task.model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(families.logits(task, kind, loaded), expected, rtol=0, atol=1e-4)
    width = block_mlp(task.model, block_names(task.model)[-1]).width
    assert {block_mlp(loaded, name).width for name in block_names(loaded)} == {width + 2}
    assert ModelFingerprint.of(task.model, ()).config == settings
    assert all(parameter is parameters[name] for name, parameter in task.model.named_parameters())
    with pytest.raises(EditError, match="reads 2 hidden units more"):
        diff_checkpoints(task.model, loaded)
    with pytest.raises(EditError, match=r"cannot be exported as an adapter.*--to merged"):
        save_adapter(edit, tmp_path / "adapter", task.model)


def test_the_encoder_of_a_checkpoint_stays_as_it_is(tmp_path):
    task = families.task("bart")
    save_merged(unit_edit(task.model), tmp_path / "merged", task)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["encoder_ffn_dim"], config["decoder_ffn_dim"]) == (40, 42)


@pytest.mark.parametrize("family", ["bloom", "a class that no library knows"])
def test_a_model_whose_width_is_no_setting_is_no_checkpoint(family, tmp_path):
    task = families.task(family)
    edit = unit_edit(task.model)
    with edit.applied(task.model):
        expected = families.logits(task, family)
    with edit.merge(task.model):
        torch.testing.assert_close(families.logits(task, family), expected, rtol=0, atol=1e-4)
    with pytest.raises(ModelError, match=r"no setting of \w+ is the width of the MLP"):
        save_merged(edit, tmp_path / "merged", task)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": {"m": {"activation": "silu"}}}, "response of m is malformed .*an object of activation, gated"),
        ({"responses": {"m": {**SILU, "beta": "10"}}}, "'beta' of a response should be float, it is '10'"),
        ({"responses": {"m": {**SILU, "gated": 1}}}, "'gated' of a response should be bool"),
        ({"responses": {"m": {**SILU, "activation": "swish"}}}, "there is no activation 'swish'"),
        ({"responses": {"n": SILU}}, "more is listed"),
        ({"responses": []}, "should be dict"),
        ({"reads": {"m": 3}}, "'reads' should hold a layer's name"),
        ({"reads": {"m": "elsewhere"}}, "does not cover"),
        ({"format": EDIT_FORMAT, "gates": {"m": 1.5}}, "from 0 to below 1"),
        ({"format": EDIT_FORMAT, "gates": {"m": True}}, "from 0 to below 1"),
    ],
)
def test_damaged_files_of_units_are_refused(change, message, tmp_path):
    small = {"m": LowRank(torch.ones(1, 2), torch.ones(1, 3), Response.from_json(SILU), reads="r")}
    Edit(small, ModelFingerprint("toy", "0", {"m": "0", "r": "1"})).save(tmp_path / "edit")
    manifest = json.loads((tmp_path / "edit" / MANIFEST).read_text())
    assert manifest["format"] == RESPONSES_FORMAT, "a release that would take units for a change of low rank refuses it"
    (tmp_path / "edit" / MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(FileError, match=message):
        Edit.load(tmp_path / "edit")


def test_files_with_gates_act_as_before(model, tmp_path):
    """As earlier releases wrote them: a threshold for each layer."""
    name = "model.layers.3.mlp.down_proj"
    change = LowRank(torch.randn(1, 40), torch.randn(1, 16))
    Edit({name: change}, ModelFingerprint.of(model, [name])).save(tmp_path / "edit")
    manifest = json.loads((tmp_path / "edit" / MANIFEST).read_text())
    assert manifest["format"] == EDIT_FORMAT
    (tmp_path / "edit" / MANIFEST).write_text(json.dumps({**manifest, "gates": {name: 0.25}}))
    (loaded,) = Edit.load(tmp_path / "edit").changes.values()
    x = torch.randn(9, 40)
    assert torch.equal(loaded.output_change(x), torch.relu(x @ change.u.mT - 0.25) / 0.75 @ change.delta)


def test_a_card_and_the_commands_say_units(model, tmp_path, capsys):
    edit = unit_edit(model)
    edit.save(tmp_path / "edit")
    assert "down_proj: 2 units (gated silu, beta 4)" in repr(edit)
    card = render_model_card(read_manifest(tmp_path / "edit", RESPONSES_FORMAT), "me/fix")
    assert "Hidden units that are added" in card
    assert "2 units" in card
    assert "--to merged" in card
    assert run(["show", str(tmp_path / "edit")]) == 0
    assert "2 units" in capsys.readouterr().out
    model.save_pretrained(tmp_path / "model")
    worlds.tokenizer().save_pretrained(tmp_path / "model")
    export = ["export", str(tmp_path / "edit"), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    assert run([*export, "--to", "peft"]) == 1
    assert "--to merged" in capsys.readouterr().err
    assert run([*export, "--to", "merged", "--rank", "1"]) == 1
    assert "cannot be compressed" in capsys.readouterr().err
    assert run([*export, "--to", "merged"]) == 0
    assert "3 hidden units more" in capsys.readouterr().out
    assert run(["import", str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "i")]) == 1
    assert "wider" in capsys.readouterr().err


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_units_that_an_mlp_cannot_hold_act_beside_it_and_are_not_merged(model):
    task, mlp = worlds.task(model), block_mlp(model, "model.layers.2")
    u, delta = torch.randn(1, 16), torch.randn(1, 16)
    base = ModelFingerprint.of(model, mlp.layers)
    plain, weights = families.logits(task, "llama"), copy.deepcopy(model.state_dict())
    for response, message in (
        (Response("silu"), "whose units are gated silu"),
        (Response("gelu", True), "whose units are gated silu"),
        (LINEAR, "whose units are gated silu"),
        (Response("silu", True, 5.0, 0.2), "has no biases"),
    ):
        edit = Edit({mlp.down: LowRank(u, delta, response, reads=mlp.reads)}, base)
        with edit.applied(model):
            assert not torch.allclose(families.logits(task, "llama"), plain)
        with pytest.raises(EditError, match=message):
            edit.merge(model)
    with pytest.raises(EditError, match="has no biases"):
        mlp.response(threshold=0.1)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_all_mlps_get_wider_or_none(model):
    """The last of several changes fails: those before it are undone, those of weights too."""
    edit = unit_edit(model, (1, 1))
    first, second = edit.changes
    too_large = replace(edit.changes[second], u=edit.changes[second].u * 1e6)
    down = "model.layers.0.mlp.down_proj"
    low = LowRank(torch.ones(1, 40), torch.ones(1, 16))
    half = copy.deepcopy(model).to(torch.float16)
    changes = {down: low, first: edit.changes[first], second: too_large}
    mixed = Edit(changes, ModelFingerprint.of(half, layer_names(changes)))
    parameters, shown = dict(half.named_parameters()), repr(half)
    values = {name: parameter.clone() for name, parameter in parameters.items()}
    with pytest.raises(PrecisionError, match="cannot hold the units"):
        mixed.merge(half)
    assert repr(half) == shown
    for name, parameter in half.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, values[name])


def test_both_kinds_stand_in_one_edit_under_different_names(model, tmp_path):
    task, units = worlds.task(model), unit_edit(model, (1,))
    (name,) = units.changes
    low = {n: LowRank(torch.randn(2, d), torch.randn(2, o) / 9) for n, d, o in (
        ("model.layers.3.mlp.gate_proj", 16, 40), ("model.layers.2.mlp.down_proj", 40, 16),
    )}  # fmt: skip
    total = units + Edit(low, ModelFingerprint.of(model, low), (), {"name": "low"})
    with total.applied(model):
        expected = families.logits(task, "llama")
    before, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    with total.merge(model):
        torch.testing.assert_close(families.logits(task, "llama"), expected, rtol=0, atol=1e-4)
    assert all(p is before[n] and torch.equal(p, values[n]) for n, p in model.named_parameters())
    compressed = total.compressed(1)
    assert {n: c.rank for n, c in compressed.changes.items()} == dict.fromkeys(total.changes, 1)
    with pytest.raises(EditError, match="cannot be compressed"):
        unit_edit(model).compressed(1)
    low_rank = Edit({name: LowRank(torch.ones(1, 40), torch.ones(1, 16))}, ModelFingerprint.of(model, [name]))
    with pytest.raises(EditError, match=f"{name}: changes with different responses .* one after the other"):
        units + low_rank


def test_layers_that_run_in_another_order_are_told(model):
    task, mlp = worlds.task(model), block_mlp(model, "model.layers.2")
    above = "model.layers.3.mlp.gate_proj"
    change = LowRank(torch.ones(1, 16), torch.ones(1, 16), mlp.response(), reads=above)
    edit = Edit({mlp.down: change}, ModelFingerprint.of(model, [mlp.down, above]))
    with pytest.raises(EditError, match="is not called before"), edit.applied(model):
        families.logits(task, "llama")
    with pytest.raises(EditError, match="which its base does not cover"):
        Edit({mlp.down: change}, ModelFingerprint.of(model, [mlp.down]))
    wrong = replace(change, u=torch.ones(1, 40), reads=mlp.reads)
    edit = Edit({mlp.down: wrong}, ModelFingerprint.of(model, mlp.layers))
    with pytest.raises(EditError, match="whose first reads"):
        edit.apply(model)


def test_a_base_with_another_mlp_is_refused(model):
    edit = unit_edit(model)
    with torch.no_grad():
        model.get_submodule(next(iter(edit.changes.values())).reads).weight.mul_(1.5)
    with pytest.raises(WrongBaseError, match="gate_proj differ"):
        edit.apply(model)


def test_units_in_half_precision(model):
    task = worlds.task(model.to(torch.bfloat16))
    edit = unit_edit(model)
    with edit.applied(model):
        expected = families.logits(task, "llama")
    with edit.merge(model) as merged:
        assert 1e-4 < max(merged.lost.values()) < 1e-2
        torch.testing.assert_close(families.logits(task, "llama"), expected, rtol=0.1, atol=0.5)


# -- one model, several threads and wrappers -------------------------------------------------------------------------


def test_threads_that_run_one_model_do_not_read_each_others_inputs(model):
    """Each waits between the layer that units read and the one that they change until all have read."""
    edit = unit_edit(model, (1,))
    (change,) = edit.changes.values()
    inputs = [torch.arange(start, start + 6)[None] for start in (3, 13, 23)]
    barrier = threading.Barrier(len(inputs))

    def wait():
        barrier.wait(20)

    with edit.applied(model), torch.no_grad():
        expected = [model(ids).logits for ids in inputs]
        meeting = model.get_submodule(change.reads).register_forward_hook(lambda *_: wait())
        with ThreadPoolExecutor(len(inputs)) as pool:
            found = list(pool.map(torch.no_grad()(lambda ids: model(ids).logits), inputs))
        meeting.remove()
    for logits_found, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(logits_found, wanted)


@pytest.mark.parametrize("compiled", ["whole", "the read layer", "the changed layer"])
def test_units_act_in_compiled_code(compiled, model, unchecked):
    task, edit = worlds.task(model), unit_edit(model, (1,))
    ((name, change),) = edit.changes.items()
    with edit.applied(model):
        expected = families.logits(task, "llama")
    plain = families.logits(task, "llama")
    names = {"whole": "", "the read layer": change.reads, "the changed layer": name}
    model.get_submodule(names[compiled]).compile(backend="eager", fullgraph=compiled == "the read layer")
    for _ in range(2):
        torch.testing.assert_close(families.logits(task, "llama"), plain)
        with edit.applied(model):
            torch.testing.assert_close(families.logits(task, "llama"), expected)
            torch.testing.assert_close(families.logits(task, "llama"), expected)


def test_an_exported_program_holds_units(model, unchecked):
    edit, ids = unit_edit(model, (1,)), torch.arange(3, 15).view(2, 6)
    with edit.applied(model), torch.no_grad():
        expected = model(ids).logits
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    torch.testing.assert_close(program.module()(input_ids=ids, use_cache=False).logits, expected)


# -- applications ----------------------------------------------------------------------------------------------------


def test_a_book_and_the_studio_take_units(model, tmp_path):
    task = worlds.task(model)
    registry = PatchRegistry.create(tmp_path / "book", model)
    first, second = unit_edit(model), unit_edit(model, seed=1)
    for edit in (first, replace(second, requests=tuple(worlds.requests(4)[2:]))):
        registry.set_state(registry.add(edit).id, "active")
    with first.applied(model), second.applied(model):
        expected = families.logits(task, "llama")
    with registry.edit().applied(model):
        torch.testing.assert_close(families.logits(task, "llama"), expected, rtol=0, atol=1e-5)
    assert registry.verify() == []
    found = reactions(Workspace(task, Mend.create(task)), first, "The capital of Norway is")
    assert max(share for _, share in found) == pytest.approx(1)
    assert "2 units (gated silu, beta 4)" in matrices_html(first)
    size = check_acceptance(task, first, AcceptanceCriteria(must_stay=("The capital of Peru is",), size=1.0)).checks[-1]
    added = {name: change.delta.norm() for name, change in first.changes.items()}
    ratios = {n: float(norm / model.get_submodule(n).weight.detach().norm()) for n, norm in added.items()}
    assert size.measured == pytest.approx(max(ratios.values()))


def test_units_of_each_request_are_evaluated_together(model):
    """Each acts on its request's rows only, an edit that leaves an MLP alone too."""
    task = worlds.task(model)
    edits = [unit_edit(model, (2, 1)), unit_edit(model, (1,), seed=1)]
    batch = task.collate([task.encode(request.prompt, request.target) for request in worlds.requests(2)])
    wanted = []
    for row, edit in enumerate(edits):
        with edit.applied(model), torch.no_grad():
            wanted.append(task.outputs(batch)[batch.row == row])
    with SeparateEdits(task, edits).applied([0, 1]), torch.no_grad():
        torch.testing.assert_close(task.outputs(batch), torch.cat(wanted))
