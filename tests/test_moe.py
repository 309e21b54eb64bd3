"""Experts that a layer keeps in one tensor: hooked only while they must be, and each edited on its own."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import families
import worlds
from remend.core.low_rank import LowRank, concatenate, stack
from remend.core.low_rank_hooks import changes_applied
from remend.core.moe import ExpertLinear, expert_linears
from remend.edit import Edit
from remend.editors import Mend, MendConfig
from remend.errors import EditError, FileError, ModelError
from remend.fingerprint import find_modules
from remend.models.editable_matrices import editable_modules
from remend.tasks import wrap

NAME = "model.layers.3.mlp.experts.down_proj"
MIXTURES = ("mixtral", "qwen3-moe", "gpt-oss")


@pytest.fixture(scope="module", params=MIXTURES)
def model(request):
    """A mixture of experts."""
    return families.make(request.param)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10)).logits


def change_for(linear, rank=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.arange(rank) % 2  # of the first two alone
    d_out, d_in = linear.weight.shape[1:][:: -1 if linear.transposed else 1]
    u, delta = (torch.randn(rank, d, generator=generator) for d in (d_in, d_out))
    return LowRank(u, delta, experts=experts)


def attributes(model):
    """The names of everything that each module holds."""
    return {name: list(module.__dict__) for name, module in model.named_modules()}


def test_nothing_is_left_on_the_users_model(model):
    fresh = copy.deepcopy(model)
    before = attributes(fresh)
    linear = find_modules(fresh, [NAME])[NAME]
    assert attributes(fresh) == before
    with changes_applied({NAME: linear}, {NAME: change_for(linear)}):
        logits(fresh)
        copied = copy.deepcopy(fresh)
    assert attributes(fresh) == before
    assert find_modules(copied, [NAME])[NAME].owner is copied.get_submodule(NAME.removesuffix(".down_proj"))
    assert find_modules(fresh, [NAME])[NAME] is linear, "the copy has its own layer"


def test_layers_of_experts_go_away_with_their_model():
    model = families.make("mixtral")
    linear = find_modules(model, [NAME])[NAME]
    owner = weakref.ref(linear.owner)
    del model
    gc.collect()
    assert owner() is None
    with pytest.raises(ModelError, match="no longer exists; keep a reference"):
        linear.weight  # noqa: B018


def test_hooks_change_nothing_and_leave_nothing(model):
    before = logits(model)
    linear = find_modules(model, [NAME])[NAME]
    assert find_modules(model, [NAME])[NAME] is linear
    shapes = []
    handle = linear.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert shapes
    assert "forward" in linear.owner.__dict__
    handle.remove()
    handle.remove()
    assert "forward" not in linear.owner.__dict__
    assert torch.equal(logits(model), before)
    assert len(shapes) == 1
    assert not any("owner" in key for key in model.state_dict())


def test_an_edit_acts_on_the_rows_of_its_expert_alone(model):
    linear = find_modules(model, [NAME])[NAME]
    change = change_for(linear)
    x = torch.randn(9, change.u.shape[1])
    experts = torch.arange(9) % 3
    with torch.no_grad(), changes_applied({NAME: linear}, {NAME: change}):
        edited = linear(x, experts)
    with torch.no_grad():
        plain = linear(x, experts)
        dense = change.dense(linear.num_experts)
    for row, expert in enumerate(experts.tolist()):
        torch.testing.assert_close(edited[row] - plain[row], dense[expert] @ x[row], rtol=1e-3, atol=1e-4)
    assert torch.equal(edited[experts == 2], plain[experts == 2])


def test_each_row_goes_through_its_own_matrix(model):
    linear = expert_linears(find_modules(model, [NAME])[NAME].owner)["gate_up_proj"]
    x, experts = torch.randn(7, 16), torch.tensor([3, 0, 3, 1, 0, 2, 3])
    weight = linear.weight.mT if linear.transposed else linear.weight
    for row, expert in zip(linear(x, experts), experts.tolist(), strict=True):
        outputs = weight[expert] @ x[experts == expert].T
        bias = linear.owner.gate_up_proj_bias[expert] if linear.owner.has_bias else 0
        assert (torch.isclose(outputs.T + bias, row, rtol=1e-4, atol=1e-5).all(1)).any()


def test_a_copy_of_an_edited_model_stays_edited(model):
    linear = find_modules(model, [NAME])[NAME]
    before = logits(model)
    with changes_applied({NAME: linear}, {NAME: change_for(linear)}):
        edited, copied = logits(model), copy.deepcopy(model)
    assert not torch.allclose(edited, before)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(copied), edited)


def test_factors_belong_to_those_that_tokens_are_routed_to(model):
    task = wrap(model, worlds.tokenizer())
    editor = Mend.create(worlds.task(model), MendConfig(rank=4))
    batch = task.collate([task.encode(request.prompt, request.target) for request in worlds.requests(3)])
    routed = []
    owner = find_modules(model, [NAME])[NAME].owner
    handle = owner.register_forward_pre_hook(lambda module, args: routed.append(args[1]))
    factors = editor.capture(task, batch)[NAME]
    handle.remove()
    assert torch.equal(factors.experts.view(-1, routed[0].shape[1]), routed[0])
    gradient = factors.gradient(find_modules(model, [NAME])[NAME].num_experts)
    for expert in range(gradient.shape[1]):
        has_rows = ((factors.experts == expert) & factors.active).any(1)
        assert torch.equal(gradient[:, expert].flatten(1).any(1), has_rows)


def test_low_rank_changes_of_experts():
    linear = nn.Module()
    torch.manual_seed(0)
    a, b = (LowRank(torch.randn(5, 4), torch.randn(5, 3), experts=torch.randint(3, (5,))) for _ in range(2))
    dense = a.dense(3)
    assert dense.shape == (3, 3, 4)
    torch.testing.assert_close(a.norm(), dense.norm())
    torch.testing.assert_close(concatenate([a, b]).dense(3), dense + b.dense(3))
    wide = concatenate([a, b])
    torch.testing.assert_close(stack([a, wide]).dense(3), torch.stack([dense, wide.dense(3)]))
    torch.testing.assert_close(stack([a, wide]).select(torch.tensor([1])).dense(3)[0], wide.dense(3))
    torch.testing.assert_close(wide.recompress(4).dense(3), wide.dense(3), rtol=1e-3, atol=1e-4)
    compressed = a.recompress(1)
    assert compressed.experts.tolist() == a.experts.unique().tolist()
    values = torch.linalg.svdvals(dense)
    torch.testing.assert_close((compressed.dense(3) - dense).norm(), values[:, 1:].norm(), rtol=1e-3, atol=1e-3)
    assert expert_linears(linear) == {}


def test_edits_of_experts_are_kept_and_checked(model, tmp_path):
    task = wrap(model, worlds.tokenizer())
    editor = Mend.create(worlds.task(model), MendConfig(rank=4, alpha=10.0, outputs_only=True, tokens="target"))
    edit = editor.edit(wrap(model, task.tokenizer), worlds.requests(2))
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    for name, change in edit.changes.items():
        assert torch.equal(loaded.changes[name].experts, change.experts)
    twice = (edit + edit).scaled(0.5).compressed(64)
    with edit.applied(model):
        once = logits(model)
    with twice.applied(model):
        torch.testing.assert_close(logits(model), once, rtol=1e-3, atol=1e-4)
    change = edit.changes[NAME]
    beyond = LowRank(change.u, change.delta, experts=change.experts + 50)
    with pytest.raises(EditError, match="experts"):
        Edit({NAME: beyond}, edit.base).apply(model)
    with pytest.raises(EditError, match="experts"):
        Edit({NAME: LowRank(change.u, change.delta)}, edit.base).apply(model)
    Edit({NAME: LowRank(change.u, change.delta, experts=change.experts - 9)}, edit.base).save(tmp_path / "bad")
    with pytest.raises(FileError, match="experts"):
        Edit.load(tmp_path / "bad")


def test_experts_are_named_like_their_parameters(model):
    assert list(editable_modules(model, ["*.experts.down_proj"], layers="last-1")) == [NAME]
    assert isinstance(editable_modules(model)[NAME], ExpertLinear)
    with pytest.raises(ModelError, match=r"no module .*down_proj"):
        find_modules(model, ["model.layers.3.mlp.experts.down_prj"])


def test_experts_that_compute_in_another_way_are_refused_by_name():
    block = nn.Module()
    block.blocks = nn.ModuleList([nn.Module() for _ in range(3)])
    for module in block.blocks:
        module.matrices = nn.Parameter(torch.zeros(4, 8, 16))
    with pytest.raises(ModelError, match=r"blocks\.0\.matrices is one tensor of shape \(4, 8, 16\)"):
        editable_modules(block)


def test_an_edit_of_an_offloaded_mixture(model):
    """Accelerate replaces the experts' forward pass to bring their weights: it must still do so."""
    accelerate = pytest.importorskip("accelerate")
    task = wrap(model, worlds.tokenizer())
    editor = Mend.create(worlds.task(model), MendConfig(rank=4, alpha=10.0, outputs_only=True, tokens="target"))
    edit = editor.edit(wrap(model, task.tokenizer), worlds.requests(1))
    with edit.applied(model):
        edited = logits(model)
    before = logits(model)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert find_modules(offloaded, [NAME])[NAME].weight.is_meta
    with edit.applied(offloaded):
        torch.testing.assert_close(logits(offloaded), edited, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(offloaded), before, rtol=1e-4, atol=1e-4)
