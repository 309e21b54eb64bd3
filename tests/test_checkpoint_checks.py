"""Folders that are no whole model of a task are refused in words, and no code in them runs."""

import json
import sys

import pytest
import torch
import transformers as hf

import families
import worlds
from remend.cli import run
from remend.errors import ModelError
from remend.models import skeleton
from remend.tasks import load, wrap

LLAMA = hf.LlamaConfig(**families._GROUPED)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = hf.BertConfig(vocab_size=families.VOCABULARY, **SIZES)
VIT = hf.ViTConfig(**SIZES, image_size=8, patch_size=4)


def saved(tmp_path, model, **settings):
    """A model's folder whose configuration has other settings."""
    model.save_pretrained(tmp_path / "model")
    worlds.tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return tmp_path / "model"


def resized_head():
    return {"id2label": {str(i): f"label {i}" for i in range(5)}, "label2id": {f"label {i}": i for i in range(5)}}


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (lambda: hf.LlamaModel(LLAMA), {}, r"no weights for lm_head\.weight: .* saved as a LlamaModel"),
        (lambda: hf.BertModel(BERT), {}, r"no weights for cls\.predictions\.bias"),
        (lambda: hf.BertForMaskedLM(BERT), {}, "saved as a BertForMaskedLM, which is for another task"),
        (lambda: hf.BertLMHeadModel(BERT), {}, "is an encoder, whose tokens see those after them"),
        (lambda: hf.BertForTokenClassification(BERT), {}, "no weights for cls"),
        (lambda: hf.T5Model(hf.T5Config(**families._T5)), {}, "saved as a T5Model, which is for another task"),
        (lambda: hf.BertModel(BERT), {"architectures": ["BertForSequenceClassification"]}, r"classifier\.weight"),
        (lambda: hf.LlamaModel(LLAMA), {"architectures": ["LlamaForSequenceClassification"]}, r"score\.weight"),
        (
            lambda: hf.BertForSequenceClassification(BERT),
            resized_head(),
            r"classifier\.bias is \(2,\), and should be \(5,\); classifier\.weight is \(2, 16\)",
        ),
        (lambda: hf.LlamaForCausalLM(LLAMA), {"num_hidden_layers": 2}, r"leaves out: model\.layers\.2\."),
        (lambda: hf.LlamaForCausalLM(LLAMA), {"num_hidden_layers": 6}, r"no weights for model\.layers\.4\."),
        (lambda: hf.LlamaForCausalLM(LLAMA), {"vocab_size": 7}, r"lm_head\.weight is .* should be \(7, 16\)"),
        (
            lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**families._GROUPED)),
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            r"leaves out: model\.layers\.0\.self_attn\.k_proj\.bias",
        ),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_a_whole_model_is_refused(model, settings, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        load(str(saved(tmp_path, model(), **settings)), "cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.BertForMaskedLM(BERT),
        lambda: hf.BertLMHeadModel(BERT),
        lambda: hf.BertForTokenClassification(BERT),
        lambda: hf.BertForMultipleChoice(BERT),
        lambda: hf.BertForQuestionAnswering(BERT),
        lambda: hf.BertModel(BERT),
        lambda: hf.LlamaModel(LLAMA),
        lambda: hf.T5EncoderModel(hf.T5Config(**families._T5)),
    ],
)
def test_a_model_at_hand_with_another_tasks_head_is_refused_too(make):
    with pytest.raises(ModelError, match=r"for another task|is an encoder"):
        wrap(make(), worlds.tokenizer())


