"""Layers that are matrices in another shape: convolutions over disjoint patches, and inputs of more than two axes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from remend.core.capture import capture_gradient_factors, record_inputs
from remend.core.layers import dense_in_weight_layout, dimensions, is_editable, weight_as_matrix, weight_of
from remend.core.low_rank import LowRank, stack
from remend.core.low_rank_hooks import changes_applied
from remend.edit import Edit
from remend.errors import ModelError
from remend.fingerprint import ModelFingerprint, find_modules

NAMES = ("patches", "shortcut", "mix", "last")


class Images(nn.Module):
    """Patches, a 1×1 convolution that leaves out every other position, a Linear over [B, H, W, C], channels again."""

    def __init__(self, patch=2):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, patch, stride=patch)
        self.shortcut = nn.Conv2d(6, 5, 1, stride=2, bias=False)
        self.mix = nn.Linear(5, 7)
        self.last = nn.Conv2d(7, 4, 1, padding="valid")

    def forward(self, images):
        x = self.shortcut(self.patches(images).relu_()).tanh()
        x = self.mix(x.permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)
        return self.last(x).mean((2, 3))


def images(count, patch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # One column more than patches cover, as convolutions without padding leave it out.
    return torch.randn(count, 3, 4 * patch, 6 * patch + 1, generator=generator)


def change_for(module, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(*(torch.randn(rank, d, generator=generator) for d in dimensions(module)))


@settings(max_examples=15)
@given(count=st.integers(1, 4), patch=st.integers(2, 4), seed=st.integers(0, 99))
def test_factors_are_the_gradient_of_each_episode(count, patch, seed):
    torch.manual_seed(seed)
    model, x = Images(patch), images(count, patch, seed)
    modules = find_modules(model, NAMES)
    mask = torch.ones(count, 1, dtype=torch.bool)
    _, factors = capture_gradient_factors(model, modules, dict.fromkeys(NAMES, mask), lambda: model(x).square().sum(1))
    for episode in range(count):
        plain = copy.deepcopy(model)
        plain(x[episode : episode + 1]).square().sum().backward()
        for name in NAMES:
            right = weight_as_matrix(modules[name], plain.get_submodule(name).weight.grad)
            torch.testing.assert_close(factors[name].gradient()[episode], right, rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@given(rank=st.integers(1, 3), patch=st.integers(2, 4), seed=st.integers(0, 99))
def test_a_side_branch_computes_what_the_merged_weight_does(rank, patch, seed):
    torch.manual_seed(seed)
    model, x = Images(patch).eval(), images(2, patch, seed)
    modules = find_modules(model, NAMES)
    edit = Edit(
        {name: change_for(modules[name], rank, seed + i) for i, name in enumerate(NAMES)},
        ModelFingerprint.of(model, NAMES),
    )
    with torch.no_grad():
        before = model(x)
        with edit.applied(model):
            applied = model(x)
        with edit.merge(model):
            merged = model(x)
        assert not torch.allclose(applied, before)
        torch.testing.assert_close(applied, merged, rtol=1e-4, atol=1e-3)
        assert torch.equal(model(x), before)


def test_each_episode_has_its_change_of_its_images():
    torch.manual_seed(0)
    model, x = Images().eval(), images(6, 2)
    modules = find_modules(model, NAMES)
    alone = [{name: change_for(modules[name], 2, seed) for name in NAMES} for seed in range(3)]
    batched = {name: stack([changes[name] for changes in alone]) for name in NAMES}
    with torch.no_grad():
        with changes_applied(modules, batched):
            together = model(x)
        for episode, changes in enumerate(alone):
            rows = slice(2 * episode, 2 * episode + 2)
            with changes_applied(modules, changes):
                torch.testing.assert_close(together[rows], model(x[rows]), rtol=1e-4, atol=1e-4)


def test_recorded_inputs_are_the_rows_that_the_matrix_multiplies():
    torch.manual_seed(0)
    model, x = Images().eval(), images(2, 2)
    modules, outputs = find_modules(model, NAMES), {}
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output.clone()}))
        for name, module in modules.items()
    ]
    inputs = record_inputs(model, modules, 2, lambda: model(x))
    for handle in handles:
        handle.remove()
    for name, module in modules.items():
        matrix = weight_as_matrix(module, weight_of(module))
        rows = inputs[name].x @ matrix.T + (0 if module.bias is None else module.bias)
        output = outputs[name] if name == "mix" else outputs[name].permute(0, 2, 3, 1)
        torch.testing.assert_close(rows, output.reshape(rows.shape), rtol=1e-4, atol=1e-5)


def test_a_dense_change_has_the_layout_of_the_weight():
    module = nn.Conv2d(3, 5, 2, stride=2)
    change = change_for(module, 2, 0)
    dense = dense_in_weight_layout(module, change)
    assert dense.shape == module.weight.shape
    assert torch.equal(weight_as_matrix(module, dense), change.dense())


class Standardized(nn.Conv2d):
    """As in BiT: what is stored is not what is multiplied with."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Conv2d(4, 4, 3), "is a Conv2d 3x3, stride 1 and cannot be edited.*only convolutions that are matrices"),
        (nn.Conv2d(4, 4, 3, stride=3, padding=1), "Conv2d 3x3, stride 3, padding 1 and"),
        (nn.Conv2d(4, 4, 7, padding=3, groups=4), "Conv2d 7x7, stride 1, padding 3, groups 4 and"),
        (nn.Conv2d(4, 4, (2, 3), stride=(3, 2)), r"Conv2d 2x3, stride \(3, 2\) and"),
        (nn.Conv2d(4, 4, 3, padding="same", dilation=2), "Conv2d 3x3, stride 1, padding same, dilation 2 and"),
        (nn.Conv2d(4, 4, 1, groups=2), "Conv2d 1x1, stride 1, groups 2 and"),
        (Standardized(4, 4, 1), "is a Standardized 1x1, stride 1 and cannot be edited"),
        (nn.LayerNorm(4), "is a LayerNorm and cannot be edited. Editable are Linear and Conv1D layers"),
    ],
)
def test_layers_that_are_no_matrices_are_refused_by_kind(module, message):
    assert not is_editable(module)
    with pytest.raises(ModelError, match=f"^inner {message}" if message.startswith("is") else f"^inner is a {message}"):
        find_modules(nn.ModuleDict({"inner": module}), ["inner"])


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 1, padding="same"), nn.Conv2d(4, 6, (2, 3), stride=(2, 3)), nn.Linear(4, 4)],
)
def test_convolutions_over_disjoint_patches_are_editable(module):
    assert is_editable(module)
