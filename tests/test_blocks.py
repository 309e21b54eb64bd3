"""Blocks, stages and models without either: what is edited by default, and where a model is cut."""

from itertools import pairwise

import pytest
import torch
import transformers as hf
from torch import nn

import worlds
from remend.errors import ConfigError, ModelError, NonFiniteError
from remend.models import editable_modules
from remend.models.blocks import find_blocks, find_stacks, select_blocks
from remend.models.frozen_prefix import FrozenPrefix
from remend.tasks.causal_lm import CausalLM


def policy(*widths):
    layers = [layer for d_in, d_out in pairwise(widths) for layer in (nn.Linear(d_in, d_out), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def resnet(layer_type="bottleneck", depths=(2, 2, 3)):
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32, 64], depths=list(depths), layer_type=layer_type, num_labels=3
    )
    return hf.ResNetForImageClassification(config).eval()


def convnext():
    config = hf.ConvNextConfig(hidden_sizes=[8, 16, 32], depths=[1, 2, 2], num_stages=3, num_labels=3)
    return hf.ConvNextForImageClassification(config).eval()


def vit():
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)).eval()


def test_a_model_without_a_list_of_blocks_is_one_block():
    model = policy(4, 16, 16, 2)
    assert find_blocks(model) == [("", model)]
    assert find_stacks(model) == [("", [("", model)])]
    assert select_blocks(model, "last-3") == [("", model)]
    with pytest.raises(ConfigError, match=r"names no blocks, or more than there are: 1\."):
        select_blocks(model, "1")


@pytest.mark.parametrize("outputs_only", [False, True])
@pytest.mark.parametrize(
    ("widths", "names"),
    [((4, 16, 16, 2), ["0", "2"]), ((4, 16, 4), ["0"]), ((4, 16, 16, 4), ["0", "2"]), ((4, 2), ["0"])],
)
def test_the_hidden_layers_of_a_plain_mlp_are_edited(widths, names, outputs_only):
    assert list(editable_modules(policy(*widths), outputs_only=outputs_only)) == names


def test_the_layers_of_a_model_without_blocks_are_found_by_pattern():
    assert list(editable_modules(policy(4, 16, 16, 2), ["[24]"], layers="last-1")) == ["2", "4"]
    with pytest.raises(ConfigError, match="names no blocks"):
        editable_modules(policy(4, 16, 2), layers="3")
    with pytest.raises(ModelError, match="it has no editable layer"):
        editable_modules(nn.Sequential(nn.Tanh()))


def test_the_blocks_of_all_stages_are_found():
    names = [name for name, _ in find_blocks(resnet())]
    assert names == [f"resnet.encoder.stages.{s}.layers.{b}" for s, count in enumerate((2, 2, 3)) for b in range(count)]
    assert [name for name, _ in select_blocks(resnet(), "last-2")] == names[-2:]
    assert [name for name, _ in find_blocks(convnext())] == [
        f"convnext.encoder.stages.{s}.layers.{b}" for s, count in enumerate((1, 2, 2)) for b in range(count)
    ]
    assert [name for name, _ in find_blocks(resnet(), stages=True)] == [f"resnet.encoder.stages.{s}" for s in range(3)]
    assert len(find_blocks(vit())) == 4


class Experts(nn.Module):
    """A transformer block that holds a list of experts: no stage."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(3))


def test_blocks_with_a_list_of_experts_are_no_stages():
    model = nn.ModuleDict({"layers": nn.ModuleList(Experts() for _ in range(2))})
    assert [name for name, _ in find_blocks(model)] == ["layers.0", "layers.1"]


def test_the_matrices_of_image_models_are_edited_by_default():
    assert list(editable_modules(convnext(), outputs_only=True, layers="last-2")) == [
        f"convnext.encoder.stages.2.layers.{block}.pwconv2" for block in (0, 1)
    ]
    (written,) = {
        name.rpartition(".layers.2.")[2] for name in editable_modules(resnet(), outputs_only=True, layers="6")
    }
    both = editable_modules(resnet(), layers="6")
    last = resnet().get_submodule(f"resnet.encoder.stages.2.layers.2.{written}")
    assert len(both) == 2
    assert last.out_channels > last.in_channels, "a bottleneck's widening convolution writes to the residual stream"
    with pytest.raises(ModelError, match=r"found no MLP .* name the matrices with --modules. Editable: "):
        editable_modules(resnet("basic"))


@pytest.mark.parametrize(
    ("make", "name", "depth"), [(convnext, "convnext.encoder.stages.2.layers.1.pwconv2", 2), (vit, "*", 1)]
)
def test_an_image_model_is_cut_between_stages_or_blocks(make, name, depth):
    model, pixels = make(), torch.randn(2, 3, 32 if make is convnext else 8, 32 if make is convnext else 8)
    names = editable_modules(model) if name == "*" else [name]
    prefix = FrozenPrefix(model, names)
    assert prefix.depth == depth
    with torch.no_grad():
        whole = model(pixels).logits
        states = prefix.compute_states(lambda: model(pixels))
        with prefix.resume_from(states):
            assert torch.equal(model(pixels).logits, whole)
        assert prefix.check_resume(states, lambda: model(pixels).logits, whole)


class Stage(nn.Module):
    """A stage that returns its number beside hidden states, as some return the size of their feature map."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.downsampling = nn.Linear(d_in, d_out)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(d_out, 9), nn.Linear(9, d_out))])

    def forward(self, hidden, number):
        return self.layers[0](number * self.downsampling(hidden)), number + 1


