"""Gradient factors against autograd's dense gradients, and what capture must survive."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import worlds
from remend.core.capture import capture_gradient_factors
from remend.core.layers import dimensions, is_conv1d
from remend.errors import ModelError, NonFiniteError
from remend.models import editable_modules
from remend.tasks.causal_lm import CausalLM

TEXTS = ["Oslo", "The capital of Peru is", "a", "Which city rules Egypt ? It is in the"]


def dense_gradients(task, names, pair):
    """Autograd's gradient of one pair's loss, of a copy of the model, as [d_out, d_in]."""
    copied = CausalLM(copy.deepcopy(task.model), task.tokenizer)
    copied.loss(copied.collate([pair])).sum().backward()
    modules = {name: copied.model.get_submodule(name) for name in names}
    return {n: m.weight.grad.T if is_conv1d(m) else m.weight.grad for n, m in modules.items()}


@pytest.mark.parametrize("family", worlds.FAMILIES)
@settings(max_examples=12, deadline=None)
@given(pairs=st.lists(st.tuples(st.sampled_from(TEXTS), st.sampled_from(worlds.CITIES)), min_size=1, max_size=4))
def test_factors_are_the_gradient_of_each_episode(family, pairs):
    task = CausalLM(worlds.FAMILIES[family](), worlds.tokenizer())
    modules = editable_modules(task.model)
    tokenised = [task.encode(prompt, target) for prompt, target in pairs]
    batch = task.collate(tokenised)
    losses, factors = capture_gradient_factors(
        task.model, modules, dict.fromkeys(modules, batch.mask), lambda: task.loss(batch)
    )
    for episode, pair in enumerate(tokenised):
        expected = dense_gradients(task, modules, pair)
        torch.testing.assert_close(losses[episode], task.loss(task.collate([pair]))[0].detach(), rtol=1e-4, atol=1e-5)
        for name, factor in factors.items():
            torch.testing.assert_close(factor.gradient()[episode], expected[name], rtol=1e-3, atol=1e-5)
            assert not factor.active[episode, len(pair) - 1 :].any(), "padding must not count"


def test_the_model_is_left_as_it_was(task, snapshot):
    task.model.train()
    task.model.get_output_embeddings().weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in task.model.named_parameters()}
    batch = task.collate([task.encode("Oslo is", "Rome")])
    capture_gradient_factors(
        task.model,
        modules := editable_modules(task.model),
        dict.fromkeys(modules, batch.mask),
        lambda: task.loss(batch),
    )
    assert task.model.training
    assert {name: p.requires_grad for name, p in task.model.named_parameters()} == wanted
    task.model.eval()
    for parameter in task.model.parameters():
        parameter.requires_grad_(True)
    snapshot()


def test_an_exception_leaves_nothing_behind(task, snapshot):
    def broken():
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        capture_gradient_factors(
            task.model,
            modules := editable_modules(task.model),
            dict.fromkeys(modules, torch.ones(1, 1, dtype=torch.bool)),
            broken,
        )
    snapshot()


class Odd(nn.Module):
    """A layer that is called twice, by keyword too, between in-place operations, under checkpointing if asked."""

    def __init__(self, checkpointed):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)
        self.checkpointed = checkpointed

    def body(self, x):
        x = self.layer(x.clone()).relu_().clone()
        y = self.layer(input=x)
        x.mul_(0)  # spoils the input after the call
        return y.mul_(2).tanh()

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)


class Plain(Odd):
    """The same function without tricks, for autograd's own gradient."""

    def forward(self, x):
        return (self.layer(self.layer(x).relu()) * 2).tanh()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_calls_twice_by_keyword_in_place_and_checkpointed(checkpointed):
    torch.manual_seed(0)
    odd, plain = Odd(checkpointed), Plain(False)
    plain.load_state_dict(odd.state_dict())
    x = torch.randn(3, 4, 5)
    mask = torch.ones(3, 4, dtype=torch.bool)
    _, factors = capture_gradient_factors(
        odd, {"layer": odd.layer}, {"layer": mask}, lambda: odd(x).square().sum((1, 2))
    )
    plain(x).square().sum().backward()
    torch.testing.assert_close(factors["layer"].gradient().sum(0), plain.layer.weight.grad, rtol=1e-4, atol=1e-5)
    assert factors["layer"].u.shape == (3, 8, 5), "both calls are kept"


def test_a_module_that_is_never_called_is_named():
    odd = Odd(False)
    mask = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ModelError, match="unused was not called"):
        capture_gradient_factors(
            odd, {"unused": odd.unused}, {"unused": mask}, lambda: odd(torch.randn(1, 4, 5)).sum((1, 2))
        )


def test_square_conv1d_is_told_by_its_class():
    from transformers.pytorch_utils import Conv1D

    assert is_conv1d(Conv1D(6, 6))
    assert not is_conv1d(nn.Linear(6, 6))
    assert dimensions(Conv1D(4, 6)) == (6, 4)


def test_nan_weights_are_named(task, snapshot):
    weight = task.model.get_input_embeddings().weight
    batch = task.collate([task.encode("Oslo is", "Rome")])
    original = weight.detach().clone()
    with torch.no_grad():
        weight[:] = float("nan")
    with pytest.raises(NonFiniteError, match=r"loss of the edit is not finite .*embed|wte"):
        capture_gradient_factors(
            task.model,
            modules := editable_modules(task.model),
            dict.fromkeys(modules, batch.mask),
            lambda: task.loss(batch),
        )
    with torch.no_grad():
        weight.copy_(original)
    snapshot()


def test_the_backward_pass_stops_at_the_first_edited_layer(task):
    reached = []
    first = editable_modules(task.model, ["*.0.mlp.*"])
    last = editable_modules(task.model)
    handle = next(iter(first.values())).register_full_backward_hook(lambda *_: reached.append(True))
    batch = task.collate([task.encode("Oslo is", "Rome")])
    capture_gradient_factors(task.model, last, dict.fromkeys(last, batch.mask), lambda: task.loss(batch))
    handle.remove()
    assert not reached
