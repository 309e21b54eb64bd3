"""The paper's ablations as settings (section 5.4, tables 6 and 9): each trains, stops, goes on, and is kept.

That each computes what the paper says is in ``test_reference.py``.
"""

import json
from dataclasses import replace

import pytest
import torch

import worlds
from remend.config import from_json, to_json
from remend.core.editor_gradients import FactoredGradients
from remend.core.editor_network import EditorNetwork
from remend.editors import Mend, MendConfig
from remend.errors import ConfigError, TrainingError
from remend.tasks import wrap
from remend.tasks.causal_lm import CausalLM
from remend.training import PRESETS, Trainer, TrainingConfig, checkpoint, train

ABLATIONS = {
    "no sharing": {"share": False},
    "no norm": {"normalise": False},
    "no identity": {"identity": False},
    "only u": {"transforms": "u"},
    "only delta": {"transforms": "delta"},
    "only the smaller": {"transforms": "smaller"},
    "all at once": {"share": False, "normalise": False, "identity": False, "transforms": "delta"},
}
NETWORKS = {
    "paper": MendConfig(rank=8, alpha=3e-2),
    "default": replace(PRESETS["default"][0], rank=8),
    "default, both MLP matrices": replace(PRESETS["default"][0], rank=8, outputs_only=False),
}
SETTINGS = TrainingConfig(
    batch_size=6, learning_rate=3e-3, alpha_learning_rate=3e-3, max_steps=8, validate_every=4, validation_size=8,
    near=0.5,
)  # fmt: skip


@pytest.fixture(params=ABLATIONS.values(), ids=ABLATIONS)
def ablation(request):
    """The settings of each."""
    return request.param


def made(network, model=None, modules=()):
    """An untrained editor and its trainer."""
    model = model or worlds.gpt2()
    editor = Mend.create(worlds.task(model), network, modules=modules)
    return editor, Trainer(CausalLM(model, worlds.tokenizer()), editor, worlds.requests(20), SETTINGS)


def fed(network):
    """A network of two matrices that has seen rows, and some rows for it."""
    torch.manual_seed(0)
    for matrix in range(2):
        network.u_statistics.update(torch.randn(20, network.d_in) * 3 + matrix, matrix)
        network.delta_statistics.update(torch.randn(20, network.d_out) * 1e-3, matrix)
    return [torch.randn(rows, network.d_in) for rows in (3, 2)], [torch.randn(rows, network.d_out) for rows in (3, 2)]


# -- the network -----------------------------------------------------------------------------------------------------


def test_what_a_network_does_not_read_it_gives_back_as_it_came():
    for reads, width in (("u", 5), ("delta", 3)):
        network = EditorNetwork(5, 3, 2, rank=20, transforms=reads)
        u, delta = fed(network)
        assert network.width == width
        assert network.first.down.shape == network.second.down.shape == (width, width), "the rank is at most the width"
        for matrix, (new_u, new_delta) in enumerate(network(u, delta)):
            assert torch.equal(new_u, u[matrix]) == (reads == "delta")
            assert torch.equal(new_delta, delta[matrix]) == (reads == "u")
            torch.testing.assert_close(network.denormalize_u(new_u, matrix), u[matrix])


def test_without_normalising_an_untrained_network_changes_nothing():
    network = EditorNetwork(5, 3, 2, rank=4, normalize_inputs=False)
    u, delta = fed(network)
    for matrix, (new_u, new_delta) in enumerate(network(u, delta)):
        assert torch.equal(new_u, u[matrix])
        assert torch.equal(new_delta, delta[matrix])
        assert torch.equal(network.denormalize_u(new_u, matrix), u[matrix])


def test_without_identity_both_factors_start_xavier_uniform():
    torch.manual_seed(0)
    plain = EditorNetwork(40, 24, 2, rank=16)
    torch.manual_seed(0)
    network = EditorNetwork(40, 24, 2, rank=16, identity=False)
    assert not plain.first.up.any()
    assert torch.equal(plain.first.down, network.first.down)
    bound = (6 / (64 + 16)) ** 0.5
    for layer in (network.first, network.second):
        for weight in (layer.up, layer.down):
            assert 0.95 * bound < float(weight.detach().abs().max()) <= bound
            assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("reads", ["u", "delta"])