class Staged(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([Stage(4, 5), Stage(5, 6), Stage(6, 7)])

    def forward(self, hidden):
        number = torch.tensor(1.0)
        for stage in self.stages:
            hidden, number = stage(hidden, number)
        return hidden


def test_stages_that_hand_on_more_than_hidden_states_run_whole():
    model, inputs = Staged(), torch.randn(2, 3, 4)
    names = list(editable_modules(model, layers="last-1"))
    assert names == ["stages.2.layers.0.0", "stages.2.layers.0.1"]
    prefix = FrozenPrefix(model, names)
    assert prefix.depth == 2
    states, whole = prefix.compute_states(lambda: model(inputs)), model(inputs)
    with prefix.resume_from(states):
        assert torch.equal(model(inputs), whole)


def test_a_model_without_blocks_is_not_cut():
    model = policy(4, 16, 2)
    prefix = FrozenPrefix(model, ["0"])
    assert (prefix.depth, prefix.blocks) == (0, [])
    observation = torch.randn(3, 4)
    with prefix.record_input() as recorded, prefix.resume_from(None), prefix.checkpoint_activations():
        model(observation)
    assert recorded == {}
    assert prefix.verify(lambda: model(observation), lambda: observation, model)


@pytest.fixture
def task():
    return CausalLM(worlds.gpt2().eval(), worlds.tokenizer())


def cut(task, block):
    batch = task.collate([task.encode(r.prompt, r.target) for r in worlds.requests(2)])
    return FrozenPrefix(task.model, [f"transformer.h.{block}.mlp.c_proj"]), batch


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), NonFiniteError("NaN in block 3"), RecursionError("deep")]
)
def test_errors_that_are_not_about_the_cut_are_raised(task, error, monkeypatch):
    """Memory that ran out, above all: the slow way would need more of it."""
    prefix, batch = cut(task, 2)
    whole = task.outputs(batch)
    states = prefix.compute_states(lambda: task.outputs(batch))
    calls = []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise error
        return whole

    with pytest.raises(type(error)):
        prefix.verify(fails, lambda: whole, lambda states: whole)
    assert prefix.depth == 2
    with pytest.raises(type(error)):
        prefix.check_resume(states, fails, whole)


@pytest.mark.parametrize(
    "error", [TypeError("too few arguments"), RuntimeError("size mismatch"), ModelError("no states")]
)
def test_errors_of_blocks_that_expect_more_end_the_cut(task, error):
    prefix, batch = cut(task, 2)
    whole = task.outputs(batch)
    states = prefix.compute_states(lambda: task.outputs(batch))

    def fails():
        raise error

    assert not prefix.check_resume(states, fails, whole)
    passes = iter([lambda: whole, fails])
    assert not prefix.verify(lambda: next(passes)(), lambda: whole, lambda states: whole)
    assert (prefix.depth, prefix.blocks) == (0, [])


def test_every_cut_of_a_model_is_verified(task):
    """One cut was right, so another must still be tried."""
    calls = []

    def logits(batch):
        calls.append(1)
        return task.outputs(batch)

    for block in (2, 3, 2):
        prefix, batch = cut(task, block)
        whole = task.outputs(batch)
        states = prefix.compute_states(lambda batch=batch: task.outputs(batch))
        assert prefix.check_resume(states, lambda batch=batch: logits(batch), whole)
    assert len(calls) == 2, "each cut once"
    prefix, batch = cut(task, 1)
    assert not prefix.check_resume(states, lambda: torch.zeros_like(whole), whole)
