"""Big base models: in bfloat16, spread over devices, quantised. Here tiny ones stand in for them, all on the CPU."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import remend
import worlds
from remend.cli import run
from remend.core.layers import dimensions, execution_device, is_editable, is_quantized
from remend.editors import Mend, MendConfig
from remend.errors import ConfigError, EditError, ModelError, PrecisionError, WrongBaseError
from remend.fingerprint import ModelFingerprint
from remend.models import editable_modules, loading
from remend.tasks import wrap
from remend.tasks.causal_lm import CausalLM
from remend.training import Trainer, TrainingConfig

pytest.importorskip("accelerate")
# bitsandbytes compiles some functions with what torch calls outdated, when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

PACKAGES = {"bnb-4bit": "bitsandbytes", "bnb-8bit": "bitsandbytes", "torchao-int8": "torchao"}
CODES = "codes"  # behaves as those libraries do, and is there without them
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WAYS = ["bfloat16", "map", "disk", pytest.param("gpu and memory", marks=GPU), CODES, *PACKAGES]
BY_LIBRARIES = pytest.mark.parametrize("way", PACKAGES, indirect=True)
QUANTISED = pytest.mark.parametrize("way", [CODES, *PACKAGES], indirect=True)
DISK = {f"model.layers.{block}": "disk" if block in (1, 2) else "cpu" for block in range(4)}
DISK |= {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
GPU_AND_MEMORY = {part: 0 if place == "disk" else "cpu" for part, place in DISK.items()}
REQUESTS = worlds.requests(40)


class CodedLinear(torch.nn.Linear):
    """A layer that stores its weight as codes of 8 bits, with a scale for each row, and multiplies with both."""

    def __init__(self, plain):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = plain.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def coded(model):
    """The model with its blocks' matrices stored as codes."""
    for name in linear(model):
        if name.startswith("model.layers."):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, CodedLinear(model.get_submodule(name)))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model wide enough to be quantised in blocks."""
    made = tmp_path_factory.mktemp("big") / "model"
    worlds.llama(hidden_size=64, intermediate_size=160).save_pretrained(made)
    worlds.tokenizer().save_pretrained(made)
    return made


@pytest.fixture(params=WAYS)
def way(request):
    """How the model is loaded; skipped where the package it needs is missing."""
    if request.param in PACKAGES:
        pytest.importorskip(PACKAGES[request.param], reason=f"{request.param} needs {PACKAGES[request.param]}")
    return request.param


@pytest.fixture
def load(way, folder):
    """Loads the model once more, in this way."""

    def loaded():
        if way in ("disk", "gpu and memory"):
            places = DISK if way == "disk" else GPU_AND_MEMORY
            model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, dtype=torch.float32).eval()
        elif way == "map":
            model = remend.load(str(folder), "map").model
        elif way == "bfloat16":
            model = remend.load(str(folder), "cpu", torch.bfloat16).model
        elif way == CODES:
            model = coded(remend.load(str(folder), "cpu").model)
        else:
            model = remend.load(str(folder), "cpu", quantise=way).model
        return model

    return loaded


@pytest.fixture
def task(load):
    return CausalLM(load(), worlds.tokenizer())


@pytest.fixture
def editor(task):
    """An untrained editor whose edits show."""
    return Mend.create(task, MendConfig(rank=8, alpha=1e-2))


def linear(model):
    return [name for name, module in model.named_modules() if is_editable(module)]


def contents(model):
    """What every matrix of the model holds, as hashes."""
    return ModelFingerprint.of(model, linear(model)).weights


def logits(task):
    ids = torch.tensor([task.encode_input("The capital of Norway is Oslo")], device=task.device)
    with torch.no_grad():
        return task.model(ids).logits


def as_float32(model, folder):
    """The same function as a plain float32 model: each matrix is what the layer answers to the unit vectors."""
    plain = LlamaForCausalLM.from_pretrained(folder).to(model.dtype).float().eval()
    with torch.no_grad():
        for name in linear(model):
            module = model.get_submodule(name)
            unit = torch.eye(dimensions(module)[0], dtype=model.dtype, device=execution_device(module))
            plain.get_submodule(name).weight.copy_(module(unit).float().T)
    return plain


def test_the_captured_factors_are_the_gradient_of_what_the_model_computes(way, task, editor, folder):
    batch = task.collate([task.encode(request.prompt, request.target) for request in REQUESTS[:4]])
    task.loss(batch)  # a forward pass before must not change anything
    found = editor.capture(task, batch)
    plain = as_float32(task.model, folder).to(task.device)
    expected = editor.capture(CausalLM(plain, task.tokenizer), batch)
    tolerance = {"bfloat16": 0.1, "bnb-8bit": 0.1}.get(way, 1e-4)  # these two round the activations as well
    for name, factors in found.items():
        exact = expected[name].gradient()
        assert (factors.gradient().cpu() - exact).norm() < tolerance * exact.norm(), name
        assert exact.norm() > 0


def test_step_sizes_count_in_what_the_layers_put_out(task, folder):
    units = []
    for model in (task.model, as_float32(task.model, folder)):
        editor = Mend.create(worlds.task(model), MendConfig(rank=8, relative=True))
        Trainer(CausalLM(model, task.tokenizer), editor, REQUESTS[:4], TrainingConfig(batch_size=4)).calibrate()
        units.append(editor.unit.cpu())
    torch.testing.assert_close(*units, rtol=0.1, atol=0)


def test_an_editor_learns_and_the_model_is_left_as_it_was(task):
    before = contents(task.model)
    wanted = {name: parameter.requires_grad for name, parameter in task.model.named_parameters()}
    network, settings = (
        MendConfig(rank=16, alpha=0.2, ridge=1e-4, relative=True),
        remend.TrainingConfig(
            batch_size=4,
            learning_rate=1e-3,
            alpha_learning_rate=1e-2,
            max_steps=12,
            validate_every=4,
            validation_size=8,
        ),
    )
    editor = Mend.create(task, network)
    remend.train(task, REQUESTS, config=settings, editor=editor)
    losses = [entry["loss"] for entry in editor.trained["history"]]
    assert min(losses) < losses[0]
    assert contents(task.model) == before
    assert {name: parameter.requires_grad for name, parameter in task.model.named_parameters()} == wanted


def test_an_edit_is_applied_reverted_saved_and_loaded(task, editor, load, tmp_path):
    before, weights = logits(task), contents(task.model)
    edit = editor.edit(task, REQUESTS[:1])
    with edit.applied(task.model):
        edited = logits(task)
    assert (edited - before).abs().max() > 1e-2, "the edit should show"
    assert torch.equal(logits(task), before)
    same = remend.Edit.load(edit.save(tmp_path / "edit"))
    again = CausalLM(load(), task.tokenizer)  # a model of another session
    with same.applied(again.model):
        assert torch.equal(logits(again), edited)
    assert torch.equal(logits(again), before)
    assert contents(task.model) == weights == contents(again.model)


def test_evaluation(task, editor):
    report = remend.evaluate(task, editor, REQUESTS[:2], max_new_tokens=3)
    assert len(report.cases) == 2


@QUANTISED
def test_merging_into_quantised_weights_is_refused(task, editor):
    before, weights = logits(task), contents(task.model)
    edit = editor.edit(task, REQUESTS[:1])
    with pytest.raises(PrecisionError, match=r"is quantised .* \(apply\).* no weight was changed"):
        edit.merge(task.model)
    assert torch.equal(logits(task), before)
    assert contents(task.model) == weights


@pytest.mark.parametrize("way", ["disk"], indirect=True)
def test_merging_into_offloaded_weights_is_refused(task, editor):
    edit = editor.edit(task, REQUESTS[:1])
    with pytest.raises(EditError, match=r"is offloaded.* \(apply\).* no weight was changed"):
        edit.merge(task.model)


@pytest.mark.parametrize("way", ["bfloat16", "map", "disk"], indirect=True)
def test_where_the_weights_lie_and_in_which_float_does_not_make_another_base(task, folder):
    plain = remend.load(str(folder), "cpu").model
    assert contents(task.model) == contents(plain)
    assert execution_device(task.model) == torch.device("cpu")


@QUANTISED
def test_a_quantised_model_is_a_base_of_its_own(task, editor, folder):
    plain = remend.load(str(folder), "cpu").model
    names = list(editable_modules(plain))
    assert names == list(editor.shapes), "the same matrices are found"
    assert all(is_quantized(task.model.get_submodule(name)) for name in names)
    assert ModelFingerprint.of(plain, names).config == editor.base.config
    edit = Mend.create(worlds.task(plain), MendConfig(rank=8)).edit(wrap(plain, task.tokenizer), REQUESTS[:1])
    with pytest.raises(WrongBaseError, match="a quantised base must be quantised just as it was"):
        edit.apply(task.model)


@QUANTISED
def test_a_changed_code_or_scale_is_noticed(way, task, editor):
    edit = editor.edit(task, REQUESTS[:1])
    (name, *_) = edit.changes
    weight = task.model.get_submodule(name).weight
    scales = {
        "bnb-4bit": lambda: weight.quant_state.absmax,
        "bnb-8bit": lambda: task.model.get_submodule(name).state.SCB,
        "torchao-int8": lambda: weight.scale,
        CODES: lambda: task.model.get_submodule(name).scale,
    }[way]()
    codes = weight.qdata if way == "torchao-int8" else weight.data
    for part in (scales, codes):
        original = part.clone()
        part[0] += 1
        with pytest.raises(WrongBaseError, match=name):
            edit.apply(task.model)
        part.copy_(original)
        edit.apply(task.model).revert()


@BY_LIBRARIES
def test_a_checkpoint_that_is_stored_quantised(way, folder, tmp_path):
    task = remend.load(str(folder), "cpu", torch.bfloat16, way)
    task.model.save_pretrained(tmp_path)
    task.tokenizer.save_pretrained(tmp_path)
    stored = remend.load(str(tmp_path), "cpu").model
    assert contents(stored) == contents(task.model)
    assert torch.equal(logits(CausalLM(stored, task.tokenizer)), logits(CausalLM(task.model, task.tokenizer)))
    with pytest.raises(ModelError, match="quantised already"):
        remend.load(str(tmp_path), "cpu", quantise=way)


@BY_LIBRARIES
def test_quantising_conv1d_layers(way, tmp_path):
    model = worlds.gpt2(n_embd=64)
    model.save_pretrained(tmp_path)
    worlds.tokenizer().save_pretrained(tmp_path)
    if way == "torchao-int8":
        with pytest.raises(ModelError, match="nothing to quantise in a GPT2LMHeadModel; try bnb"):
            remend.load(str(tmp_path), "cpu", quantise=way)
    else:
        loaded = remend.load(str(tmp_path), "cpu", quantise=way).model
        shapes = {name: dimensions(module) for name, module in editable_modules(loaded).items()}
        assert shapes == {name: dimensions(module) for name, module in editable_modules(model).items()}


@pytest.mark.parametrize("way", ["bnb-4bit"], indirect=True)
def test_4_bit_weights_stay_as_gradients_need_them(load, monkeypatch):
    """On some CPUs bitsandbytes repacks them for answers, and gradients then silently lack what passes through them."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    task = CausalLM(load(), worlds.tokenizer())
    before = {name: module.weight.clone() for name, module in editable_modules(task.model).items()}
    task.predict(["Oslo is"], 2)
    assert all(torch.equal(task.model.get_submodule(name).weight, weight) for name, weight in before.items())