def test_factored_gradients_of_a_narrower_network_equal_autograds(reads):
    network = EditorNetwork(5, 3, 2, rank=4, transforms=reads, identity=False)
    u, delta = fed(network)
    found = []
    for factored_gradients in (None, FactoredGradients()):
        network.zero_grad()
        sum(part.square().sum() for both in network(u, delta, factored_gradients) for part in both).backward()
        kept = (
            {}
            if factored_gradients is None
            else {weight: gradient.clone() for weight, gradient in factored_gradients.gradients()}
        )
        found.append([kept.get(p, p.grad) for p in network.parameters()])
    for dense, factored in zip(*found, strict=True):
        torch.testing.assert_close(factored, dense)


# -- the editor ------------------------------------------------------------------------------------------------------


def test_networks_are_as_many_and_as_wide_as_the_settings_say():
    editors = {name: made(replace(NETWORKS["paper"], **own))[0] for name, own in ABLATIONS.items()}
    widths = {name: [editor.network(key).width for key in editor.groups] for name, editor in editors.items()}
    assert widths["no sharing"] == [80] * 6
    assert widths["no norm"] == widths["no identity"] == [80, 80]
    assert widths["only u"] == [16, 64]
    assert widths["only delta"] == [64, 16]
    assert widths["only the smaller"] == [16, 16]
    square = Mend.create(
        worlds.task(worlds.gpt2()), MendConfig(rank=4, transforms="smaller"), modules=["*.3.attn.c_proj"]
    )
    assert square.network("16x16").transforms == "u", "of two as wide, u"
    assert editors["no sharing"].groups["transformer/h/3/mlp/c_fc"] == ["transformer.h.3.mlp.c_fc"]


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_every_tensor_learns_and_edits_survive_saving(network, ablation, tmp_path):
    editor, trainer = made(replace(network, **ablation))
    trainer.calibrate()
    start = {name: value.clone() for name, value in editor.named_parameters()}
    assert all(trainer.train_step() > 0 for _ in range(4))  # asserts that gradients flow, at the second step
    assert not [name for name, value in editor.named_parameters() if torch.equal(value, start[name])]
    requests, (model, tokenizer) = worlds.requests(3), (trainer.task.model, trainer.task.tokenizer)
    expected = editor.edit_each(wrap(model, tokenizer), requests)
    assert all(edit.changes[name].delta.any() for edit in expected for name in editor.shapes)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float16, 3e-2)):
        path = editor.save(tmp_path / str(dtype), dtype)
        again = Mend.load(path)
        assert again.config == editor.config
        assert again.fitted
        for edit, other in zip(expected, again.edit_each(wrap(model, tokenizer), requests), strict=True):
            for name, change in edit.changes.items():
                found, right = other.changes[name].dense(), change.dense()
                assert (found - right).norm() <= tolerance * right.norm(), name


@torch.no_grad()
def test_units_and_contrast_hold_whatever_is_transformed(ablation):
    """A step of 1 changes the output by about its size; a token answers to its own edit with 1."""
    editor, trainer = made(replace(NETWORKS["default"], **ablation))
    trainer.calibrate()
    rows = trainer.activation_cache.packed_factors(trainer.episodes.batch(0, 6).edits)
    modules = dict(trainer.task.model.named_modules())
    for place, (name, (aimed, delta)) in enumerate(editor.transform(rows).items()):
        answers = (aimed * rows[name].u).sum(1)
        assert answers.max() < 1.001
        assert ((answers - 1).abs() < 1e-3).sum() >= len(answers) / 4
        step = float(editor.unit[place] * answers.abs().mean() * delta.square().mean().sqrt())
        factors = trainer.activation_cache.gradient_factors(trainer.episodes.batch(0, 6).edits)[name]
        output = float(modules[name](factors.u[factors.active]).square().mean().sqrt())
        assert 0.3 < step / output < 3


def test_an_interrupted_run_ends_as_if_it_had_never_stopped(ablation, tmp_path):
    def run(name, stop=None, resume=False):
        def interrupt(progress):
            if progress.step == stop:
                raise KeyboardInterrupt

        model = worlds.gpt2()
        return train(
            wrap(model, worlds.tokenizer()), worlds.requests(30), config=SETTINGS, out=tmp_path / name, resume=resume,
            editor=Mend.create(worlds.task(model), replace(NETWORKS["default"], **ablation)), checkpoint_minutes=0.0,
            on_progress=interrupt,
        )  # fmt: skip

    expected = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("editor", stop=3)
    found = run("editor", resume=True)
    for (name, value), (_, other) in zip(expected.state_dict().items(), found.state_dict().items(), strict=True):
        assert torch.equal(value, other), name


