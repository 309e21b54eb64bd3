"""Estimates from a configuration alone equal those of a model with weights."""

import json

import pytest
import torch

import families
import worlds
from remend.cli import run
from remend.editors import Mend
from remend.errors import ModelError
from remend.tasks import wrap
from remend.training import PRESETS, Trainer
from remend.training.resource_estimate import GPUS, dry_run, only_configured


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_dry_run_counts_what_there_would_be(family, preset, tmp_path):
    model = families.make(family)
    model.config.save_pretrained(tmp_path)
    network, settings = PRESETS[preset]
    found = dry_run(str(tmp_path), network, dtype=torch.float32)
    editor = Mend.create(worlds.task(model), network)
    assert found.matrices == editor.shapes
    assert found.editor_parameters == sum(parameter.numel() for parameter in editor.parameters())
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    real = Trainer(wrap(model, worlds.tokenizer()), editor, worlds.requests(8), settings).estimate_memory()
    assert found.editor_bytes == real.editor
    assert found.model_bytes == pytest.approx(real.model, rel=0.05)  # buffers are no parameters
    trained = 4 * found.editor_parameters  # on a CPU, the best state is kept beside
    assert found.training_bytes == max(real.optimizer - trained, real.calibration)
    assert found.gpu_bytes(2) < found.gpu_bytes(1)


def test_what_counts_as_a_configuration_alone(tmp_path):
    families.make("llama").config.save_pretrained(tmp_path)
    assert only_configured(str(tmp_path))
    assert only_configured(str(tmp_path / "config.json"))
    assert not only_configured("atlas")
    assert not only_configured(str(tmp_path / "none"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not only_configured(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    ["{}", "[", '{"model_type": "llama", "hidden_size": 16}', '{"model_type": "vit"}', '{"model_type": "no such"}'],
)
def test_what_is_no_configuration_of_a_language_model(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="is no configuration of a language model"):
        dry_run(str(tmp_path))


def test_doctor_of_a_configuration_prints_and_writes_the_estimate(tmp_path, capsys):
    families.make("llama").config.save_pretrained(tmp_path)
    out = tmp_path / "found.json"
    assert run(["doctor", str(tmp_path / "config.json"), "--layers", "0-1", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in shown
    assert "no weights here" in shown
    assert set(json.loads(out.read_text())["gpu_bytes"]) == set(map(str, GPUS))
    assert run(["doctor", str(tmp_path), "--layers", "9"]) == 2
    assert "names no blocks, or more than there are: 4." in capsys.readouterr().err
