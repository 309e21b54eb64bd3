"""Edits in the forms of other tools: adapters that PEFT reads, merged checkpoints, and the way back."""

import copy
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import families
import remend
from remend.cli import run
from remend.core.layers import dimensions, is_conv1d
from remend.core.low_rank import LowRank
from remend.core.response import Response
from remend.edit import Edit
from remend.errors import EditError, FileError, ModelError, NonFiniteError, RemendError, WrongBaseError
from remend.fingerprint import ModelFingerprint
from remend.formats import EditFormat, ImportedEdit, diff_checkpoints, load_adapter, save_adapter, save_merged
from remend.formats.peft_reading import CONFIG, WEIGHTS
from remend.models import editable_modules, skeleton
from remend.registries import FORMATS

KINDS = ["gpt2", "llama", "t5", "bart", "bert, binary"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def task(kind):
    return families.task(kind)


@pytest.fixture
def llama():
    return families.task("llama")


def random_edit(model):
    """A change of each MLP matrix, of ranks 1 to 3."""
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for number, (name, module) in enumerate(editable_modules(model).items()):
        u, delta = (torch.randn(1 + number % 3, d, generator=generator) for d in dimensions(module))
        changes[name] = LowRank(u, 0.3 * delta / dimensions(module)[0] ** 0.5)
    return Edit(changes, ModelFingerprint.of(model, changes), (), {"name": "test"})


def quietly(function, *arguments, **named):
    """What a function returns that has something to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **named)


# -- adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_does_in_peft_what_the_edit_does(task, kind, tmp_path):
    peft = pytest.importorskip("peft")
    edit = random_edit(task.model)
    plain = families.logits(task, kind)
    with edit.applied(task.model):
        expected = families.logits(task, kind)
    assert (expected - plain).abs().max() > 1e-2
    save_adapter(edit, tmp_path / "adapter", task.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of an adapter that fits, PEFT has nothing to say
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(task.model), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(families.logits(task, kind, adapted.base_model.model), expected, rtol=0, atol=1e-5)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(families.logits(task, kind, merged), expected, rtol=0, atol=1e-5)


def test_transformers_loads_an_adapter(task, kind, tmp_path):
    pytest.importorskip("peft")
    edit = random_edit(task.model)
    with edit.applied(task.model):
        expected = families.logits(task, kind)
    save_adapter(edit, tmp_path / "adapter", task.model)
    adapted = copy.deepcopy(task.model)
    quietly(adapted.load_adapter, str(tmp_path / "adapter"))
    torch.testing.assert_close(families.logits(task, kind, adapted.eval()), expected, rtol=0, atol=1e-5)


def test_an_adapter_comes_back_as_the_same_edit(task, tmp_path):
    edit = random_edit(task.model)
    save_adapter(edit, tmp_path / "adapter", task.model)
    found = load_adapter(tmp_path / "adapter", task.model)
    assert found.changes.keys() == edit.changes.keys()
    for name, change in edit.changes.items():
        assert torch.equal(found.changes[name].u, change.u)
        assert torch.equal(found.changes[name].delta, change.delta)
    assert found.base.weights == edit.base.weights


def test_an_adapter_of_several_ranks_acts_the_same_wherever_it_is_read(task, kind, tmp_path):
    """PEFT's rule, that of readers of ``r`` alone, and that of llama.cpp, which takes the rank from each factor."""
    edit = random_edit(task.model)
    assert len({change.rank for change in edit.changes.values()}) > 1
    save_adapter(edit, tmp_path / "adapter", task.model)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    for name, change in edit.changes.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        for rank in (config["r"], config["rank_pattern"].get(name, config["r"]), a.shape[0], b.shape[1]):
            torch.testing.assert_close(config["lora_alpha"] / rank * b @ a, change.dense())


def test_an_adapter_names_a_base_that_is_found(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    families.task("llama").model.save_pretrained(tmp_path / "models" / "base")
    families.task("llama").processor.save_pretrained(tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    task = remend.load("models/base", "cpu")
    edit = random_edit(task.model)
    assert (edit.base.name, edit.base.in_folder) == ("base", True), "files that are shared hold no path"
    monkeypatch.chdir("/")
    save_adapter(edit, tmp_path / "adapter", task.model)
    adapted = quietly(peft.AutoPeftModelForCausalLM.from_pretrained, str(tmp_path / "adapter")).eval()
    with edit.applied(task.model):
        expected = families.logits(task, "llama")
    torch.testing.assert_close(families.logits(task, "llama", adapted.base_model.model), expected, rtol=0, atol=1e-5)


def test_an_edits_local_base_is_not_looked_up_on_the_hub(llama, tmp_path, capsys):
    edit = random_edit(llama.model)
    local = replace(edit, base=replace(edit.base, name="base", in_folder=True))
    local.save(tmp_path / "edit")
    assert run(["export", str(tmp_path / "edit"), "--to", "peft", "--out", str(tmp_path / "x")]) == 1
    told = capsys.readouterr().err
    assert "in a folder 'base'" in told
    assert "--model" in told


def test_changes_of_convolutions_survive_as_adapter_and_as_difference(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4)).eval()
    (name,) = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    u, delta = torch.randn(2, 3 * 4 * 4), torch.randn(2, 16)
    edit = Edit({name: LowRank(u, delta)}, ModelFingerprint.of(model, [name]), (), {"name": "test"})
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), edit.applied(model):
        expected = model(images).logits
    save_adapter(edit, tmp_path / "adapter", model)
    loaded = load_adapter(tmp_path / "adapter", model).changes[name]
    assert torch.equal(loaded.u, u)
    assert torch.equal(loaded.delta, delta)
    after = copy.deepcopy(model)
    edit.merge(after)
    for change in (loaded, diff_checkpoints(model, after).edit.changes[name]):
        torch.testing.assert_close(change.dense(), edit.changes[name].dense(), rtol=1e-4, atol=1e-4)
    adapted = quietly(peft.PeftModel.from_pretrained, model, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(images).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after(images).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapters_files_are_what_servers_check_for(llama, tmp_path):
    """What vLLM requires: these keys, no more than matrices, one factor for all, and names that end in a layer's."""
    edit = random_edit(llama.model)
    save_adapter(edit, tmp_path / "adapter", llama.model)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert isinstance(config["target_modules"], list)
    assert config["bias"] == "none"
    assert not any(config.get(key) for key in ("use_dora", "use_rslora", "modules_to_save"))
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    for name, tensor in load_file(tmp_path / "adapter" / WEIGHTS).items():
        start, *module, factor, end = name.removeprefix("base_model.").split(".")
        assert (start, factor in ("lora_A", "lora_B"), end) == ("model", True, "weight")
        assert module[-1] in ("gate_proj", "up_proj", "down_proj")
        assert tensor.shape[0 if factor == "lora_A" else 1] == config["r"]
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {CONFIG, WEIGHTS}


FRESH = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    save_file({"logits": model(torch.arange(2, 26).view(2, 12)).logits}, out)
"""


def test_an_adapter_of_the_atlas_in_a_fresh_process(tmp_path):
    pytest.importorskip("peft")
    task = remend.load("atlas", "cpu")
    requests = remend.read_source("atlas:test")[:3]
    edit = remend.Mend.load("atlas").edit(task, requests)
    edit.save(tmp_path / "edit")
    assert run(["export", str(tmp_path / "edit"), "--to", "peft", "--out", str(tmp_path / "adapter")]) == 0
    task.model.save_pretrained(tmp_path / "base")
    files = [str(tmp_path / name) for name in ("base", "adapter", "logits")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH, *files], check=True, capture_output=True)
    with torch.no_grad(), edit.applied(task.model):
        expected = task.model(torch.arange(2, 26).view(2, 12)).logits
    torch.testing.assert_close(load_file(tmp_path / "logits")["logits"], expected, rtol=0, atol=1e-5)


def test_what_is_no_low_rank_change_is_not_exported(tmp_path):
    task = families.task("mixtral")
    name, module = next(iter(editable_modules(task.model, ["*experts.down_proj"]).items()))
    u, delta = (torch.ones(1, d) for d in dimensions(module))
    experts = torch.zeros(1, dtype=torch.long)
    edit = Edit({name: LowRank(u, delta, experts=experts)}, ModelFingerprint.of(task.model, [name]))
    with pytest.raises(EditError, match="several experts"):
        save_adapter(edit, tmp_path / "adapter", task.model)
    task = families.task("llama")
    name, module = next(iter(editable_modules(task.model).items()))
    u, delta = (torch.ones(1, d) for d in dimensions(module))
    gated = Edit({name: LowRank(u, delta, Response.from_gate(0.2))}, ModelFingerprint.of(task.model, [name]))
    with pytest.raises(EditError, match="gated"):
        save_adapter(gated, tmp_path / "adapter", task.model)
    with pytest.raises(WrongBaseError):
        save_adapter(random_edit(task.model), tmp_path / "adapter", families.task("gpt2").model)
    assert not list(tmp_path.iterdir())


def test_what_is_written_can_be_read_by_whom_the_users_mask_lets(llama, tmp_path):
    edit, mask = random_edit(llama.model), os.umask(0o022)
    try:
        save_adapter(edit, tmp_path / "adapter", llama.model)
        save_merged(edit, tmp_path / "merged", llama, shard="60KB")
        edit.save(tmp_path / "edit")
    finally:
        os.umask(mask)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_only_an_adapter_is_replaced(llama, tmp_path):
    edit = random_edit(llama.model)
    for _ in range(2):
        save_adapter(edit, tmp_path / "adapter", llama.model)
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match=r"notes\.txt"):
        save_adapter(edit, tmp_path / "adapter", llama.model)
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"


# -- adapters that were made elsewhere -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 10, "target_modules": ["down_proj"]},
        {"r": 4, "lora_alpha": 10, "target_modules": ["down_proj", "q_proj"], "use_rslora": True},
        {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "rank_pattern": {"down_proj": 5}},
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["o_proj"],
            "alpha_pattern": {r"^model\.layers\.\d+\.self_attn.*": 7},
        },
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["o_proj", "q_proj"],
            "alpha_pattern": {r"layers\.(0|[2-3])\.self_attn\.(q|o)_proj": 7, "proj": 11, "(a|a)*b": 5},
        },
    ],
)
def test_an_adapter_of_peft_is_an_edit(llama, settings, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    adapted = quietly(peft.get_peft_model, copy.deepcopy(llama.model), config).eval()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "README.md").unlink(missing_ok=True)
    expected = families.logits(llama, "llama", adapted.base_model.model)
    edit = load_adapter(tmp_path / "adapter", llama.model)
    assert (expected - families.logits(llama, "llama")).abs().max() > 1e-3
    with edit.applied(llama.model):
        torch.testing.assert_close(families.logits(llama, "llama"), expected, rtol=0, atol=1e-5)


def damaged(config=None, tensors=None):
    """Changes an adapter's configuration and its tensors."""

    def change(folder):
        if config is not None:
            found = json.loads((folder / CONFIG).read_text())
            (folder / CONFIG).write_text(json.dumps({**found, **config}))
        if tensors is not None:
            found = load_file(folder / WEIGHTS)
            save_file({name: t.contiguous() for name, t in tensors(found).items()}, folder / WEIGHTS)

    return change


def renamed(old, new):
    return lambda found: {name.replace(old, new): t for name, t in found.items()}


DAMAGES = {
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), "no adapter_config.json"),
    "not JSON": (lambda folder: (folder / CONFIG).write_text("{"), "not JSON"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[1]"), "one object"),
    "another kind": (damaged({"peft_type": "IA3"}), "'IA3' adapter"),
    "DoRA": (damaged({"use_dora": True}), "DoRA"),
    "whole modules": (damaged({"modules_to_save": ["lm_head"]}), "replaces whole modules"),
    "biases": (damaged({"bias": "all"}), "changes biases"),
    "initialised by PiSSA": (damaged({"init_lora_weights": "pissa_niter_4"}), "changed the base model too"),
    "a rank that is not its own": (damaged({"r": 7, "rank_pattern": {}}), "rank"),
    "a rank that is no number": (damaged({"r": "many", "rank_pattern": {}}), "should be a number"),
    "patterns that are none": (damaged({"alpha_pattern": [1]}), "should be an object"),
    "a pattern that is none": (damaged({"alpha_pattern": {"(a+": 2}}), "is no regular expression"),
    "no number at all": (damaged({"lora_alpha": float("nan"), "alpha_pattern": {}}), "NaN is no number"),
    "a number without end": (damaged({"lora_alpha": 10**400, "alpha_pattern": {}}), "should be a number"),
    "no tensors": (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "tensors that were cut": (lambda folder: (folder / WEIGHTS).write_bytes(b"\x00" * 20), "not a safetensors file"),
    "a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "is never read"),
    "one factor": (damaged(tensors=lambda t: dict(list(t.items())[1:])), "missing or do not fit"),
    "no factor": (damaged(tensors=lambda t: {}), "no factors"),
    "an embedding": (damaged(tensors=renamed("lora_A.weight", "lora_embedding_A")), "no factor of a linear"),
    "a module that is not there": (damaged(tensors=renamed(".layers.", ".strata.")), "does not have"),
    "another shape": (
        damaged(tensors=lambda t: {n: (x[:, :-1] if "lora_A" in n else x) for n, x in t.items()}),
        "as if",
    ),
    "NaN": (damaged(tensors=lambda t: {n: x * float("nan") for n, x in t.items()}), "NaN or infinity"),
}


def twice(found):
    """Another adapter's factor for a matrix that has one."""
    name = next(iter(found))
    return {**found, name.replace(".weight", ".default.weight"): found[name] + 1}


def with_weight(change):
    """A weight of the base model, changed, beside the factors, as PEFT saves embeddings."""
    return lambda found: {
        **found,
        "base_model.model.model.embed_tokens.weight": change(families.task("llama").model.model.embed_tokens.weight),
    }


DAMAGES |= {
    "one factor twice": (damaged(tensors=twice), "the same factor, given twice"),
    "one factor with and without the prefix": (
        damaged(tensors=lambda t: {**t, **{n.removeprefix("base_model.model."): x.clone() for n, x in t.items()}}),
        "the same factor, given twice",
    ),
    "integers": (damaged(tensors=lambda t: {n: x.int() for n, x in t.items()}), "stored as int32; allowed are float16"),
    "truth values": (damaged(tensors=lambda t: {n: x > 0 for n, x in t.items()}), "stored as bool"),
    "complex numbers": (damaged(tensors=lambda t: {n: x + 0j for n, x in t.items()}), "stored as complex64"),
    "a setting that is no truth value": (damaged({"use_rslora": "false"}), "should be true or false"),
    "an expression that Python matches for ever": (damaged({"alpha_pattern": {".*" * 20 + "x|(" * 30: 2}}), "nests"),
    "expressions by the thousand": (
        damaged({"alpha_pattern": {f"(.*_.*)*(.*_.*)*{n}": 2 for n in range(10_000)}}),
        "steps to match",
    ),
    "trained embeddings": (damaged(tensors=with_weight(lambda w: w + 1)), "not the model's own"),
    "a resized vocabulary": (damaged(tensors=with_weight(lambda w: w[:-1])), "the vocabulary was resized"),
    "an adapter of MLX": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapters.safetensors"),
        "an adapter of MLX, which is not read",
    ),
    "a key twice in the configuration": (
        lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('"r":', '"r": 1, "r":')),
        "'r' is given twice",
    ),
}