def test_a_narrower_network_is_estimated_to_take_less():
    parts = {}
    for transforms in ("both", "u", "smaller"):
        network = MendConfig(rank=8, transforms=transforms)
        parts[transforms] = made(network)[1].estimate_memory().parts()
    for part in ("editor_pass", "optimizer", "editor"):
        assert parts["both"][part] > parts["u"][part] > parts["smaller"][part], part
    assert parts["both"]["activation_cache"] == parts["smaller"]["activation_cache"], (
        "both factors are kept whatever is read"
    )


@pytest.mark.parametrize(
    ("family", "glob", "shapes"),
    [
        ("gpt2", "*attn.c_proj", {(16, 16)}),
        ("gpt2", "*attn.c_attn", {(16, 48)}),
        ("llama", "*self_attn.?_proj", {(16, 16), (16, 8)}),
    ],
)
def test_attention_can_be_edited_instead(family, glob, shapes, ablation):
    model = worlds.FAMILIES[family]()
    editor, trainer = made(replace(NETWORKS["paper"], **ablation), model, [glob])
    assert set(editor.shapes.values()) == shapes
    trainer.calibrate()
    assert all(trainer.train_step() > 0 for _ in range(2))
    task = trainer.task
    asked = task.collate([task.encode(r.prompt, r.target) for r in worlds.requests(1)])
    before = task.outputs(asked).detach()
    edit = editor.edit(wrap(model, task.tokenizer), worlds.requests(1))
    with torch.no_grad():
        with edit.applied(model):
            applied = task.outputs(asked)
        handle = edit.merge(model)
        torch.testing.assert_close(task.outputs(asked), applied, rtol=1e-3, atol=1e-3)
        handle.revert()
    assert (applied - before).abs().max() > 0
    assert torch.equal(task.outputs(asked).detach(), before)


# -- settings that were kept, and wrong ones -------------------------------------------------------------------------


def test_settings_that_an_earlier_release_wrote_are_the_papers():
    written = to_json(MendConfig(rank=8))
    for name in ("share", "normalise", "identity", "transforms"):
        del written[name]
    assert from_json(MendConfig, written) == MendConfig(rank=8)
    with pytest.raises(ConfigError, match="no setting 'shared'; did you mean 'share'"):
        from_json(MendConfig, {**written, "shared": False})
    with pytest.raises(ConfigError, match=r"MendConfig\.share must be true or false, not 1"):
        from_json(MendConfig, {**written, "share": 1})


def test_a_checkpoint_of_an_earlier_release_goes_on(tmp_path):
    _, trainer = made(NETWORKS["paper"])
    identity = json.loads(json.dumps(checkpoint.run_identity(trainer)))
    for name in ("share", "normalise", "identity", "transforms"):
        del identity["editor settings"][name]
    checkpoint.check_identity(trainer, identity, tmp_path)
    _, other = made(replace(NETWORKS["paper"], share=False))
    with pytest.raises(TrainingError, match="share: True then, False now"):
        checkpoint.check_identity(other, identity, tmp_path)


def test_an_unknown_value_of_transforms_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="transforms must be one of both, u, delta, smaller, not 'v'"):
        from_json(MendConfig, {"version": 1, "transforms": "v"})


def test_a_trained_editors_configuration_changes_only_where_no_network_depends_on_it(task, editor):
    with pytest.raises(ConfigError, match="configuration of a mend editor is fixed"):
        editor.config = MendConfig(rank=4)
    with pytest.raises(ConfigError, match="rank cannot change, since the networks were built or trained with it"):
        editor.with_settings(rank=4)
    with pytest.raises(ConfigError, match="a gate needs keys that respond to their own edit with 1"):
        editor.with_settings(gate=0.2)
    summed = editor.with_settings(settle=2.0, aggregate="least-squares")
    assert (summed.config.settle, summed.config.rank) == (2.0, editor.config.rank)
    assert editor.config.settle == 0.0
    assert all(a is b for a, b in zip(summed.parameters(), editor.parameters(), strict=True))
    requests = worlds.requests(1)
    first, second = (e.edit(task, requests).changes for e in (editor, summed))
    assert any(not torch.equal(first[name].delta, second[name].delta) for name in first), "settle scales the edit"
