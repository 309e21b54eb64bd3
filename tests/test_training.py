"""Training runs: that they learn, stop when they cannot, keep the best, and never mix up splits."""

import itertools
import json
import math
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import worlds
from remend.config import from_json, to_json
from remend.core.whitening import SecondMoment
from remend.editors import Mend, MendConfig
from remend.errors import ConfigError, FileError, NonFiniteError, RequestError, TrainingError, WrongBaseError
from remend.request import EditRequest, Probe
from remend.tasks import wrap
from remend.tasks.causal_lm import CausalLM
from remend.training import PRESETS, Trainer, TrainingConfig, train
from remend.training.episodes import Episodes

SETTINGS = TrainingConfig(
    batch_size=8, learning_rate=3e-3, alpha_learning_rate=3e-3, max_steps=30, validate_every=10, patience=1000
)
NETWORK = MendConfig(rank=16, alpha=1e-2)


def trained(model, requests, validation=None, settings=SETTINGS, **more):
    editor = Mend.create(worlds.task(model), NETWORK, seed=settings.seed)
    return train(wrap(model, worlds.tokenizer()), requests, validation, config=settings, editor=editor, **more)


def test_it_learns_keeps_the_best_and_leaves_the_model_alone(model, snapshot, tmp_path):
    seen = []
    editor = trained(model, worlds.requests(40), out=tmp_path / "editor", on_progress=seen.append)
    snapshot()
    assert seen[-1].step == 30
    assert sum(p.loss for p in seen[-8:]) < sum(p.loss for p in seen[:8])
    history = editor.trained["history"]
    assert [entry["step"] for entry in history] == [0, 10, 20, 30]
    best = min(history, key=lambda entry: entry["loss"])
    assert editor.trained["best_step"] == best["step"]
    again = Mend.load(tmp_path / "editor")
    assert again.trained == json.loads(json.dumps(editor.trained))
    for (name, a), (_, b) in zip(editor.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_the_same_seed_gives_the_same_editor_and_another_another():
    model, requests = worlds.gpt2(), worlds.requests(20)
    first, second = (trained(model, requests).state_dict() for _ in range(2))
    other = trained(model, requests, settings=TrainingConfig(**{**vars(SETTINGS), "seed": 1})).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_global_random_state_is_left_alone():
    model = worlds.llama()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trained(model, worlds.requests(12), settings=TrainingConfig(**{**vars(SETTINGS), "max_steps": 2}))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("network", [MendConfig(rank=8, alpha=1e-3), PRESETS["default"][0]], ids=["paper", "default"])
def test_an_untrained_edit_lowers_the_loss(task, network):
    """The descent sign: the authors' code climbs."""
    editor = Mend.create(task, network)
    requests = worlds.requests(10)
    Trainer(task, editor, requests, SETTINGS).calibrate()
    batches = [task.collate([task.encode(r.prompt, r.target)]) for r in requests]
    edits = editor.edit_each(task, requests)
    with torch.no_grad():
        before = [float(task.loss(batch)) for batch in batches]
        after = []
        for batch, edit in zip(batches, edits, strict=True):
            with edit.applied(task.model):
                after.append(float(task.loss(batch)))
    assert sum(after) < sum(before)
    assert sum(a < b for a, b in zip(after, before, strict=True)) >= 8


def test_relative_step_sizes_follow_the_size_of_the_layer(task):
    """Whatever the scale of a layer's output, the same α changes it by the same share at the edited token."""
    name = list(Mend.create(task, NETWORK).shapes)[-1]
    found = []
    for scale in (1.0, 100.0):
        with torch.no_grad():
            task.model.get_submodule(name).weight.mul_(scale)
        editor = Mend.create(task, MendConfig(rank=8, alpha=0.2, ridge=1e-4, relative=True))
        trainer = Trainer(task, editor, worlds.requests(10), SETTINGS)
        trainer.calibrate()
        found_factors = trainer.activation_cache.gradient_factors(
            [task.encode(r.prompt, r.target) for r in worlds.requests(10)]
        )
        factors = found_factors[name]
        u, change = factors.u[factors.active], editor(editor.pack(found_factors))[name]
        episode = torch.arange(len(factors.active)).repeat_interleave(factors.active.sum(1))
        moved = change.select(episode).output_change(u)
        output = task.model.get_submodule(name)(u)
        found.append(float(moved.detach().square().mean().sqrt() / output.detach().square().mean().sqrt()))
    assert 0.02 < found[0] < 2
    assert 0.3 < found[1] / found[0] < 3


@pytest.mark.parametrize("text", [(), ["The capital of Norway is Oslo"]], ids=["prompts", "text"])
def test_gradients_far_above_the_usual_size_are_limited(task, text, tmp_path):
    """To a multiple of their geometric mean, in their own direction; whatever inputs are whitened over."""
    requests = worlds.requests(10)
    editor = Mend.create(task, MendConfig(rank=8, ridge=1e-4, limit=1.1))
    trainer = Trainer(task, editor, requests, SETTINGS, text=text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the text is short
        trainer.calibrate()
    observed = trainer.activation_cache.gradient_factors([task.encode(r.prompt, r.target) for r in requests])
    rows = editor.pack(observed)
    for name, largest in zip(editor.shapes, editor.largest.tolist(), strict=True):
        deltas = [part[own] for part, own in zip(observed[name].delta, observed[name].active, strict=True)]
        sizes = torch.stack([part.norm() for part in deltas])
        assert largest == pytest.approx(1.1 * float(sizes.log().mean().exp()), rel=1e-4)
        assert 0 < (sizes > largest).sum() < len(sizes)
        for part, size, found in zip(deltas, sizes, rows[name].delta.split(rows[name].counts), strict=True):
            torch.testing.assert_close(found, part * min(1.0, largest / float(size)))
    editor.save(tmp_path / "editor")
    assert torch.equal(Mend.load(tmp_path / "editor").largest, editor.largest)
    assert Mend.create(task, NETWORK).largest is None


def test_whitening_can_take_its_second_moments_from_a_text(task):
    """From every token of every window, whatever the requests are."""
    facts = zip(worlds.COUNTRIES, worlds.CITIES, strict=True)
    text = ["The capital of Norway is Oslo " * 5]
    text += [f"{phrasing.format(country)} {city}" for country, city in facts for phrasing in worlds.PHRASINGS]
    editor = Mend.create(task, MendConfig(rank=8, ridge=1e-4))
    Trainer(task, editor, worlds.requests(10), SETTINGS, text=text).calibrate()
    ids = [task.encode_input(passage) for passage in text]
    windows = [part for own in ids for part in (own[: task.context], own[task.context :]) if part]
    assert len(windows) == len(text) + 1
    seen = {}
    for name in editor.shapes:
        module = task.model.get_submodule(name)
        handle = module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for window in windows:
            task.model(torch.tensor([window]))
        handle.remove()
    for name, inputs in seen.items():
        moment = SecondMoment(editor.shapes[name][0], editor.device)
        for own in inputs:
            moment.update(own.detach(), torch.ones(own.shape[:2], dtype=torch.bool))
        found = getattr(editor, f"whitener_{editor.index(name)}")
        torch.testing.assert_close(found, moment.whitener(1e-4).inner, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(found, torch.eye(len(found)), atol=0.1)


def test_a_text_without_words_is_refused(task):
    editor = Mend.create(task, MendConfig(rank=8, ridge=1e-4))
    with pytest.raises(TrainingError, match="is empty"):
        Trainer(task, editor, worlds.requests(10), SETTINGS, text=[" "]).calibrate()


def test_a_text_too_short_to_whiten_with_is_said_to_be(task):
    editor = Mend.create(task, MendConfig(rank=8, ridge=1e-4))
    with pytest.warns(UserWarning, match="not seen there, and whitening does little. Give a longer text"):
        Trainer(task, editor, worlds.requests(10), SETTINGS, text=["Oslo"]).calibrate()


def test_the_batched_loss_is_the_mean_of_single_episodes(task, editor):
    trainer = Trainer(task, editor, worlds.requests(10), SETTINGS)
    together = trainer.losses(trainer.episodes.batch(0, 6))
    for number in range(6):
        alone = trainer.losses(trainer.episodes.batch(0, 6)[number : number + 1])
        torch.testing.assert_close(alone.edit[0], together.edit[number], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(alone.locality[0], together.locality[number], rtol=1e-2, atol=1e-4)


def test_every_request_is_drawn_once_an_epoch_and_batches_reach_over_its_end(task):
    episodes = Episodes(task, worlds.requests(10), seed=0)
    drawn = [name for step in range(10) for name in episodes.batch(step, 3).ids]
    for epoch in range(3):
        assert sorted(drawn[epoch * 10 : (epoch + 1) * 10], key=int) == [str(i) for i in range(10)]
    assert drawn[:10] != drawn[10:20]
    fixed = episodes.fixed(4)
    assert [name for batch in fixed for name in batch.ids] == [str(i) for i in range(10)]


def test_a_set_is_what_an_edit_of_the_pair_alone_should_move_and_leave(task):
    plain = worlds.requests(2)
    given = plain[0].model_copy(
        update={
            "given_paraphrases": ("Of this it is",),
            "given_portability": (Probe(prompt="The reverse of it is", target=plain[1].target),),
            "given_near": ("Another thing is",),
        }
    )
    before, after = (Episodes(task, [first, plain[1]], seed=0, near=1.0).episodes[0] for first in (plain[0], given))
    assert after.edit == before.edit
    more = [example for example in after.neighbours if example not in before.neighbours]
    assert more == [
        task.encode("Of this it is", plain[0].target),
        task.encode("The reverse of it is", plain[1].target),
    ]
    assert [example.input for example in after.near] == [
        *(example.input for example in before.near),
        task.encode_input("Another thing is"),
    ]


def test_locality_examples_are_about_other_subjects(task):
    episodes = Episodes(task, worlds.requests(10), seed=0)
    prepared = {episode.edit: episode for episode in episodes.episodes}
    for step in range(40):
        batch = episodes.batch(step, 5)
        for edit, neighbour, locality in zip(batch.edits, batch.neighbours, batch.locality, strict=True):
            assert neighbour in prepared[edit].neighbours
            assert locality.input not in {edit.input, neighbour.input}


def test_a_request_with_one_paraphrase_also_learns_to_take_on_its_own_prompt(task):
    request = worlds.requests(1)[0]
    several = [f"{phrase} {request.subject} is" for phrase in ("It", "The city of", "Which city of")]
    for count, own in ((0, True), (1, True), (2, False), (3, False)):
        some = request.model_copy(update={"paraphrases": tuple(several[:count])})
        (episode, _) = Episodes(task, [some, worlds.requests(2)[1]], 0).episodes
        assert (episode.edit in episode.neighbours) == own
        assert len(episode.neighbours) == count + own


def test_requests_that_cannot_be_read_are_named(task):
    long = worlds.requests(2)[0].model_copy(update={"near": (Probe(prompt="The " * 70, target="Rome"),), "id": "mine"})
    with pytest.raises(RequestError, match=r"mine: prompt and target take .* tokens"):
        Episodes(task, [long, worlds.requests(2)[1]], 0)


def test_requests_without_paraphrases_or_locality_can_be_learnt_from():
    bare = [EditRequest(prompt=r.prompt, target=r.target) for r in worlds.requests(10)]
    history = trained(worlds.gpt2(), bare).trained["history"]
    assert min(entry["loss"] for entry in history) < history[0]["loss"]


def test_a_detached_editor_is_refused_after_the_first_step(task, monkeypatch):
    editor = Mend.create(task, NETWORK)
    trainer = Trainer(task, editor, worlds.requests(10), SETTINGS)
    trainer.calibrate()
    network = next(iter(editor.networks.values()))
    monkeypatch.setattr(
        network.second, "forward", lambda z, counts, factored_gradients: z
    )  # part of the network is never used
    trainer.train_step()
    with pytest.raises(TrainingError, match=r"no gradient reaches networks\.\w+\.second\.down"):
        trainer.train_step()


def test_non_finite_losses_stop_the_run_and_name_the_request(task):
    editor = Mend.create(task, NETWORK)
    trainer = Trainer(task, editor, worlds.requests(10), SETTINGS)
    trainer.calibrate()
    with torch.no_grad():
        editor.alpha[0] = math.nan
    before = {name: value.clone() for name, value in editor.state_dict().items()}
    with pytest.raises(
        NonFiniteError, match=r"step 0: the edited model's loss is not finite for \d.*nothing was updated"
    ):
        trainer.train_step()
    assert all(torch.equal(before[n], v) or not v.isfinite().all() for n, v in editor.state_dict().items())


def test_non_finite_activations_name_the_layer(task):
    module = task.model.get_submodule(next(iter(Mend.create(task, NETWORK).shapes)))
    handle = module.register_forward_pre_hook(lambda m, args: (args[0] * math.inf,))
    trainer = Trainer(task, Mend.create(task, NETWORK), worlds.requests(10), SETTINGS)
    with pytest.raises(NonFiniteError, match=r"loss of the edit is not finite .*episodes 0, 1"):
        trainer.calibrate()
    handle.remove()


def test_a_non_finite_validation_stops_the_run(monkeypatch, tmp_path):
    def broken(self, batch):
        found = real(self, batch)
        return replace(found, edit=found.edit * math.nan) if self.step == 20 else found

    real = Trainer.losses
    monkeypatch.setattr(Trainer, "losses", broken)
    with pytest.raises(NonFiniteError, match="step 20"):
        trained(worlds.gpt2(), worlds.requests(40), out=tmp_path / "editor")
    assert Mend.load(tmp_path / "editor").trained["best_step"] == 10, "the best state so far is kept"


def test_an_earlier_editor_is_not_overwritten(editor, tmp_path):
    editor.save(tmp_path / "editor")
    with pytest.raises(FileError, match="holds an editor or an edit already"):
        trained(worlds.gpt2(), worlds.requests(12), out=tmp_path / "editor")


def test_an_editor_is_trained_once_and_for_its_own_model():
    model = worlds.gpt2()
    done = trained(model, worlds.requests(12), settings=TrainingConfig(**{**vars(SETTINGS), "max_steps": 2}))
    with pytest.raises(TrainingError, match="trained already"):
        train(wrap(model, worlds.tokenizer()), worlds.requests(12), editor=done)
    with pytest.raises(WrongBaseError, match="weights of"):
        train(
            wrap(worlds.gpt2(seed=1), worlds.tokenizer()),
            worlds.requests(12),
            editor=Mend.create(worlds.task(model), NETWORK),
        )
    with pytest.raises(TrainingError, match="must be positive, not -1"):
        train(wrap(model, worlds.tokenizer()), worlds.requests(12), budget_seconds=-1.0)


def test_shared_subjects_are_refused():
    requests = worlds.requests(10)
    with pytest.raises(TrainingError, match=r"share 2 subjects \(france, italy"):
        trained(worlds.gpt2(), requests, requests[:2])


def test_too_few_requests_are_refused():
    with pytest.raises(TrainingError, match="at least two subjects"):
        trained(worlds.gpt2(), worlds.requests(1))


def test_the_budget_ends_the_run(monkeypatch):
    """By a clock that goes on by 10 ms whenever it is read, so that the machine's speed does not matter."""
    clock = SimpleNamespace(monotonic=partial(next, itertools.count(0.0, 0.01)))
    for module in ("loop", "training_run"):
        monkeypatch.setattr(f"remend.training.{module}.time", clock)
    settings = TrainingConfig(**{**vars(SETTINGS), "max_steps": 10**6, "validate_every": 10**6})
    editor = trained(worlds.gpt2(), worlds.requests(10), settings=settings, budget_seconds=1.0)
    assert 0 < editor.trained["steps"] <= 100
    assert [entry["step"] for entry in editor.trained["history"]] == [0, editor.trained["steps"]]


def test_a_budget_too_small_to_learn_in_is_refused():
    with pytest.raises(TrainingError, match="over before the first step"):
        trained(worlds.gpt2(), worlds.requests(10), budget_seconds=1e-3)


def test_patience_ends_the_run():
    settings = TrainingConfig(
        **{**vars(SETTINGS), "learning_rate": 1e-12, "alpha_learning_rate": 1e-12, "patience": 20}
    )
    assert trained(worlds.gpt2(), worlds.requests(10), settings=settings).trained["steps"] <= 40


def test_an_editor_refuses_another_architecture_and_warns_of_other_weights(task, editor):
    other = worlds.gpt2 if "Llama" in type(task.model).__name__ else worlds.llama
    requests = worlds.requests(1)
    with pytest.raises(WrongBaseError, match="another class or configuration"):
        editor.edit(wrap(other(), task.tokenizer), requests)
    with torch.no_grad():
        task.model.get_submodule(next(iter(editor.shapes))).weight.mul_(1.1)
    with pytest.warns(UserWarning, match="trained for .* with other weights"):
        editor.edit(task, requests)
    with pytest.raises(RequestError, match="at least one EditRequest"):
        editor.edit(task, [])


def test_half_precision_storage_and_damage(task, editor, tmp_path):
    editor.save(tmp_path / "whole")
    editor.save(tmp_path / "half", dtype=torch.float16)
    sizes = {kind: sum(f.stat().st_size for f in (tmp_path / kind).iterdir()) for kind in ("whole", "half")}
    assert sizes["half"] < 0.75 * sizes["whole"]
    half = Mend.load(tmp_path / "half")
    request = worlds.requests(1)
    exact, rounded = (e.edit(task, request).changes for e in (editor, half))
    for name, change in exact.items():
        apart = (rounded[name].dense() - change.dense()).norm() / change.norm()
        assert apart < 5e-3, f"{name}: {float(apart):.2%} of the edit apart"
    manifest = json.loads((tmp_path / "half" / "manifest.json").read_text())
    changes = [("config", {**manifest["config"], "rank": 99}, "do not fit the configuration")]
    changes += [("shapes", {"a": [1]}, r"shape of a should be"), ("base", {"name": "x"}, "no 'weights'")]
    for key, value, message in changes:
        (tmp_path / "half" / "manifest.json").write_text(json.dumps({**manifest, key: value}))
        with pytest.raises(FileError, match=message):
            Mend.load(tmp_path / "half")


def test_presets_and_configurations():
    network, settings = PRESETS["paper"]
    assert (network.rank, network.alpha) == (1920, 1e-4)
    assert (settings.edit_weight, settings.learning_rate, settings.alpha_learning_rate) == (0.1, 1e-6, 1e-4)
    assert (settings.batch_size, settings.gradient_clip, settings.max_steps, settings.patience) == (
        10,
        100,
        500_000,
        20_000,
    )
    assert (settings.validation_size, settings.seed, settings.decay) == (500, 0, False)
    for preset in PRESETS.values():
        for config in preset:
            assert from_json(type(config), json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 1, "learning_rte": 1.0}, "no setting 'learning_rte'; did you mean 'learning_rate'"),
        ({"version": 9}, "version 9 is not known"),
        (
            {"version": 1, "batch_size": "ten"},
            "TrainingConfig.batch_size must be a whole number of at least 1, not 'ten'",
        ),
        ({"version": 1, "batch_size": True}, "batch_size must be a whole number of at least 1, not True"),
        ({"version": 1, "batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"version": 1, "edit_weight": -1}, "edit_weight must be a finite number above 0, not -1"),
    ],
)
def test_training_settings_out_of_range_or_unknown_are_refused_by_name(content, message):
    with pytest.raises(ConfigError, match=message):
        from_json(TrainingConfig, content)


def test_network_settings_out_of_range_are_refused_by_name():
    with pytest.raises(ConfigError, match="rank must be a whole number of at least 1, not 0"):
        MendConfig(rank=0)
    with pytest.raises(ConfigError, match=r"alpha must be a finite number above 0, not -0\.0001"):
        MendConfig(alpha=-1e-4)
    with pytest.raises(ConfigError, match=r"limit must be a finite number of at least 0, not -1\.0"):
        MendConfig(limit=-1.0)


def test_a_bfloat16_base_trains_a_float32_editor():
    model = worlds.llama().to(torch.bfloat16)
    editor = trained(model, worlds.requests(20))
    assert editor.alpha.dtype == torch.float32
    edit = editor.edit(wrap(model, worlds.tokenizer()), worlds.requests(1))
    with edit.applied(model):
        answer = CausalLM(model, worlds.tokenizer()).predict(["Oslo is"], 2)
    assert len(answer[0]) > 0


@pytest.mark.parametrize("resume", [False, True])
def test_two_runs_never_train_to_one_folder(resume, tmp_path):
    requests, model = worlds.requests(20), worlds.gpt2()
    out, refused = tmp_path / "editor", []

    def start_another(progress):
        if not refused:
            with pytest.raises(FileError, match=r"another run trains to .*editor at this moment") as error:
                trained(worlds.gpt2(), requests, out=out, resume=resume)
            refused.append(error)

    few = replace(SETTINGS, max_steps=2)
    alone = trained(model, requests, settings=few).state_dict()
    together = trained(model, requests, settings=few, out=out, on_progress=start_another).state_dict()
    assert len(refused) == 1
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    assert [path.name for path in tmp_path.iterdir()] == ["editor"]


def test_a_lock_that_a_killed_run_left_hinders_nobody(tmp_path):
    (tmp_path / "editor.checkpoints").mkdir()
    (tmp_path / "editor.checkpoints" / "lock").touch()
    trained(worlds.gpt2(), worlds.requests(20), settings=replace(SETTINGS, max_steps=1), out=tmp_path / "editor")
    assert [path.name for path in tmp_path.iterdir()] == ["editor"]