def test_factors_of_other_dtypes_are_read_as_numbers(llama, tmp_path):
    edit = random_edit(llama.model)
    for number, dtypes in enumerate([("float64", "float32"), ("float16", "bfloat16"), ("float8_e5m2", "float16")]):
        adapter = tmp_path / str(number)
        save_adapter(edit, adapter, llama.model)
        a, b = (getattr(torch, dtype) for dtype in dtypes)
        damaged(tensors=lambda t, a=a, b=b: {n: x.to(a if "lora_A" in n else b) for n, x in t.items()})(adapter)
        for name, change in load_adapter(adapter, llama.model).changes.items():
            expected = edit.changes[name].delta.to(b).float().mT @ edit.changes[name].u.to(a).float()
            torch.testing.assert_close(change.dense(), expected)
            assert change.u.dtype == change.delta.dtype == torch.float32


def test_a_copy_of_the_models_own_weight_changes_nothing(llama, tmp_path):
    """PEFT saves embeddings beside the factors if it takes the vocabulary for resized."""
    edit = random_edit(llama.model)
    save_adapter(edit, tmp_path / "adapter", llama.model)
    damaged(tensors=with_weight(lambda weight: weight.detach().clone()))(tmp_path / "adapter")
    found = load_adapter(tmp_path / "adapter", llama.model)
    assert all(torch.equal(found.changes[name].u, change.u) for name, change in edit.changes.items())


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_adapter_that_is_damaged_is_refused(llama, damage, tmp_path):
    save_adapter(random_edit(llama.model), tmp_path / "adapter", llama.model)
    change, message = DAMAGES[damage]
    change(tmp_path / "adapter")
    with pytest.raises(RemendError, match=message):
        load_adapter(tmp_path / "adapter", llama.model)


