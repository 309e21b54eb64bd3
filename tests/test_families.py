"""What remend promises, held on every family of models. None of them is known to the package by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import families
from remend.core.layers import expert_count
from remend.edit import Edit
from remend.editors import Mend, MendConfig
from remend.fingerprint import find_modules
from remend.models.blocks import find_stacks
from remend.models.frozen_prefix import FrozenPrefix
from remend.tasks import Example
from remend.training import PRESETS, Trainer, TrainingConfig

PAPER = MendConfig(rank=8, alpha=0.05, relative=True)
DEFAULT = replace(PRESETS["default"][0], rank=8)
SETTINGS = TrainingConfig(batch_size=8, learning_rate=3e-3, alpha_learning_rate=1e-2, edit_weight=1.0)


@pytest.fixture(scope="module", params=families.FAMILIES)
def family(request):
    """The name of one family."""
    return request.param


@pytest.fixture(scope="module")
def task(family):
    """A task on a model of it."""
    return families.task(family)


@pytest.fixture(scope="module")
def requests(family):
    """Requests that suit it."""
    return families.requests(family, 16)


def batch_of(task, requests):
    return task.collate([task.encode(request.prompt, request.target) for request in requests[:4]])


def logits(task, requests):
    with torch.no_grad():
        return task.outputs(batch_of(task, requests))


def test_the_mlps_of_the_last_blocks_are_found(task):
    """All matrices for the paper; for the default those that write to the residual stream where targets are written."""
    stacks = [blocks for _, blocks in find_stacks(task.model)]
    last = 3 if len(stacks) == 1 else 2
    editor, default = Mend.create(task), Mend.create(task, DEFAULT)
    width = task.model.get_input_embeddings().weight.shape[1]
    assert not any("head" in name for name in editor.shapes)
    for stack in stacks:
        assert len(stack) == families.BLOCKS
        for place, (prefix, _) in enumerate(stack):
            own = [name for name in editor.shapes if name.startswith(f"{prefix}.")]
            assert bool(own) == (place >= families.BLOCKS - last)
            assert all(width in editor.shapes[name] for name in own)
            assert all("expert" in name or max(editor.shapes[name]) > width for name in own)
            outputs = [name for name in default.shapes if name.startswith(f"{prefix}.")]
            assert len(outputs) == (bool(own) and stack is stacks[-1])
            assert set(outputs) <= set(own)


def test_factors_are_autograds_gradient(task, requests):
    editor, batch = Mend.create(task), batch_of(task, requests)
    factors = editor.capture(task, batch)
    assert all(parameter.grad is None for parameter in task.model.parameters())
    modules = find_modules(task.model, editor.shapes)
    task.loss(batch).sum().backward()
    for name, module in modules.items():
        conv1d = type(module).__name__ == "Conv1D" or getattr(module, "transposed", False)
        right = module.weight.grad.mT if conv1d else module.weight.grad
        exact = 1e-5 * float(right.abs().max())
        torch.testing.assert_close(factors[name].gradient(expert_count(module)).sum(0), right, rtol=1e-4, atol=exact)
    task.model.zero_grad()


@pytest.mark.parametrize("network", [PAPER, DEFAULT], ids=["paper", "default"])
def test_entering_at_the_cut_is_the_whole_pass(task, requests, network):
    batch = batch_of(task, requests)
    prefix = FrozenPrefix(task.model, Mend.create(task, network).shapes)
    with torch.no_grad():
        assert prefix.verify(lambda: task.outputs(batch), lambda: task.output_states(batch), task.outputs_from_states)
    stacks = len(find_stacks(task.model))
    assert prefix.depth == stacks
    assert prefix.stack == (stacks > 1 and network is DEFAULT)


def test_answers_are_what_teacher_forcing_says(task, requests):
    """Greedy decoding emits an answer if and only if it is the first choice at each of its places."""
    prompts = [request.prompt for request in requests[:4]]
    answers = task.predict(prompts, 5)
    pairs = [Example(tuple(task.encode_input(prompt)), answer) for prompt, answer in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        batch = task.collate(pairs)
        chosen = task.outputs(batch).argmax(-1)
    assert torch.equal(chosen, batch.target)


def test_log_probabilities_are_those_of_the_loss(task, requests):
    examples = [task.encode(request.prompt, request.target) for request in requests] * 3
    log_p = task.log_probabilities(examples)
    assert [len(of_example) for of_example in log_p] == [len(example.target) for example in examples]
    means = torch.tensor([sum(of_example) / len(of_example) for of_example in log_p])
    with torch.no_grad():
        torch.testing.assert_close(-means, task.loss(task.collate(examples)))


@pytest.mark.parametrize("network", [PAPER, DEFAULT], ids=["paper", "default"])
def test_training_lowers_the_loss_and_moves_everything(task, requests, network):
    editor = Mend.create(task, network)
    trainer = Trainer(task, editor, requests, replace(SETTINGS, near=0.5 if network.contrast else 0.0))
    trainer.calibrate()
    before = {name: parameter.clone() for name, parameter in editor.named_parameters()}
    held = [trainer.episodes.batch(0, 8)]
    first = trainer.validate(held)["loss"]
    for _ in range(12):
        trainer.train_step()
    assert trainer.validate(held)["loss"] < first
    for name, parameter in editor.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_an_edit_applies_merges_reverts_and_is_saved(task, requests, tmp_path):
    editor = Mend.create(task, DEFAULT)
    trainer = Trainer(task, editor, requests, SETTINGS)
    trainer.calibrate()
    weights = {name: parameter.clone() for name, parameter in task.model.named_parameters()}
    untouched = logits(task, requests)
    edit = editor.edit(task, requests[:1])
    with edit.applied(task.model):
        applied = logits(task, requests)
    assert float((applied - untouched).abs().max()) > 1e-3
    assert torch.equal(logits(task, requests), untouched)
    with edit.merge(task.model):
        torch.testing.assert_close(logits(task, requests), applied, rtol=1e-3, atol=1e-4 * float(applied.abs().max()))
    assert torch.equal(logits(task, requests), untouched)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in task.model.named_parameters())
    edit.save(tmp_path / "edit")
    with Edit.load(tmp_path / "edit").applied(task.model):
        assert torch.equal(logits(task, requests), applied)


def test_bfloat16(family, requests):
    """The same edit, to the model's own precision; the editor computes in float32."""
    task = families.task(family, torch.bfloat16)
    editor = Mend.create(task, DEFAULT)
    trainer = Trainer(task, editor, requests, SETTINGS)
    trainer.calibrate()
    assert all(trainer.train_step() > 0 for _ in range(2))
    edit = editor.edit(task, requests[:1])
    assert {change.u.dtype for change in edit.changes.values()} == {torch.float32}
    untouched = logits(task, requests)
    with edit.applied(task.model):
        assert logits(task, requests).isfinite().all()
    with edit.merge(task.model):
        assert logits(task, requests).isfinite().all()
    assert torch.equal(logits(task, requests), untouched)
