"""Finding what to edit, and loading."""

import huggingface_hub
import pytest
import torch
from torch import nn

import worlds
from remend import hub_lookup
from remend.data import read_source
from remend.errors import ConfigError, ModelError, RequestError
from remend.models import editable_modules
from remend.models.blocks import find_blocks, select_blocks
from remend.tasks import answers, load


def test_the_default_is_the_mlps_of_the_last_three_blocks():
    assert list(editable_modules(worlds.gpt2())) == [
        f"transformer.h.{block}.mlp.{layer}" for block in (1, 2, 3) for layer in ("c_fc", "c_proj")
    ]
    assert list(editable_modules(worlds.llama())) == [
        f"model.layers.{block}.mlp.{layer}" for block in (1, 2, 3) for layer in ("gate_proj", "up_proj", "down_proj")
    ]


def test_heads_wider_than_the_model_are_not_taken_for_the_mlp():
    model = worlds.llama(head_dim=16, num_attention_heads=2, num_key_value_heads=2)  # q: 16 → 32, o: 32 → 16
    assert all(".mlp." in name for name in editable_modules(model))


def test_fused_projections_and_experts_are_the_mlp():
    from transformers import MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 50, "pad_token_id": 0}
    assert list(editable_modules(Phi3ForCausalLM(Phi3Config(**sizes)))) == [
        f"model.layers.{block}.mlp.{layer}" for block in (0, 1) for layer in ("gate_up_proj", "down_proj")
    ]
    assert list(editable_modules(MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2)))) == [
        f"model.layers.{block}.mlp.experts.{layer}" for block in (0, 1) for layer in ("gate_up_proj", "down_proj")
    ]


def test_the_output_layer_and_shared_weights_are_left_out():
    model = worlds.gpt2()
    assert "lm_head" not in editable_modules(model, ["*"])
    with pytest.raises(ModelError, match="the output layer"):
        editable_modules(model, ["lm_head"])


class Strange(nn.Module):
    """Blocks that no library names."""

    def __init__(self):
        super().__init__()
        self.strata = nn.ModuleList(nn.ModuleDict({"wide": nn.Linear(4, 9), "slim": nn.Linear(9, 4)}) for _ in range(5))
        self.helpers = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])


def test_odd_names_are_found_by_structure():
    assert list(editable_modules(Strange())) == [f"strata.{i}.{name}" for i in (2, 3, 4) for name in ("wide", "slim")]
    assert len(find_blocks(Strange())) == 5


def test_globs_and_their_mistakes():
    model = worlds.gpt2()
    assert list(editable_modules(model, ["*.0.attn.c_attn"])) == ["transformer.h.0.attn.c_attn"]
    with pytest.raises(ModelError, match=r"no editable module matches .*did you mean 'transformer.h.0.mlp.c_fc'"):
        editable_modules(model, ["transformer.h.0.mlp.fc"])
    with pytest.raises(ModelError, match=r"found no MLP .*it has no editable layer"):
        editable_modules(nn.Linear(2, 2))


def test_regular_expressions():
    model = worlds.gpt2()
    found = list(editable_modules(model, [r"re:transformer\.h\.[02]\.mlp\..*"]))
    assert found == [f"transformer.h.{block}.mlp.{layer}" for block in (0, 2) for layer in ("c_fc", "c_proj")]
    with pytest.raises(ConfigError, match="is no regular expression"):
        editable_modules(model, ["re:("])
    with pytest.raises(ConfigError, match="steps to match"):
        editable_modules(model, ["re:" + "(.*.*)*" * 3000 + "x"])
    with pytest.raises(ModelError, match=r"no editable module matches .*there are .*\.[0-9]+-[0-9]+\."):
        editable_modules(model, ["re:mlp"])


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ("last-3", [7, 8, 9]),
        ("last-99", list(range(10))),
        ("4", [4]),
        ("2-4", [2, 3, 4]),
        ("0, 5-6", [0, 5, 6]),
        ("0-1", [0, 1]),
        ("0.6-0.8", [6, 7]),
        ("0.0-1", list(range(10))),
        ("0.75-1.0", [7, 8, 9]),
        (".4-.5,last-1", [4, 9]),
    ],
)
def test_blocks_can_be_chosen(layers, blocks):
    model = worlds.gpt2(n_layer=10)
    assert [name for name, _ in select_blocks(model, layers)] == [f"transformer.h.{block}" for block in blocks]
    found = editable_modules(model, layers=layers, outputs_only=True)
    assert list(found) == [f"transformer.h.{block}.mlp.c_proj" for block in blocks]
    found = editable_modules(model, ["*.c_attn"], layers=layers)
    assert list(found) == [f"transformer.h.{block}.attn.c_attn" for block in blocks]


@pytest.mark.parametrize("layers", ["10", "8-10", "5-2", "first-2", "last-0", "", "0.99-0.995", "-1", "0.2", "1.5-2"])
def test_wrong_choices_of_blocks(layers):
    with pytest.raises(ConfigError, match=r"names no blocks, or more than there are: 10\. Allowed are 'last-3'"):
        select_blocks(worlds.gpt2(n_layer=10), layers)


def test_loading_a_folder(tmp_path):
    made = worlds.gpt2()
    made.save_pretrained(tmp_path / "model")
    worlds.tokenizer().save_pretrained(tmp_path / "model")
    task = load(str(tmp_path / "model"), "cpu")
    assert not task.model.training
    assert task.tokenizer("Oslo").input_ids == worlds.tokenizer()("Oslo").input_ids
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), task.model.parameters(), strict=True))


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load"):
        load(str(tmp_path), "cpu")
    with pytest.raises(ModelError, match=r"device 'tpu9000' cannot be used here"):
        load("atlas", "tpu9000")


class ConnectError(Exception):
    """As the HTTP library's, which is no OSError."""


@pytest.mark.parametrize("name", ["nosuch", "owner/nosuch"])
def test_a_name_that_is_no_folder_is_asked_of_the_hub_once(name, monkeypatch):
    asked = []

    def unreachable(url):
        asked.append(url)
        raise ConnectError("no route to the hub")

    monkeypatch.setattr(hub_lookup, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_lookup, "get_hf_file_metadata", unreachable)
    with pytest.raises(ModelError, match=r"no folder has this name.*the hub cannot be reached"):
        load(name, "cpu")
    assert [f"/{name}/" in url for url in asked] == [True]


def test_data_on_a_hub_that_cannot_be_reached_is_asked_for_once(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectError("no route to the hub")

    monkeypatch.setattr(hub_lookup, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_lookup, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    for source in ("hf:owner/nosuch/a.json", "zsre:hf:owner/nosuch"):
        with pytest.raises(RequestError, match=r"cannot be fetched .the hub cannot be reached .no route"):
            read_source(source)


def test_a_task_says_in_one_line_what_it_is():
    model = worlds.llama()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert repr(worlds.task(model)) == f"CausalLM('LlamaForCausalLM': causal-lm, {count:,} parameters, float32, on cpu)"


@pytest.mark.parametrize(("number", "empty"), [(1, ["", "Oslo is"]), (2, ["Oslo is", " "])])
def test_an_empty_prompt_is_named_by_its_number(number, empty):
    with pytest.raises(RequestError, match=f"prompt {number} must not be empty"):
        answers(worlds.task(worlds.llama()), empty)
