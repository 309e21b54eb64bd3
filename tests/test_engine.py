"""The training engine: that what makes it fast changes nothing, and that nothing is lost when it stops."""

import json
import signal
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import forked
import worlds
from remend.cli import run
from remend.config import from_json
from remend.core import cpu_matmul
from remend.core.editor_gradients import FactoredGradients
from remend.core.editor_network import EditorNetwork, LowRankResidual
from remend.core.losses import locality_loss, target_loss
from remend.core.low_rank_hooks import frozen
from remend.editors import Mend, MendConfig
from remend.editors.lookup_edit import LOOKUP_EDIT_FORMAT
from remend.errors import ConfigError, FileError, ModelError, TrainingError
from remend.fingerprint import hash_model
from remend.models.frozen_prefix import FrozenPrefix, run_until
from remend.saved_folders import write_folder
from remend.tasks import wrap
from remend.tasks.causal_lm import CausalLM
from remend.tasks.separators import Separators
from remend.training import Resources, Trainer, TrainingConfig, memory_estimate, train
from remend.training.preflight import TEST_REQUESTS, examine
from remend.training.tensor_store import STORE_FORMAT, TensorStore

SETTINGS = TrainingConfig(
    batch_size=6, learning_rate=3e-3, alpha_learning_rate=3e-3, max_steps=12, validate_every=4, validation_size=8
)
NETWORK = MendConfig(rank=8, alpha=3e-2, ridge=1e-3, relative=True)


def trainer(model, resources=None, config=SETTINGS, requests=20):
    editor = Mend.create(worlds.task(model), NETWORK)
    return Trainer(CausalLM(model, worlds.tokenizer()), editor, worlds.requests(requests), config, resources)


def after(steps, made):
    """The editor's parameters and the losses after some steps."""
    made.calibrate()
    losses = [made.train_step() for _ in range(steps)]
    return losses, dict(made.editor.named_parameters())


def assert_same_way(start, first, second, share=1e-3):
    """Two trainings ended at the same place, beside the way that they went."""
    for name, value in first.items():
        gone = (value - start[name]).norm()
        assert gone > 0, f"{name} did not move"
        assert (value - second[name]).norm() <= share * gone, name