# -- merged checkpoints ----------------------------------------------------------------------------------------------


def test_a_merged_model_is_the_edited_one(task, kind, tmp_path):
    edit = random_edit(task.model)
    with edit.applied(task.model):
        expected = families.logits(task, kind)
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    found = save_merged(edit, tmp_path / "merged", task, shard="8KB")
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert max(found.lost.values()) < 1e-6
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    loaded = type(task.model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(families.logits(task, kind, loaded), expected, rtol=0, atol=1e-5)


def compiled_layers(model, names):
    """The model with the modules around the edited layers compiled, after a pass without the edit."""
    for parent in {name.rpartition(".")[0] for name in names}:
        model.get_submodule(parent).compile(backend="eager")
    return model


def by_the_tensors_own_rank(model, folder):
    """The model with an adapter merged as llama.cpp does it: alpha of the file, divided by each tensor's own rank."""
    alpha, tensors = json.loads((folder / CONFIG).read_text())["lora_alpha"], load_file(folder / WEIGHTS)
    for key, a in tensors.items():
        if ".lora_A." in key:
            b = tensors[key.replace("lora_A", "lora_B")]
            module = model.get_submodule(key.removeprefix("base_model.model.").partition(".lora_A")[0])
            dense = alpha / b.shape[1] * b @ a
            module.weight.data += dense.T if is_conv1d(module) else dense
    return model


@pytest.mark.parametrize("make_edit", [random_edit, families.unit_edit], ids=["low rank", "units"])
def test_all_ways_of_applying_an_edit_give_the_same_logits(make_edit, task, kind, tmp_path, unchecked):
    """Branch, weights, adapter and checkpoint; eager and compiled; the edit itself, and what is read back."""
    peft = pytest.importorskip("peft")
    edit, low_rank = make_edit(task.model), make_edit is random_edit
    assert len({change.rank for change in edit.changes.values()}) > 1
    with edit.applied(task.model):
        expected = families.logits(task, kind)
    folders = [tmp_path / name for name in ("edit", "adapter", "merged")]
    edit.save(folders[0])
    if low_rank:
        save_adapter(edit, folders[1], task)
    save_merged(edit, folders[2], task)
    fresh = lambda: copy.deepcopy(task.model)  # noqa: E731
    ways = {"checkpoint": lambda: type(task.model).from_pretrained(folders[2]).eval()}
    if low_rank:
        ways |= {
            "PEFT": lambda: quietly(peft.PeftModel.from_pretrained, fresh(), str(folders[1])).eval().base_model.model,
            "by the tensor's own rank": lambda: by_the_tensors_own_rank(fresh(), folders[1]),
        }
    for way, make in ways.items():
        torch.testing.assert_close(families.logits(task, kind, make()), expected, rtol=0, atol=1e-5, msg=way)
    compiled = compiled_layers(fresh(), edit.changes)
    plain = families.logits(task, kind, compiled)
    for model in (fresh(), compiled):
        for again in (edit, Edit.load(folders[0]), *([load_adapter(folders[1], task)] if low_rank else [])):
            with again.applied(model):
                torch.testing.assert_close(families.logits(task, kind, model), expected, rtol=0, atol=1e-5)
            with again.merge(model):
                torch.testing.assert_close(families.logits(task, kind, model), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(families.logits(task, kind, model), plain, rtol=0, atol=1e-6)


def test_merging_says_what_rounding_costs(tmp_path):
    task = families.task("llama", torch.bfloat16)
    found = save_merged(random_edit(task.model), tmp_path / "merged", task)
    assert 1e-4 < max(found.lost.values()) < 0.1
    assert type(task.model).from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    with pytest.raises(FileError, match=r"holds .*config.json"):
        save_merged(random_edit(task.model), tmp_path / "merged", task)


# -- the difference of two models ------------------------------------------------------------------------------------


def test_the_difference_of_two_models_is_the_edit(task, kind):
    edit = random_edit(task.model)
    after = copy.deepcopy(task.model)
    edit.merge(after)
    found = diff_checkpoints(task.model, after)
    assert found.other_parameters == ()
    assert found.edit.changes.keys() == edit.changes.keys()
    with edit.applied(task.model):
        expected = families.logits(task, kind)
    with found.edit.applied(task.model):
        torch.testing.assert_close(families.logits(task, kind), expected, rtol=0, atol=1e-4)
    assert max(found.lost.values()) < 1e-5
    few = diff_checkpoints(task.model, after, rank=1)
    assert max(few.lost.values()) > 0.05
    assert {change.rank for change in few.edit.changes.values()} == {1}


def test_what_no_edit_can_change_is_named(llama):
    after = copy.deepcopy(llama.model)
    with torch.no_grad():
        after.model.embed_tokens.weight[3] += 1
    with pytest.raises(EditError, match=r"only in model\.embed_tokens\.weight"):
        diff_checkpoints(llama.model, after)
    random_edit(llama.model).merge(after)
    assert diff_checkpoints(llama.model, after).other_parameters[0] == "model.embed_tokens.weight"
    with pytest.raises(EditError, match="in nothing"):
        diff_checkpoints(llama.model, copy.deepcopy(llama.model))
    with pytest.raises(WrongBaseError):
        diff_checkpoints(llama.model, families.task("gpt2").model)


def test_what_is_stored_more_coarsely_is_compared_by_value(llama):
    """In bfloat16 a model's values may be others, but that its numbers are stored otherwise is no difference."""
    coarse = copy.deepcopy(llama.model).to(torch.bfloat16)
    fine = copy.deepcopy(coarse).float()
    with pytest.raises(EditError, match="in nothing"):
        diff_checkpoints(fine, coarse)


@pytest.mark.parametrize("loaded_in", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_change_that_was_saved_in_a_coarser_dtype_is_found_as_it_was_made(llama, dtype, loaded_in):
    """Of the rank that it was made with, in the matrices that it changed; the numbers tell, not the dtype now."""
    edit = random_edit(llama.model)
    after = copy.deepcopy(llama.model)
    edit.merge(after)
    after = after.to(dtype).to(loaded_in or dtype)
    found = diff_checkpoints(llama.model, after)
    assert (found.other_parameters, found.compared_in) == ((), dtype)
    assert {name: change.rank for name, change in found.edit.changes.items()} == {
        name: change.rank for name, change in edit.changes.items()
    }
    for name, change in found.edit.changes.items():
        expected = edit.changes[name].dense()
        assert (change.dense() - expected).norm() < 0.03 * expected.norm()


def test_a_base_in_a_coarse_dtype_gives_the_change_that_was_merged_into_it(llama):
    base = copy.deepcopy(llama.model).to(torch.bfloat16)
    edit = random_edit(base)
    after = copy.deepcopy(base)
    edit.merge(after)
    found = diff_checkpoints(base, after)
    assert found.compared_in is None
    assert {name: change.rank for name, change in found.edit.changes.items()} == {
        name: change.rank for name, change in edit.changes.items()
    }
    exact = diff_checkpoints(base.float(), _with_small_noise(base)).edit
    assert len(exact.changes) == len(list(editable_modules(base, ["*"]))), "what a finer model adds is all there"


def _with_small_noise(model):
    """A model in float32 that differs from its base everywhere, by less than bfloat16 can tell."""
    after = copy.deepcopy(model).float()
    with torch.no_grad():
        for module in editable_modules(after, ["*"]).values():
            module.weight.mul_(1 + 1e-4)
    return after


def test_a_change_of_full_rank_in_a_coarse_dtype_is_kept_whole(llama):
    """Each value one step further: as small as rounding errors are, but no rounding explains it."""
    base = copy.deepcopy(llama.model).to(torch.bfloat16)
    after = copy.deepcopy(base)
    name, module = next(iter(editable_modules(after).items()))
    signs = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(0)).sign()
    with torch.no_grad():
        module.weight.mul_(1 + signs * 2**-7)
    (change,) = diff_checkpoints(base, after).edit.changes.values()
    dense = after.get_submodule(name).weight.float() - base.get_submodule(name).weight.float()
    torch.testing.assert_close(change.dense(), dense, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(llama, name, value):
    after = copy.deepcopy(llama.model)
    with torch.no_grad():
        after.get_parameter(name).view(-1)[3] = value
    with pytest.raises(NonFiniteError, match=f"{name} of the changed model holds NaN or infinity"):
        diff_checkpoints(llama.model, after)
    with pytest.raises(NonFiniteError, match=f"{name} of the model before"):
        diff_checkpoints(after, llama.model)


# -- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(llama, tmp_path):
    """A model and an edit of it, as folders."""
    llama.model.save_pretrained(tmp_path / "model")
    llama.processor.save_pretrained(tmp_path / "model")
    random_edit(remend.load(str(tmp_path / "model"), "cpu").model).save(tmp_path / "edit")
    return tmp_path


def test_there_and_back_by_command(folder, capsys):
    model, edit = str(folder / "model"), str(folder / "edit")
    assert run(["export", edit, "--to", "peft", "--model", model, "--out", str(folder / "adapter"), "--rank", "2"]) == 0
    told = capsys.readouterr().out
    assert "compressed to rank 2" in told
    assert "--max-lora-rank 8" in told
    assert run(["import", str(folder / "adapter"), "--model", model, "--out", str(folder / "back")]) == 0
    assert {change.rank for change in Edit.load(folder / "back").changes.values()} == {1, 2}
    assert run(["export", edit, edit, "--to", "native", "--out", str(folder / "twice")]) == 0
    twice, once = Edit.load(folder / "twice").norms(), Edit.load(edit).norms()
    assert twice == pytest.approx({name: 2 * norm for name, norm in once.items()})
    assert run(["export", edit, "--to", "merged", "--model", model, "--out", str(folder / "merged")]) == 0
    assert run(["import", str(folder / "merged"), "--model", model, "--out", str(folder / "from-merged")]) == 0
    assert Edit.load(folder / "from-merged").norms() == pytest.approx(once, rel=1e-4)


def test_commands_that_cannot_be(folder, capsys):
    model, edit = str(folder / "model"), str(folder / "edit")
    assert run(["export", edit, "--to", "lora", "--out", str(folder / "x")]) == 2
    assert run(["export", edit, "--to", "merged", "--model", model, "--out", edit]) == 1
    assert run(["export", str(folder / "none"), "--to", "peft", "--out", str(folder / "x")]) == 1
    assert run(["import", str(folder / "none"), "--model", model, "--out", str(folder / "x")]) == 1
    assert run(["import", str(folder / "edit"), "--model", model, "--out", str(folder / "x")]) == 1
    told = capsys.readouterr().err
    assert "did you mean" in told or "known: merged, native, peft" in told
    assert not (folder / "x").exists()


def test_an_edit_that_names_no_model_at_hand_says_so(folder, capsys):
    assert run(["export", str(folder / "edit"), "--to", "peft", "--out", str(folder / "x")]) == 1
    assert "--model" in capsys.readouterr().err


def test_a_skeleton_has_no_weights():
    assert all(parameter.is_meta for parameter in skeleton("atlas").parameters())
    with pytest.raises(ModelError, match="no configuration"):
        skeleton("no/such-model")


class DenseFormat(EditFormat):
    """A format of another package: one file of dense changes."""

    low_rank = False

    def write(self, edit, path, task):
        assert task is None, "it needs nothing"
        path.mkdir(parents=True)
        save_file({name: change.dense() for name, change in edit.changes.items()}, path / "dense.safetensors")
        return {}

    def detect(self, path):
        return (path / "dense.safetensors").exists()

    def read(self, path, task, load, rank=None):
        changes = {}
        for name, dense in load_file(path / "dense.safetensors").items():
            left, values, right = torch.linalg.svd(dense, full_matrices=False)
            keep = rank or int((values > 1e-6 * values[0]).sum())
            changes[name] = LowRank(right[:keep], (left * values).mT[:keep].contiguous())
        return ImportedEdit(Edit(changes, ModelFingerprint.of(task.model, changes)), dict.fromkeys(changes, 0.0))


@pytest.fixture
def dense_format():
    FORMATS.register("dense", DenseFormat, help="dense changes", title="a file of dense changes")
    yield "dense"
    FORMATS.unregister("dense")


def test_a_format_of_another_package_is_written_and_read(folder, dense_format, capsys):
    model, edit = str(folder / "model"), str(folder / "edit")
    assert run(["export", edit, "--to", dense_format, "--out", str(folder / "dense")]) == 0
    assert "is a file of dense changes for" in capsys.readouterr().out
    assert run(["import", str(folder / "dense"), "--model", model, "--out", str(folder / "back")]) == 0
    assert Edit.load(folder / "back").norms() == pytest.approx(Edit.load(edit).norms(), rel=1e-4)
    assert run(["export", edit, "--to", dense_format, "--out", str(folder / "dense")]) == 1, "it may not be replaced"


def test_what_is_in_no_format_is_not_imported(folder, capsys):
    (folder / "other").mkdir()
    model = str(folder / "model")
    assert run(["import", str(folder / "other"), "--model", model, "--out", str(folder / "x")]) == 1
    assert "is in none of the formats native, peft, merged" in capsys.readouterr().err
    assert run(["import", str(folder / "edit"), "--model", model, "--out", str(folder / "x")]) == 1
    assert "is an edit of remend already" in capsys.readouterr().err
