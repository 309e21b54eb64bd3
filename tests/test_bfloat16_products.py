"""Products in bfloat16 for a while: what is computed, for which models, and that weights come back unchanged."""

import pytest
import torch
from torch import nn

import families
import worlds
from remend.core.low_rank_hooks import frozen
from remend.tasks import bfloat16_products as module
from remend.tasks import wrap
from remend.tasks.bfloat16_products import bfloat16_products, multiplies_bfloat16


@pytest.fixture(autouse=True)
def with_instructions(monkeypatch):
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: True)


def outputs(task):
    batch = task.collate([task.encode("The capital of France is", "Paris")])
    with torch.no_grad(), frozen(task.model):
        return task.outputs(batch).float()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt-neox"])
def test_outputs_are_nearly_the_same_and_weights_are_the_same_ones_afterwards(family):
    torch.manual_seed(0)
    task = wrap(families.DECODERS[family]().eval(), worlds.tokenizer())
    before = {name: (parameter, parameter.clone()) for name, parameter in task.model.named_parameters()}
    exact = outputs(task)
    with bfloat16_products(task, least=1) as narrow:
        inside = {name: parameter.dtype for name, parameter in task.model.named_parameters(remove_duplicate=False)}
        rounded = outputs(narrow)
    assert torch.bfloat16 in inside.values()
    embeddings = task.model.get_input_embeddings().weight
    assert embeddings.dtype == torch.float32
    assert embeddings is before[next(iter(before))][0]
    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.05 * float(exact.std()))
    after = dict(task.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(
        after[name] is parameter and torch.equal(after[name], copy) for name, (parameter, copy) in before.items()
    )
    assert torch.equal(outputs(task), exact)


def test_weights_come_back_after_an_error():
    task = worlds.task(worlds.llama())
    weights = [id(parameter) for parameter in task.model.parameters()]
    with pytest.raises(KeyboardInterrupt), bfloat16_products(task, least=1):
        raise KeyboardInterrupt
    assert [id(parameter) for parameter in task.model.parameters()] == weights


def test_hidden_states_are_summed_in_float32():
    task = worlds.task(worlds.llama())
    seen = []
    block = next(module for name, module in task.model.named_modules() if name.endswith("layers.1"))
    handle = block.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output)))
    with bfloat16_products(task, least=1) as narrow:
        outputs(narrow)
    handle.remove()
    output = seen[0][1][0] if isinstance(seen[0][1], tuple) else seen[0][1]
    assert seen[0][0] == output.dtype == torch.float32


@pytest.mark.parametrize("why", ["small", "half", "autocast", "no instructions"])
def test_nothing_changes_where_nothing_is_gained(why, monkeypatch):
    task, least = worlds.task(worlds.llama()), 1
    if why == "small":
        least = module.LEAST_WEIGHTS
    elif why == "half":
        task = wrap(worlds.llama().to(torch.bfloat16), worlds.tokenizer())
    elif why == "autocast":
        task = task.with_autocast(torch.bfloat16)
    else:
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: False)
    weights = [id(parameter) for parameter in task.model.parameters()]
    with bfloat16_products(task, least) as same:
        assert same is task
        assert [id(parameter) for parameter in task.model.parameters()] == weights


def test_a_layer_that_computes_its_weight_is_left_alone():
    task = worlds.task(worlds.llama())
    layer = next(layer for layer in task.model.modules() if isinstance(layer, nn.Linear))
    nn.utils.parametrizations.weight_norm(layer)
    with bfloat16_products(task, least=1):
        assert layer.weight.dtype == torch.float32


def test_instructions_are_known_of_this_processor():
    assert isinstance(multiplies_bfloat16(torch.device("cpu")), bool)
    assert not multiplies_bfloat16(torch.device("meta"))