# -- the editor network and its gradients ----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=3), bias=st.booleans(), seed=st.integers(0, 100))
def test_a_layer_of_the_editor_is_eq_3_and_its_gradients_are_autograds(counts, bias, seed):
    torch.manual_seed(seed)
    layer = LowRankResidual(7, 3, len(counts), bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    z = torch.randn(sum(counts), 7, requires_grad=True)
    matrix = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    inner = z @ layer.down.T @ layer.up.T + (layer.bias if bias else 0)
    expected = z + functional.relu(layer.scale[matrix] * inner + layer.offset[matrix])
    weight = torch.randn_like(expected)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    plain = torch.autograd.grad((expected * weight).sum(), (z, *parameters), allow_unused=True)
    for factored_gradients in (None, FactoredGradients()):
        layer.zero_grad()
        z.grad = None
        found = layer(z, counts, factored_gradients)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        (found * weight).sum().backward()
        torch.testing.assert_close(z.grad, plain[0], rtol=1e-4, atol=1e-4)
        kept = (
            {}
            if factored_gradients is None
            else {weight: gradient.clone() for weight, gradient in factored_gradients.gradients()}
        )
        for name, parameter, right in zip(names, parameters, plain[1:], strict=True):
            assert (parameter.grad is None) == (parameter in kept), f"{name}: a dense gradient beside the factors"
            torch.testing.assert_close(kept.get(parameter, parameter.grad), right, rtol=1e-4, atol=1e-4)
        if factored_gradients is not None:
            norms = torch.stack([kept[parameter].norm() for parameter in factored_gradients.weights()])
            assert bool((factored_gradients.norm_bounds() >= norms * (1 - 1e-5)).all())
            torch.testing.assert_close(factored_gradients.norms(), norms, rtol=1e-4, atol=1e-4)


def test_factored_gradients_add_up_parts_and_multiply_in_bfloat16_if_told():
    weight = torch.nn.Parameter(torch.zeros(4, 5))
    parts = [(torch.randn(3, 4), torch.randn(3, 5)) for _ in range(2)]
    expected = sum(g.T @ x for g, x in parts)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        factored_gradients = FactoredGradients(dtype)
        for g, x in parts:
            factored_gradients.add(weight, g, x)
        ((_, found),) = factored_gradients.gradients()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert found.dtype == torch.float32


@pytest.mark.parametrize("rows", [2, 30])
def test_norms_of_factored_gradients_are_right_for_few_rows_and_for_many(rows):
    weight = torch.nn.Parameter(torch.zeros(9, 8))
    factored_gradients, parts = FactoredGradients(), [(torch.randn(rows, 9), torch.randn(rows, 8)) for _ in range(2)]
    for g, x in parts:
        factored_gradients.add(weight, g, x)
    torch.testing.assert_close(factored_gradients.norms(), sum(g.T @ x for g, x in parts).norm()[None])


@pytest.mark.parametrize("mkl_is_slow", [False, True])
@pytest.mark.parametrize("rows", [1, 300])
def test_products_are_right_by_either_library(monkeypatch, mkl_is_slow, rows):
    """Also where a side lies transposed, and where rows go to ``out`` in several parts."""
    if mkl_is_slow and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(cpu_matmul, "_mkl_is_slow", lambda: mkl_is_slow)
    monkeypatch.setattr(cpu_matmul, "ONEDNN_MIN_MULTIPLICATIONS", 0)
    a, b, out = torch.randn(rows, 40), torch.randn(30, 40).mT, torch.empty(rows, 30)
    expected = (a.double() @ b.double()).float()
    for found in (
        cpu_matmul.matmul(a, b),
        cpu_matmul.matmul(a.mT.contiguous().mT, b),
        cpu_matmul.matmul(a, b, out=out),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_network_is_the_same_by_either_library_whatever_the_number_of_rows(monkeypatch):
    """One of them multiplies some rows of zeros too; no gradient knows of them."""
    torch.manual_seed(0)
    network = EditorNetwork(20, 24, 2, 8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    u, delta = ([torch.randn(rows, d) for rows in (30, 47)] for d in (20, 24))
    found = []
    monkeypatch.setattr(cpu_matmul, "ONEDNN_MIN_MULTIPLICATIONS", 0)
    for mkl_is_slow in (False, True) if torch.backends.mkldnn.is_available() else (False, False):
        monkeypatch.setattr(cpu_matmul, "_mkl_is_slow", lambda mkl_is_slow=mkl_is_slow: mkl_is_slow)
        network.zero_grad()
        factored_gradients = FactoredGradients()
        outputs = [part for both in network(u, delta, factored_gradients) for part in both]
        sum((part**2).sum() for part in outputs).backward()
        dense = [gradient.clone() for _, gradient in factored_gradients.gradients()]
        small = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
        found.append([*outputs, *dense, *small, factored_gradients.norms()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_row_counts_are_padded_to_few_sizes():
    """oneDNN keeps a program for each."""
    sizes = {cpu_matmul.padded_row_count(rows, torch.device("cpu")) for rows in range(1, 4097)}
    assert len(sizes) <= 80 or not cpu_matmul._mkl_is_slow()
    assert all(
        0 <= cpu_matmul.padded_row_count(rows, torch.device("cpu")) - rows <= rows / 7 for rows in range(1, 4097)
    )


def test_the_losses_gradients_are_autograds():
    torch.manual_seed(0)
    logits, base = torch.randn(5, 11, requires_grad=True), torch.randn(5, 11)
    target, row = torch.randint(11, (5,)), torch.tensor([0, 0, 1, 1, 1])
    weight = torch.tensor([0.3, 0.7])
    nll = functional.cross_entropy(logits, target, reduction="none")
    kl = functional.kl_div(logits.log_softmax(-1), base.softmax(-1), reduction="none").sum(-1)
    for found, slow in ((target_loss(logits, target, row, 2), nll), (locality_loss(base, logits, row, 2), kl)):
        expected = torch.stack([slow[:2].mean(), slow[2:].mean()])
        torch.testing.assert_close(found, expected)
        (right,) = torch.autograd.grad((expected * weight).sum(), logits, retain_graph=True)
        (actual,) = torch.autograd.grad((found * weight).sum(), logits, retain_graph=True)
        torch.testing.assert_close(actual, right)


# -- the frozen prefix -----------------------------------------------------------------------------------------------


def cut(task, blocks=2):
    """A prefix of a model of four blocks whose last two are edited, and a padded batch."""
    names = [name for name in Mend.create(task).shapes if f".{4 - blocks}." in name or ".3." in name]
    pairs = [task.encode(r.prompt, r.target) for r in worlds.requests(3)] + [task.encode("Rome is the", "x")]
    return FrozenPrefix(task.model, names), task.collate(pairs)


def test_entering_at_the_lowest_edited_block_equals_the_whole_pass(task, snapshot):
    prefix, batch = cut(task)
    assert prefix.depth == 2
    runs = []
    handle = prefix.blocks[0].register_forward_hook(lambda *_: runs.append("first block"))
    whole = task.outputs(batch)
    assert len(runs) == 1
    states = prefix.compute_states(lambda: task.outputs(batch))
    calls = []
    inner = prefix.blocks[1].register_forward_hook(lambda m, a, o: calls.append(o is states))
    with prefix.resume_from(states):
        entered = task.outputs(batch)
    assert calls == [True], "the blocks below hand on what they were told"
    handle.remove(), inner.remove()
    assert torch.equal(entered, whole)
    states[:] = 0
    with prefix.resume_from(states):
        assert not torch.allclose(task.outputs(batch), whole), "the states matter"
    assert torch.equal(task.outputs(batch), whole)
    assert not any("forward" in block.__dict__ for block in prefix.blocks)
    snapshot()


@pytest.mark.parametrize("bias", [False, True])
def test_blocks_that_return_tuples_are_entered_too(bias, monkeypatch):
    """As GPT-Neo's do; and as T5's do, which hand on what only the first of them computes."""
    model, ran = worlds.gpt2(), []
    handed: list[object] = [None]
    for place, block in enumerate(model.transformer.h):

        def forward(hidden, *args, block=block, place=place, **kwargs):
            ran.append(place)
            shift = handed[0] if place else 0.1 * torch.ones(hidden.shape[-1])
            found = type(block).forward(block, hidden + shift if bias else hidden, *args, **kwargs)
            return found, shift if bias else None

        monkeypatch.setattr(block, "forward", forward, raising=False)

    def hands_on(block, args, output):
        handed[0] = output[1]
        return output

    hooks = [block.register_forward_hook(hands_on) for block in model.transformer.h]
    hooks += [
        block.register_forward_pre_hook(lambda _, args: (take(args[0]), *args[1:])) for block in model.transformer.h
    ]

    def take(value):
        return value[0] if isinstance(value, tuple) else value

    hooks.append(model.transformer.ln_f.register_forward_pre_hook(lambda _, args: (take(args[0]),)))
    task = CausalLM(model.eval(), worlds.tokenizer())
    prefix, batch = cut(task)
    whole = task.outputs(batch)
    states = prefix.compute_states(lambda: task.outputs(batch))
    assert prefix.output_parts == 2
    ran.clear()
    handed[0] = None
    with prefix.resume_from(states):
        torch.testing.assert_close(task.outputs(batch), whole)
    assert ran == ([0, 2, 3] if bias else [2, 3])
    assert prefix.verify(lambda: task.outputs(batch), lambda: task.output_states(batch), task.outputs_from_states)


def test_the_output_layer_alone_makes_the_same_logits_of_its_input(task):
    prefix, batch = cut(task)
    states = task.output_states(batch)
    with prefix.bypass_blocks():
        assert torch.equal(task.outputs_from_states(states), task.outputs(batch)) is False, (
            "hollow blocks do not compute"
        )
        found = task.outputs_from_states(states)
    torch.testing.assert_close(found, task.outputs(batch), rtol=1e-5, atol=1e-5)


def test_a_block_is_itself_again_after_an_error_too(task):
    prefix, _ = cut(task)
    own = lambda *args, **kwargs: type(prefix.blocks[0]).forward(prefix.blocks[0], *args, **kwargs)  # noqa: E731
    prefix.blocks[0].forward = own
    with pytest.raises(RuntimeError, match="stop"), prefix.resume_from(torch.zeros(1)):
        raise RuntimeError("stop")
    assert prefix.blocks[0].__dict__["forward"] is own
    assert "forward" not in prefix.blocks[1].__dict__


def test_a_model_whose_blocks_hand_on_more_is_not_cut(monkeypatch):
    """A last block that also reads what the first one put aside, in the same pass."""
    model, aside = worlds.gpt2(), {}
    first, last = model.transformer.h[0], model.transformer.h[3]
    real = type(first).forward

    def puts_aside(hidden, *args, **kwargs):
        aside["hidden"] = hidden
        return real(first, hidden, *args, **kwargs)

    def reads(hidden, *args, **kwargs):
        return real(last, hidden + aside.get("hidden", 0), *args, **kwargs)

    monkeypatch.setattr(first, "forward", puts_aside, raising=False)
    monkeypatch.setattr(last, "forward", reads, raising=False)
    model.register_forward_pre_hook(lambda *_: aside.clear())
    with pytest.warns(UserWarning, match="hands more than hidden states from block to block"):
        made = trainer(model)
    assert made.prefix.depth == 0
    losses, _ = after(3, made)
    assert all(loss > 0 for loss in losses)


def test_a_model_edited_in_its_first_block_or_without_blocks_has_no_prefix(task):
    assert FrozenPrefix(task.model, list(Mend.create(task, modules=["*.0.*"]).shapes)).depth == 0
    assert FrozenPrefix(torch.nn.Linear(2, 2), [""]).depth == 0
    with pytest.raises(ModelError, match="never calls Linear"):
        run_until(torch.nn.Linear(2, 2), lambda: None)


# -- what is kept of each example ------------------------------------------------------------------------------------


def test_a_store_keeps_what_fits_and_drops_nothing():
    store = TensorStore(budget=40)
    value = torch.arange(8.0)
    store.put("a", (value[:4], value[4:]))
    value.zero_()
    assert store["a"][1].tolist() == [4.0, 5.0, 6.0, 7.0], "a copy"
    store.put("b", (torch.zeros(8),))
    assert "a" in store
    assert "b" not in store
    store.put("c", (torch.zeros(1),))
    assert "c" not in store, "what is kept does not depend on what is small"
    assert store.used == 32
    assert store.has_all(["b"])
    assert not TensorStore(40).has_all(["b"])


def test_a_store_on_disk_is_read_again_and_repaired(tmp_path):
    store = TensorStore(0, tmp_path)
    store.put("a", (torch.arange(3.0),))
    assert torch.equal(store["a"][0], torch.arange(3.0)), "not yet written, but there"
    store.flush()
    store.put("b", (torch.ones(2),))
    store.flush()
    again = TensorStore(0, tmp_path)
    assert torch.equal(again["a"][0], torch.arange(3.0))
    assert torch.equal(again["b"][0], torch.ones(2))
    shard = sorted(tmp_path.glob("shard-*"))[0]
    content = bytearray((shard / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (shard / "tensors.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match=r"damaged part of the cache .*truncated or altered"):
        repaired = TensorStore(0, tmp_path)
    assert ("a" in repaired) != ("b" in repaired)
    assert not shard.exists()


def test_folders_of_another_format_are_not_read_into_a_store_and_not_deleted(tmp_path):
    """Such as parts that an earlier release wrote, under the format of a lookup editor's edits."""
    store = TensorStore(0, tmp_path)
    store.put("a", (torch.ones(2),))
    store.flush()
    assert STORE_FORMAT != LOOKUP_EDIT_FORMAT
    other = write_folder(tmp_path / "shard-0123456789abcdef", LOOKUP_EDIT_FORMAT, {}, {"b/0": torch.zeros(2)})
    with pytest.warns(UserWarning, match=r"1 folders in .* are no parts of this cache .*remend\.cache/1.* delete them"):
        again = TensorStore(0, tmp_path)
    assert ("a" in again, "b" in again) == (True, False)
    assert (other / "manifest.json").exists()


def test_a_model_has_a_fingerprint_of_its_own(model):
    before = hash_model(model)
    assert hash_model(model) == before
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert hash_model(model) != before


def test_what_is_kept_on_disk_serves_the_next_run_of_the_same_model_only(model, tmp_path, monkeypatch):
    first = trainer(model, Resources(cache=0.0, cache_folder=tmp_path))
    losses, _ = after(6, first)
    first.activation_cache.flush()
    ran = []
    monkeypatch.setattr(
        FrozenPrefix,
        "compute_states",
        lambda self, forward: ran.append(1) or run_until(self.blocks[self.depth], forward),
    )
    again, _ = after(6, trainer(model, Resources(cache=0.0, cache_folder=tmp_path)))
    assert sum(ran) <= 1, "only the check that the model can be cut runs the blocks below"
    assert again == pytest.approx(losses, rel=1e-3)
    ran.clear()
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    other = trainer(model, Resources(cache=0.0, cache_folder=tmp_path))
    after(1, other)
    other.activation_cache.flush()
    assert sum(ran) > 1, "states of another model are not used"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "resources",
    [
        Resources(cache=0.0),
        Resources(micro_batch=1),
        Resources(micro_batch=4, cache=2e-5),
        Resources(recompute=True),
        Resources(memory=64.0),
    ],
    ids=["no cache", "one by one", "little cache", "recomputed", "memory"],
)
def test_how_the_machine_is_used_does_not_change_what_is_learnt(model, snapshot, resources):
    start = {name: value.clone() for name, value in Mend.create(worlds.task(model), NETWORK).named_parameters()}
    expected_losses, expected = after(8, trainer(model))
    losses, found = after(8, trainer(model, resources))
    assert losses == pytest.approx(expected_losses, rel=2e-3)
    assert_same_way(start, expected, found, share=2e-2)
    snapshot()


def test_cached_activations_are_computed_once_and_in_the_same_bits(model):
    made = trainer(model)
    pairs = made.episodes.batch(0, 6).edits
    first = made.activation_cache.packed_factors(pairs)
    states = made.activation_cache.prefix_states(pairs)
    used = made.activation_cache.states.used, made.activation_cache.factors.used
    shuffled = pairs[::-1]
    again = made.activation_cache.packed_factors(shuffled)
    assert (made.activation_cache.states.used, made.activation_cache.factors.used) == used
    for name, rows in first.items():
        assert again[name].counts == rows.counts[::-1]
        back = torch.cat(again[name].u.split(again[name].counts)[::-1])
        assert torch.equal(back, rows.u)
        whole = made.editor.pack(made.editor.capture(made.task, made.task.collate(pairs)))[name]
        torch.testing.assert_close(rows.u, whole.u, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows.delta, whole.delta, rtol=1e-3, atol=1e-6)
    assert torch.equal(made.activation_cache.prefix_states(shuffled), states.flip(0))
    batch = made.task.collate(pairs)
    with frozen(model), torch.no_grad():
        base = made.task.outputs(batch)
    torch.testing.assert_close(made.activation_cache.base_outputs(pairs, states), base, rtol=1e-4, atol=1e-4)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_gpu_that_runs_out_of_memory_goes_on_in_smaller_parts(model, monkeypatch):
    real = Trainer.edited_losses
    start = {name: value.clone() for name, value in Mend.create(worlds.task(model), NETWORK).named_parameters()}
    expected_losses, expected = after(4, trainer(model, Resources(micro_batch=6)))

    def small(self, batch, changes, backward=False):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, changes, backward)

    monkeypatch.setattr(Trainer, "edited_losses", small)
    made = trainer(model, Resources(micro_batch=6))
    with pytest.warns(UserWarning, match=r"going on with [23] episodes at a time"):
        losses, found = after(4, made)
    assert made.micro_batch == 2
    assert losses == pytest.approx(expected_losses, rel=1e-3)
    assert_same_way(start, expected, found, share=2e-2)
    monkeypatch.setattr(Trainer, "edited_losses", lambda *args, **kwargs: small(None, [1, 2, 3], {}))
    with (
        pytest.raises(ModelError, match="one episode alone does not fit"),
        pytest.warns(UserWarning, match="1 episodes"),
    ):
        made.train_step()


def test_micro_batches_fit_the_memory_that_is_given(model):
    needed = trainer(model, Resources(micro_batch=1)).estimate_memory().total
    with pytest.raises(
        ConfigError, match=r"training takes about \d.* GB with one episode at a time \(process .*bfloat16"
    ):
        trainer(model, Resources(memory=needed / 2e9))
    assert trainer(model, Resources(memory=1.5 * needed / 1e9)).micro_batch == SETTINGS.batch_size
    parts = trainer(model, Resources(micro_batch=2)).estimate_memory().parts()
    more = trainer(model, Resources(micro_batch=4)).estimate_memory().parts()
    assert more["model_pass"] == pytest.approx(2 * parts["model_pass"], rel=0.01)
    assert parts["model"] >= sum(p.numel() * 4 for p in model.parameters())


def test_a_cache_that_is_too_large_for_the_memory_is_what_is_named(model, monkeypatch):
    monkeypatch.setattr(
        memory_estimate, "resident_bytes", lambda: 100_000_000
    )  # what the process takes is another at any moment
    made = trainer(model, Resources(cache=0.001))
    activation_cache = made.estimate_memory().activation_cache
    assert activation_cache > 100_000
    allowed = (made._memory_estimator().measure().estimate(1).total - activation_cache // 2) / 1e9
    with pytest.raises(ConfigError, match=r"give a smaller cache of the examples, of 0\.\d+ GB \(--cache\)"):
        trainer(model, Resources(cache=0.001, memory=allowed))


def test_no_gradient_of_a_matrix_outlives_the_step(model):
    made = trainer(model)
    after(2, made)
    assert all(parameter.grad is None for parameter in made.editor.parameters())
    assert made.optimizer.factored_gradients.weights() == []


@pytest.mark.parametrize("clip", [100.0, 1e-3, 0.3])
def test_the_gradient_is_clipped_by_its_norm(model, clip):
    made = trainer(model, config=replace(SETTINGS, gradient_clip=clip))
    made.calibrate()
    made.train_step()
    made._backward(made._process_batch(1))
    dense = [gradient.clone() for _, gradient in made.optimizer.factored_gradients.gradients()]
    small = [parameter.grad for parameter in made.optimizer.names if parameter.grad is not None]
    norm = float(torch.stack([gradient.norm() for gradient in (*dense, *small)]).norm())
    found = made.optimizer.clip_factor(made.optimizer.gather(torch.zeros(())))
    assert found == pytest.approx(min(1.0, clip / norm), rel=2e-4)


# -- stopping and going on -------------------------------------------------------------------------------------------


def run_to(out, stop=None, resume=False, model=None, budget_seconds=None, **changes):
    """A run that is interrupted after some step, or not at all."""

    def interrupt(progress):
        if progress.step == stop:
            raise KeyboardInterrupt

    model = model or worlds.gpt2()
    config = replace(SETTINGS, **changes)
    editor = Mend.create(worlds.task(model), NETWORK, seed=config.seed)
    return train(
        wrap(model, worlds.tokenizer()), worlds.requests(40), config=config, editor=editor, out=out,
        resume=resume, checkpoint_minutes=0.0, on_progress=interrupt, budget_seconds=budget_seconds,
    )  # fmt: skip


def history(editor):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in editor.trained["history"]]


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_an_interrupted_run_ends_as_if_it_had_never_stopped(stop, tmp_path):
    expected = run_to(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_to(tmp_path / "editor", stop=stop)
    assert (tmp_path / "editor.checkpoints").is_dir()
    found = run_to(tmp_path / "editor", resume=True)
    assert not (tmp_path / "editor.checkpoints").exists()
    for (name, value), (_, other) in zip(expected.state_dict().items(), found.state_dict().items(), strict=True):
        assert torch.equal(value, other), name
    assert history(found) == history(expected)
    assert found.trained["seconds"] >= 0
    again = run_to(tmp_path / "editor", resume=True)  # finished already
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), found.parameters(), strict=True))


def test_a_resumed_run_whose_time_is_over_measures_what_it_has(tmp_path):
    """Its last steps were never validated; and getting ready again does not count."""
    with pytest.raises(KeyboardInterrupt):
        run_to(tmp_path / "editor", stop=6)
    found = run_to(tmp_path / "editor", resume=True, budget_seconds=1e-3)
    assert [entry["step"] for entry in found.trained["history"]] == [0, 4, 5]  # the last checkpoint's step


def test_a_signal_saves_and_ends_the_run(tmp_path):
    def stop(progress):
        if progress.step == 3:
            signal.raise_signal(signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    editor = Mend.create(worlds.task(worlds.gpt2()), NETWORK)
    with pytest.raises(KeyboardInterrupt):
        train(
            wrap(worlds.gpt2(), worlds.tokenizer()), worlds.requests(40), config=SETTINGS, editor=editor,
            out=tmp_path / "editor", on_progress=stop,
        )  # fmt: skip
    assert [path.name for path in (tmp_path / "editor.checkpoints").iterdir()] == ["step-00000003"]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_checkpoint_is_of_one_run_only(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_to(tmp_path / "editor", stop=5)
    with pytest.raises(TrainingError, match=r"another run: learning_rate: 0\.003 then, 0\.0001 now\. A run"):
        run_to(tmp_path / "editor", resume=True, learning_rate=1e-4)
    with pytest.raises(
        TrainingError, match=r"alpha: 0\.03 then, 0\.0001 now; .*; edited matrices: .*; the base model was another"
    ):
        train(
            wrap(worlds.llama(), worlds.tokenizer()), worlds.requests(40), config=SETTINGS, out=tmp_path / "editor",
            resume=True, editor=Mend.create(worlds.task(worlds.llama()), MendConfig(rank=8)),
        )  # fmt: skip
    with pytest.raises(FileError, match="already; go on with it"):
        run_to(tmp_path / "editor")
    with pytest.raises(TrainingError, match="give out, the folder of the interrupted run"):
        run_to(None, resume=True)


def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path):
    expected = run_to(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_to(tmp_path / "editor", stop=5)
    (checkpoint,) = (tmp_path / "editor.checkpoints").iterdir()
    (checkpoint / "tensors.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="a damaged checkpoint is passed over"):
        found = run_to(tmp_path / "editor", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def test_resuming_a_run_without_a_checkpoint_begins_anew_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="no checkpoint was written"):
        assert run_to(tmp_path / "editor", resume=True).trained["steps"] == 12


KILLED_STEP = 14


def test_a_training_killed_during_a_step_is_resumed_from_the_command_line_as_if_it_had_never_stopped(tmp_path):
    """The whole way, with a real kill: what the last checkpoint holds is all that is needed."""
    model = worlds.gpt2()
    model.save_pretrained(tmp_path / "model")
    worlds.tokenizer().save_pretrained(tmp_path / "model")
    from remend.request import write_requests

    write_requests(tmp_path / "train.jsonl", worlds.requests(40))
    options = ["train", str(tmp_path / "model"), "--data", str(tmp_path / "train.jsonl"), "--device", "cpu"]
    options += ["--max-steps", "50", "--checkpoint-minutes", "0", "--cache", "0.001", "--out"]
    whole = forked.remend([*options, tmp_path / "whole"])
    assert whole.returncode == 0, whole.stderr
    killed = forked.remend([*options, tmp_path / "editor"], partial(forked.kill_after_step, KILLED_STEP))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoints = [path.name for path in (tmp_path / "editor.checkpoints").glob("step-*")]
    assert checkpoints == [f"step-{KILLED_STEP - 1:08d}"]
    resumed = forked.remend([*options, tmp_path / "editor", "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    first, second = (Mend.load(tmp_path / name) for name in ("whole", "editor"))
    for (name, value), (_, other) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(value, other), name
    assert history(first) == history(second)
    assert not list(tmp_path.glob(".editor*")), "nothing is left under a temporary name"


# -- precision, doctor -----------------------------------------------------------------------------------------------


def test_bfloat16_products_train_a_float32_editor(model):
    made = trainer(model, Resources(precision="bfloat16"))
    made.task.autocast = Resources(precision="bfloat16").autocast
    losses, parameters = after(8, made)
    exact, _ = after(8, trainer(model))
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    assert losses == pytest.approx(exact, rel=0.2)
    assert losses != exact


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "float16"}, "precision must be one of float32, tf32, bfloat16, not 'float16'"),
        ({"micro_batch": 0}, "micro_batch must be a whole number of at least 1 or None, not 0"),
        ({"memory": -1.0}, "memory must be a finite number above 0 or None, not -1.0"),
        ({"cache": float("nan")}, "cache must be a finite number of at least 0, not nan"),
    ],
)
def test_resources_out_of_range_are_refused_by_name(wrong, message):
    with pytest.raises(ConfigError, match=message):
        from_json(Resources, {"version": 1, **wrong})


def test_the_doctor_finds_a_healthy_model_healthy_and_leaves_it_alone(model, snapshot):
    found = examine(wrap(model, worlds.tokenizer()), worlds.requests(20), (NETWORK, SETTINGS))
    snapshot()
    assert found.healthy
    assert [check.passed for check in found.checks] == [True] * 6
    assert list(found.matrices) == list(Mend.create(worlds.task(model)).shapes)
    assert found.reason == "the MLPs of the last 3 of 4 blocks"
    assert found.training_seconds > 0
    assert found.memory.total > 0


def test_the_doctor_asks_the_model_only_about_the_requests_that_it_tries(model, monkeypatch):
    asked = []
    choose = Separators.choose
    monkeypatch.setattr(Separators, "choose", lambda self, prompts: (asked.extend(prompts), choose(self, prompts))[1])
    task = wrap(model, worlds.tokenizer())
    found = examine(task, worlds.requests(20), (NETWORK, SETTINGS))
    tried = worlds.requests(TEST_REQUESTS)
    prompts = {p for r in tried for p in (r.prompt, *r.paraphrases, *(q.prompt for q in (*r.locality, *r.near)))}
    assert set(asked) == {task.encode_input(prompt) for prompt in prompts}
    counted = Trainer(task, Mend.create(task, NETWORK), worlds.requests(20), SETTINGS).estimate_memory()
    assert found.memory.activation_cache == counted.activation_cache


def test_the_doctor_names_what_is_wrong(model, monkeypatch):
    monkeypatch.setattr(
        FactoredGradients, "add", lambda self, weight, g, x: None
    )  # what the matrices should learn is lost
    found = examine(wrap(model, worlds.tokenizer()), worlds.requests(20), (NETWORK, SETTINGS))
    assert not found.healthy
    assert "no gradient reaches networks" in found.checks[-1].found


def test_the_doctor_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    model = worlds.llama()
    model.save_pretrained(tmp_path / "model")
    worlds.tokenizer().save_pretrained(tmp_path / "model")
    from remend.request import write_requests

    write_requests(tmp_path / "few.jsonl", worlds.requests(14))
    arguments = ["doctor", str(tmp_path / "model"), "--data", str(tmp_path / "few.jsonl"), "--device", "cpu"]
    assert run([*arguments, "--json", str(tmp_path / "found.json")]) == 0
    text = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in text
    assert "memory, at most" in text
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["memory_bytes"]["total"] > found["memory_bytes"]["model"] > 0
    assert all(check["passed"] for check in found["checks"])
    assert Path(tmp_path / "model" / "config.json").exists()
    with warnings.catch_warnings():
        assert run([*arguments, "--modules", "nothing.*"]) == 1