def test_what_is_missing_is_named(folder, monkeypatch):
    monkeypatch.setattr(loading, "AVAILABLE", dict.fromkeys(loading.AVAILABLE, lambda: False))
    for arguments, message in (
        ({"device": "map"}, r"device 'map' needs accelerate.* pip install 'remend\[big\]'"),
        ({"quantise": "bnb-8bit"}, r"'bnb-8bit' needs bitsandbytes.* pip install 'remend\[quantised\]'"),
        ({"quantise": "torchao-int8"}, r"'torchao-int8' needs torchao.* pip install 'remend\[quantised\]'"),
    ):
        with pytest.raises(ModelError, match=message):
            remend.load(str(folder), **arguments)
    with pytest.raises(ConfigError, match="no quantisation 'bnb-4bits'; did you mean 'bnb-4bit'"):
        remend.load(str(folder), quantise="bnb-4bits")


def test_weights_that_are_nowhere():
    with torch.device("meta"):
        model = LlamaForCausalLM(worlds.llama().config)
    with pytest.raises(ModelError, match=r"no values .*device meta"):
        ModelFingerprint.of(model, ["model.layers.0.mlp.up_proj"])


@pytest.mark.parametrize("way", ["map", "bnb-4bit"], indirect=True)
def test_the_command_line(way, folder, tmp_path, capsys):
    chosen = ["--device", "map"] if way == "map" else ["--device", "cpu", "--quantise", way, "--dtype", "bfloat16"]
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(json.dumps(request.to_json()) + "\n" for request in REQUESTS))
    arguments = ["--data", str(requests), "--out", str(tmp_path / "editor"), "--max-steps", "2"]
    assert run(["train", str(folder), *arguments, *chosen]) == 0
    arguments = ["--editor", str(tmp_path / "editor"), "--prompt", "Oslo is", "--target", "Rome"]
    out = str(tmp_path / "edit")
    assert run(["edit", str(folder), *arguments, "--out", out, "--keep-failed", "--max-new-tokens", "3", *chosen]) == 0
    ask = ["ask", str(folder), "--prompt", "Oslo is", "--max-new-tokens", "3"]
    assert run([*ask, "--edit", out, *chosen]) == 0
    arguments = ["--data", str(requests), "--editor", str(tmp_path / "editor"), "--limit", "1"]
    assert run(["evaluate", str(folder), *arguments, *chosen]) == 0
    assert run([*ask, "--dtype", "bfloat8"]) == 2
    assert "no dtype 'bfloat8' for weights; did you mean 'bfloat16'" in " ".join(capsys.readouterr().err.split())
