"""Inputs too wide for dense operators: a sketch finds their leading directions, used as the dense form is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import worlds
from remend.core import sketched_moment
from remend.core.key_discriminant import Discriminant
from remend.core.sketched_moment import SketchedMoment, nystrom, random_test_matrix
from remend.core.symmetric_operator import SymmetricOperator
from remend.core.whitening import SecondMoment
from remend.edit import Edit
from remend.editors import Mend
from remend.editors.mend.calibration import moments_bytes
from remend.tasks import wrap
from remend.tasks.causal_lm import CausalLM
from remend.training import PRESETS, Trainer, TrainingConfig, train

D = 60
DEFAULT = replace(PRESETS["default"][0], rank=8)
SETTINGS = TrainingConfig(batch_size=8, learning_rate=3e-3, alpha_learning_rate=1e-2, edit_weight=1.0, near=0.5)


def inputs(decay=0.7, tokens=400):
    """Vectors whose second moment has eigenvalues that fall by ``decay`` from one to the next."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    scales = decay ** (torch.arange(D) / 2)
    return (torch.randn(10, tokens // 10, D, generator=generator) * scales) @ rotation.T


def moments(u, directions):
    every = torch.ones(u.shape[:2], dtype=torch.bool)
    dense = SecondMoment(D, u.device)
    sketched = SketchedMoment(random_test_matrix(D, directions, u.device), directions)
    for moment in (dense, sketched):
        moment.update(u, every)
    return dense, sketched


@pytest.fixture
def wide(monkeypatch):
    """As if the tiny models' inputs were wide."""
    monkeypatch.setattr(sketched_moment, "MAX_DENSE_DIMENSIONS", 20)
    monkeypatch.setattr(sketched_moment, "MAX_DIRECTIONS", 12)
    monkeypatch.setattr(sketched_moment, "OVERSAMPLING", 4)


def test_only_wide_inputs_are_sketched():
    assert sketched_moment.sketch_directions(sketched_moment.MAX_DENSE_DIMENSIONS) is None
    assert sketched_moment.sketch_directions(65_536) == sketched_moment.MAX_DIRECTIONS
    assert Mend.create(worlds.task(worlds.llama()), DEFAULT).directions == {}


def test_leading_eigenvectors_are_found():
    u = inputs().reshape(-1, D).double()
    moment = u.T @ u / len(u)
    test = random_test_matrix(D, 20, u.device).double()
    values, vectors = nystrom(moment @ test, test, 20)
    right = torch.linalg.eigvalsh(moment).flip(0)[:20]
    torch.testing.assert_close(values[:10], right[:10], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(20).double(), rtol=1e-6, atol=1e-6)
    projected = vectors @ (vectors.T @ moment @ vectors) @ vectors.T
    assert (projected - moment).norm() < 1e-2 * moment.norm()


def test_whitening_is_close_to_the_dense_one():
    u = inputs()
    dense, sketched = (moment.whitener(1e-2) for moment in moments(u, 40))
    assert sketched.basis.shape == (D, 40)
    assert sketched.inner.shape == (41,)
    x = u.reshape(-1, D)
    assert (sketched(x) - dense(x)).norm() < 0.02 * dense(x).norm()


def test_with_all_directions_but_one_of_a_flat_rest_it_is_the_dense_one():
    u = inputs(decay=0.5)
    dense, sketched = (moment.whitener(1e-3) for moment in moments(u, D - 1))
    x = u.reshape(-1, D)
    torch.testing.assert_close(sketched(x), dense(x), rtol=1e-3, atol=1e-3)


def test_two_halves_add_up_to_the_whole():
    u = inputs()
    _, whole = moments(u, 10)
    parts = [moments(half, 10)[1] for half in (u[:5], u[5:])]
    for total, first, second in zip(whole.totals, *(part.totals for part in parts), strict=True):
        torch.testing.assert_close(first + second, total, rtol=1e-4, atol=1e-4)


def contrast(whitener, noise=0.3, facts=200):
    """Of facts that paraphrases share in all directions, and neighbours in half of them."""
    generator = torch.Generator().manual_seed(1)
    scales, rotation = 0.8 ** torch.arange(D), torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    discriminant = Discriminant(D, rotation.device, whitener)
    for _ in range(2):  # in two parts, as batches
        shared = torch.randn(facts, 1, D, generator=generator)
        keys = shared + noise * torch.randn(facts, 3, D, generator=generator)
        near = shared * (torch.arange(D) % 2) + torch.randn(facts, 2, D, generator=generator)
        keys, near = ((rows * scales @ rotation.T).reshape(-1, D) for rows in (keys, near))
        numbers = torch.arange(facts)
        discriminant.update(keys, numbers.repeat_interleave(3), near, numbers.repeat_interleave(2))
    return discriminant, keys


def test_contrast_is_the_dense_one_of_moments_that_are_flat_outside():
    """Written out as d × d matrices, with what lies outside of the basis replaced by its mean over directions."""
    basis = torch.linalg.qr(torch.randn(D, 8, generator=torch.Generator().manual_seed(2))).Q
    gains = torch.linspace(2, 1, 9)
    wide, _ = contrast(SymmetricOperator(gains, basis))
    dense, _ = contrast(None)
    inside = basis @ basis.T
    outside = torch.eye(D) - inside
    assert wide.moments.shape == (2, 3, 9, 9)
    for moment in dense.moments.flatten(0, 1):
        moment.copy_(inside @ moment @ inside + (outside @ moment).trace() / (D - 8) * outside)
    dense.whitener = SymmetricOperator(SymmetricOperator(gains, basis)(torch.eye(D)))
    operator, expected = wide.operator(0.7, 1e-7), dense.operator(0.7, 1e-7)
    torch.testing.assert_close(
        operator(torch.eye(D)), expected.inner, rtol=1e-2, atol=1e-2 * float(expected.inner.abs().max())
    )


def test_contrast_with_all_directions_but_one_is_the_dense_one():
    _, keys = contrast(None)
    dense, sketched = (moment.whitener(1e-3) for moment in moments(keys[None], D - 1))
    operators = [contrast(whitener)[0].operator(1.0, 1e-3) for whitener in (dense, sketched)]
    answers = [operator(whitener(keys)) for operator, whitener in zip(operators, (dense, sketched), strict=True)]
    assert (answers[1] - answers[0]).norm() < 1e-2 * answers[0].norm()


def test_contrast_of_too_few_facts_leaves_wide_keys_as_they_are():
    basis = torch.linalg.qr(torch.randn(D, 30, generator=torch.Generator().manual_seed(2))).Q
    found = contrast(SymmetricOperator(torch.ones(31), basis), noise=30.0, facts=4)[0].operator(1.0, 1e-3)
    torch.testing.assert_close(found.inner, found.inner[0, 0] * torch.eye(31))
    assert found.inner[0, 0] > 0


def test_an_editor_of_a_wide_model_trains_saves_and_edits(wide, tmp_path):
    task = CausalLM(worlds.llama(), worlds.tokenizer())
    requests = worlds.requests(24)
    editor = Mend.create(task, DEFAULT)
    assert set(editor.directions.values()) == {12}
    trainer = Trainer(task, editor, requests, SETTINGS)
    trainer.calibrate()
    assert not any(tensor.shape == (40, 40) for tensor in editor.buffers()), "nothing is dense"
    held = [trainer.episodes.batch(0, 8)]
    first = trainer.validate(held)["loss"]
    for _ in range(12):
        trainer.train_step()
    assert trainer.validate(held)["loss"] < first
    editor.save(tmp_path / "editor")
    loaded = Mend.load(tmp_path / "editor")
    assert loaded.directions == editor.directions
    for name, tensor in editor.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    editor.save(tmp_path / "half", dtype=torch.float16)
    edits = [own.edit(task, requests[:1]) for own in (editor, loaded)]
    for name, change in edits[0].changes.items():
        assert torch.equal(edits[1].changes[name].u, change.u)
    edits[0].save(tmp_path / "edit")
    with Edit.load(tmp_path / "edit").applied(task.model):
        assert task.predict([requests[0].prompt])
    halved = Mend.load(tmp_path / "half").edit(task, requests[:1])
    for name, change in edits[0].changes.items():
        assert (halved.changes[name].dense() - change.dense()).norm() < 0.02 * change.dense().norm()


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.found |= {tuple(tensor.shape) for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)}
        return result


@pytest.mark.parametrize("directions", [12, None])
def test_no_matrix_of_the_inputs_squared_is_ever_made(directions, wide, monkeypatch):
    d = 53  # which nothing else is
    monkeypatch.setattr(sketched_moment, "MAX_DENSE_DIMENSIONS", 20 if directions else d)
    model = worlds.llama(intermediate_size=d)
    task = CausalLM(model, worlds.tokenizer())
    with Shapes() as shapes:
        editor = Mend.create(worlds.task(model), DEFAULT)
        trainer = Trainer(task, editor, worlds.requests(24), SETTINGS)
        trainer.calibrate()
        trainer.train_step()
        editor.edit(wrap(model, task.tokenizer), worlds.requests(2))
    assert any(shape[-1:] == (d,) for shape in shapes.found)
    assert any(shape[-2:] == (d, d) for shape in shapes.found) == (directions is None)


def test_a_resumed_run_ends_with_the_same_bits(wide, tmp_path):
    def run(out, stop=None, resume=False):
        def interrupt(progress):
            if progress.step == stop:
                raise KeyboardInterrupt

        config = replace(SETTINGS, max_steps=6, validate_every=3, validation_size=8, decay=True)
        editor = Mend.create(worlds.task(worlds.llama()), DEFAULT, seed=0)
        more = {"config": config, "editor": editor, "out": out, "on_progress": interrupt, "checkpoint_minutes": 0.0}
        return train(wrap(worlds.llama(), worlds.tokenizer()), worlds.requests(30), resume=resume, **more)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halted", stop=4)
    assert (tmp_path / "halted.checkpoints").exists()
    resumed = run(tmp_path / "halted", resume=True)
    assert "basis_0" in whole.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_saved_editor_keeps_its_directions_whatever_the_constants_are(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sketched_moment, "MAX_DENSE_DIMENSIONS", 20)
        patch.setattr(sketched_moment, "MAX_DIRECTIONS", 12)
        Mend.create(worlds.task(worlds.llama()), DEFAULT).save(tmp_path / "editor")
    assert set(Mend.load(tmp_path / "editor").directions.values()) == {12}


def test_the_estimate_follows_the_form(wide):
    narrow = moments_bytes(Mend.create(worlds.task(worlds.llama()), DEFAULT))
    sketched_moment.MAX_DIRECTIONS = 4
    assert moments_bytes(Mend.create(worlds.task(worlds.llama()), DEFAULT)) < narrow
