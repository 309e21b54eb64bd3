"""Hidden units as edits: beside a model, merged into wider MLPs, in files, summed; and refused where they cannot be."""

import copy
import json

import pytest
import torch
from torch import nn

import families
import worlds
from remend.core.low_rank import LowRank, layer_names
from remend.core.low_rank_hooks import changes_applied
from remend.core.response import ACTIVATIONS, LINEAR, Response
from remend.edit import Edit
from remend.errors import EditError, ModelError, WrongBaseError
from remend.fingerprint import ModelFingerprint, find_modules
from remend.models.blocks import find_stacks
from remend.models.editable_matrices import block_mlp

KINDS = ["gpt2", "llama", "t5-gated", "opt", "bert, binary", "phi3", "bart"]
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


def block_names(model):
    """The names of the blocks of the last stack."""
    return [name for name, _ in find_stacks(model)[-1][1]]


def unit_edit(model, counts=(2, 1), seed=0, strength=3.0):
    """Some units in the last blocks."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for count, block in zip(counts, block_names(model)[-len(counts) :], strict=True):
        mlp = block_mlp(model, block)
        u, delta = (torch.randn(count, 16, generator=generator) for _ in range(2))  # all families are 16 wide
        response = mlp.response(beta=4.0, threshold=0.2 if mlp.threshold and not mlp.gated else 0.0)
        changes[mlp.down] = LowRank(u / 4, strength * delta, response, reads=mlp.reads)
    base = ModelFingerprint.of(model, layer_names(changes))
    return Edit(changes, base, tuple(worlds.requests(2)), {"name": "test"})


@torch.no_grad()
def logits(task, kind, model=None):
    """What a model, by default the task's, says where the targets of some requests are predicted."""
    pairs = [task.encode(request.prompt, request.target) for request in families.requests(kind, 4)]
    return families.wrap(model or task.model, task.tokenizer).outputs(task.collate(pairs))


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
    before = logits(task, kind)
    parameters = dict(task.model.named_parameters())
    values = {name: parameter.clone() for name, parameter in parameters.items()}
    shown = repr(task.model)
    edit = unit_edit(task.model)
    with edit.applied(task.model):
        expected = logits(task, kind)
    assert (expected - before).abs().max() > 1e-2
    with edit.merge(task.model) as merged:
        torch.testing.assert_close(logits(task, kind), expected, rtol=0, atol=1e-4)
        assert repr(task.model) != shown, "the MLPs are wider"
        assert max(merged.lost.values()) < 1e-6
        with pytest.raises(WrongBaseError, match="differ in this model"):
            edit.apply(task.model)
    assert repr(task.model) == shown
    for name, parameter in task.model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, values[name])
    torch.testing.assert_close(logits(task, kind), before, rtol=0, atol=0)


def test_a_sum_of_units_acts_like_both(task, kind, tmp_path):
    first, second = unit_edit(task.model), unit_edit(task.model, (1, 2), seed=1)
    with first.applied(task.model), second.applied(task.model):
        expected = logits(task, kind)
    total = first + second.scaled(2.0).scaled(0.5)
    assert [change.rank for change in total.changes.values()] == [3, 3]
    total.save(tmp_path / "edit")
    again = Edit.load(tmp_path / "edit")
    assert [(c.response, c.reads) for c in again.changes.values()] == [
        (c.response, c.reads) for c in total.changes.values()
    ]
    for edit in (total, again):
        with edit.applied(task.model):
            torch.testing.assert_close(logits(task, kind), expected, rtol=0, atol=1e-5)
        with edit.merge(task.model):
            torch.testing.assert_close(logits(task, kind), expected, rtol=0, atol=1e-4)


def test_a_copy_of_a_model_with_units_has_them_too(model):
    task = worlds.task(model)
    edit = unit_edit(model)
    handle = edit.apply(model)
    expected = logits(task, "llama")
    copied = copy.deepcopy(model)
    handle.revert()
    plain = logits(task, "llama")
    for _ in range(2):
        torch.testing.assert_close(logits(task, "llama", copied), expected)
    assert not torch.allclose(plain, expected)
