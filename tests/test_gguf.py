"""GGUF files are loaded as ordinary models, or refused in words that say what they are."""

import json
import struct
from pathlib import Path

import pytest
import torch
import transformers as hf

import worlds
from remend import load
from remend.editors import make
from remend.errors import ModelError
from remend.fingerprint import ModelFingerprint
from remend.models import loading
from remend.models.gguf_files import check_rotary_scaling, read_header

gguf = pytest.importorskip("gguf", reason="the package gguf is missing: pip install 'remend[gguf]'")

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def small_llama():
    torch.manual_seed(0)
    words = worlds.tokenizer()
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            eos_token_id=words.eos_token_id,
        )
    )


def as_llama_cpp_stores_it(name, weight, config):
    """Rotary positions turn neighbouring rows of queries and keys there, and the two halves of a head here."""
    if "q_proj" in name or "k_proj" in name:
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
    return weight


def write(file, model, quantised=False, kind="model", extra=(), parts=1):
    """Write a Llama with the suite's tokenizer as a GGUF file."""
    config, words = model.config, worlds.tokenizer()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(kind)
    writer.add_name("a small model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words.convert_ids_to_tokens(range(len(words))))
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads(words.backend_tokenizer.to_str())["model"]["merges"]]
    )
    writer.add_eos_token_id(words.eos_token_id)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stored = as_llama_cpp_stores_it(name, weight, config).float().numpy()
        for own, theirs in NAMES.items():
            name = name.replace(own, theirs)
        if quantised and stored.ndim == 2:
            blocks = gguf.quantize(stored, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, stored)
    for name, values in extra:
        writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


@pytest.fixture(scope="module")
def original():
    return small_llama().eval()


@pytest.fixture(scope="module")
def path(original, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf", original)


@torch.no_grad()
def test_a_gguf_file_is_loaded_as_the_model_that_it_was_made_of(original, path):
    task = load(path, "cpu")
    ids = torch.tensor([worlds.tokenizer()("The capital of France is").input_ids])
    assert task.processor("The capital of France is").input_ids == ids[0].tolist()
    assert torch.allclose(task.model(ids).logits, original(ids).logits, atol=1e-5)
    assert not task.model.training
    assert task.model.dtype == torch.float32


def test_an_edit_on_a_gguf_file_acts_on_the_folder_saved_from_it_too(original, tmp_path):
    task = load(write(tmp_path / "small.gguf", original, quantised=True), "cpu")
    task.model.save_pretrained(tmp_path / "saved")
    task.processor.save_pretrained(tmp_path / "saved")
    again = load(str(tmp_path / "saved"), "cpu")
    edit = make("finetune-local", task).edit(task, worlds.requests(1))
    edit.apply(again.model).revert()
    names = list(edit.base.weights)
    assert ModelFingerprint.of(again.model, names).is_compatible(ModelFingerprint.of(task.model, names))


def damaged(path, folder, change):
    content = Path(path).read_bytes()
    file = folder / "damaged.gguf"
    file.write_bytes(change(content))
    return str(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1000], "is cut off: it has"),
        (lambda content: content[:3000], "cut off or damaged"),
        (lambda content: content[:20], "cut off or damaged"),
        (lambda content: b"", "no GGUF file"),
        (lambda content: b"PK" + content[2:], "no GGUF file"),
        (lambda content: content[:4] + struct.pack("<I", 99) + content[8:], "version 99, and not 2 or 3"),
        (lambda content: content[:8] + struct.pack("<Q", 1 << 60) + content[16:], "cut off or damaged"),
        (lambda content: content[:16] + struct.pack("<Q", 1 << 60) + content[24:], "cut off or damaged"),
        (lambda content: content[:24] + struct.pack("<Q", 1 << 60) + content[32:], "a text of 1,152"),
    ],
)
def test_files_that_are_not_whole_are_refused(path, change, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        load(damaged(path, tmp_path, change), "cpu")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"kind": "adapter"}, "holds an adapter, not a model"),
        ({"kind": "mmproj"}, "of the kind mmproj, not a model"),
        ({"parts": 3}, "one of 3 parts of a model"),
        ({"extra": [("rope_freqs.weight", torch.ones(8))]}, "scales its rotary positions .rope_freqs"),
    ],
)
def test_files_of_another_kind_are_named_as_what_they_are(original, written, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        load(write(tmp_path / "other.gguf", original, **written), "cpu")


def test_rotary_positions_may_be_scaled_where_transformers_reads_it(original, tmp_path):
    file = Path(write(tmp_path / "other.gguf", original, extra=[("rope_freqs.weight", torch.ones(8))]))
    scaled = hf.LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    check_rotary_scaling(read_header(file), scaled, file)


def test_a_folder_of_one_says_which_file_to_give(path):
    with pytest.raises(ModelError, match=r"give the path of its file, .*small\.gguf"):
        load(str(Path(path).parent), "cpu")


@pytest.mark.parametrize(
    ("options", "message"), [({"quantise": "bnb-8bit"}, "quantise='bnb-8bit'"), ({"device": "map"}, "device 'map'")]
)
def test_a_gguf_file_is_neither_spread_nor_quantised_again(path, options, message):
    with pytest.raises(ModelError, match=f"cannot be loaded with {message}.*save it as a folder"):
        load(path, **options)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named(path, package, monkeypatch):
    monkeypatch.setitem(loading.AVAILABLE, package, lambda: False)
    with pytest.raises(ModelError, match=rf"a GGUF file needs {package}.*pip install 'remend\[gguf\]'"):
        load(path, "cpu")