@pytest.mark.parametrize("settings", [{}, resized_head()])
def test_image_classifiers_lack_nothing_either(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("remend.models.loading.AutoImageProcessor", hf.AutoTokenizer)  # without torchvision
    monkeypatch.setitem(
        sys.modules["remend.models.loading"].HEADS,
        "ForImageClassification",
        (hf.AutoModelForImageClassification, hf.AutoTokenizer),
    )
    kind = hf.ViTForImageClassification if settings else hf.ViTModel
    folder = saved(tmp_path, kind(VIT), architectures=["ViTForImageClassification"], **settings)
    with pytest.raises(ModelError, match=r"classifier\.bias"):
        load(str(folder), "cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.GPT2Model(hf.GPT2Config(**families._GPT)),  # its head is the embeddings
        lambda: hf.BertLMHeadModel(hf.BertConfig(**BERT.to_dict() | {"is_decoder": True})),
        lambda: hf.LlamaForSequenceClassification(LLAMA),
    ],
)
def test_checkpoints_that_lack_nothing_are_loaded(make, tmp_path):
    assert load(str(saved(tmp_path, make())), "cpu").model is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, "hidden_size = 0; it has to be at least 1"),
        ({"num_attention_heads": -1}, "num_attention_heads = -1"),
        ({"num_attention_heads": 0}, "cannot load"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0"),
        ({"vocab_size": 10**11}, r"describes a model of [\d,]+ parameters"),
        ({"hidden_size": 10**9}, r"describes a model of [\d,]+ parameters"),
        ({"num_hidden_layers": 10**10}, "num_hidden_layers = 10000000000; the most is 1,000"),
        ({"num_labels": 10**10}, "num_labels = 10000000000; the most is 1,000,000"),
        ({"hidden_size": "16"}, "cannot load .*'hidden_size'"),
        ({"text_config": {"_attn_implementation": "someone/kernels"}}, "which is code on the hub"),
        ({"experts_implementation": "someone/kernels"}, "which is code on the hub"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantised model of MLX"),
    ],
)
def test_absurd_configurations_are_refused_before_anything_is_made_of_them(settings, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        load(str(saved(tmp_path, hf.LlamaForCausalLM(LLAMA), **settings)), "cpu")


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def with_index(name):
    def change(folder):
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename("model.safetensors", "model.Q4_K_M.gguf"), r"a model of llama\.cpp \(GGUF\)"),
        (with_index("../outside.safetensors"), "which is not in the folder"),
        (with_index("/etc/passwd"), "which is not in the folder"),
        (with_index(7), "cannot load"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 10**5), "no index of weights"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
        (lambda folder: (folder / "config.json").write_text("[" * 10**5), "cannot load"),
        (lambda folder: (folder / "tokenizer.json").write_text("[" * 10**5), "cannot load"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100), "were truncated"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 10**5), "cannot load"),
        (rename("model.safetensors", "pytorch_model.bin"), "may hold code"),
        (rename("model.safetensors", "weights.npz"), "a model of MLX"),
    ],
)
def test_folders_that_hold_something_else_are_named_as_what_they_are(damage, message, tmp_path):
    folder = saved(tmp_path, hf.LlamaForCausalLM(LLAMA))
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load(str(folder), "cpu")


@pytest.mark.parametrize("name", ["a\0b", "hf:a/b/../../x", "a/../b", "../none", ""])
def test_names_that_are_no_models_are_refused(name):
    with pytest.raises(ModelError):
        load(name, "cpu")
    with pytest.raises(ModelError):
        skeleton(name)


CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import PreTrainedConfig, LlamaForCausalLM, LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own-model"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_in_a_models_folder_runs_only_if_it_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("it asks"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    folder = saved(tmp_path, hf.LlamaForCausalLM(LLAMA), model_type="own-model", auto_map=auto)
    mark = tmp_path / "it ran"
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    for make in (lambda: load(str(folder), "cpu"), lambda: skeleton(str(folder))):
        with pytest.raises(ModelError, match="code of its own, which would run here"):
            make()
    ask = ["ask", str(folder), "--prompt", "The", "--device", "cpu", "--max-new-tokens", "1"]
    assert run(ask) == 1
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not mark.exists()
    assert type(load(str(folder), "cpu", trust_remote_code=True).model).__name__ == "OwnModel"
    assert mark.exists()


def test_weights_that_are_no_safetensors_are_read_only_if_it_is_asked_for(tmp_path):
    model = hf.LlamaForCausalLM(LLAMA)
    folder = saved(tmp_path, model)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="--allow-bin"):
        load(str(folder), "cpu")
    loaded = load(str(folder), "cpu", use_safetensors=False).model
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
