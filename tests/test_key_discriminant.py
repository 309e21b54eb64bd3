"""Edits that stay on their subject: contrast, near negatives, and the strength that an edit needs."""

import itertools
from dataclasses import replace

import pytest
import torch

import worlds
from remend.config import from_json
from remend.core.capture import record_inputs
from remend.core.key_discriminant import Discriminant
from remend.core.low_rank import LowRank, concatenate, stack
from remend.core.response import LINEAR, Response
from remend.edit import Edit
from remend.editors import Mend, MendConfig
from remend.errors import ConfigError, EditError
from remend.models.editable_matrices import editable_modules
from remend.request import EditRequest, Probe
from remend.tasks import wrap
from remend.tasks.causal_lm import CausalLM
from remend.training import PRESETS, Trainer, TrainingConfig
from remend.training.episodes import Episodes
from remend.training.negative_mining import MINED

CPU = torch.device("cpu")
DEFAULT = PRESETS["default"][0]
SETTINGS = TrainingConfig(batch_size=4, near=0.5, learning_rate=1e-3, validation_size=8)


def facts(count, d, spread, seed=0):
    """Keys of facts: a subject's part, a relation's part that neighbours share, and noise."""
    torch.manual_seed(seed)
    subjects, relations = torch.randn(count, d), torch.randn(4, d)

    def key(subject, relation):
        return subjects[subject] + 3 * relations[relation] + spread * torch.randn(d)

    keys = [[key(s, s % 4) for _ in range(3)] for s in range(count)]
    near = [[key((s + 4 * n) % count, s % 4) for n in (1, 2)] for s in range(count)]
    return keys, near


def fitted(keys, near):
    contrast = Discriminant(keys[0][0].numel(), CPU)
    half = len(keys) // 2
    for part in (slice(0, half), slice(half, None)):  # in two parts, as batches
        part_keys, part_near = keys[part], near[part]
        contrast.update(
            torch.stack(list(itertools.chain(*part_keys))),
            torch.tensor([i for i, group in enumerate(part_keys) for _ in group]),
            torch.stack(list(itertools.chain(*part_near))),
            torch.tensor([i for i, group in enumerate(part_near) for _ in group]),
        )
    return contrast


def test_contrast_is_what_its_definition_says():
    keys, near = facts(20, 6, 0.5)
    operator = fitted(keys, near).operator(0.7, 1e-3).inner
    every = torch.stack(list(itertools.chain(*keys))).double()
    moment = every.T @ every / len(every)
    same = (
        torch.stack([torch.outer(a, b) for prompts in keys for a, b in itertools.permutations(prompts, 2)])
        .double()
        .mean(0)
    )
    pairs = [
        torch.outer(a, b)
        for prompts, neighbours_of in zip(keys, near, strict=True)
        for a in prompts
        for b in neighbours_of
    ]
    neighbours = torch.stack(pairs).double().mean(0)
    inverse = torch.linalg.inv(moment + 1e-3 * moment.diagonal().mean() * torch.eye(6))
    expected = inverse @ (same - 0.7 * (neighbours + neighbours.T) / 2) @ inverse
    expected /= (every @ expected * every).sum(1).mean()
    torch.testing.assert_close(operator.double(), expected, rtol=1e-3, atol=1e-5)


def test_contrast_tells_paraphrases_from_neighbours_of_unseen_facts():
    d = 48
    operator = fitted(*facts(600, d, 0.7)).operator(1.0, 1e-3).inner
    torch.manual_seed(0)
    torch.randn(600, d)
    relations = torch.randn(4, d)  # the same relations, other subjects
    torch.manual_seed(5)
    scores = {"plain": [], "contrast": []}
    for number in range(200):
        relation, subject, other_subject = relations[number % 4], torch.randn(d), torch.randn(d)
        u, paraphrase, neighbour = (s + 3 * relation + 0.7 * torch.randn(d) for s in (subject, subject, other_subject))
        for name, direction in (("plain", u), ("contrast", operator @ u)):
            scores[name].append((direction @ paraphrase / (direction @ u), direction @ neighbour / (direction @ u)))
    apart = {name: sum(float(p > 0.4 > n) for p, n in pairs) / len(pairs) for name, pairs in scores.items()}
    assert apart["plain"] < 0.1
    assert apart["contrast"] > 0.9


def test_contrast_of_too_few_facts_is_left_alone():
    operator = fitted(*facts(4, 64, 0.7)).operator(1.0, 1e-2).inner
    torch.testing.assert_close(operator, operator[0, 0] * torch.eye(64))
    assert operator[0, 0] > 0


def test_contrast_that_does_not_hold_of_other_facts_is_left_alone():
    """Paraphrases hardly differ, and fewer facts than the keys have dimensions: others lie in directions not seen."""
    d = 64
    few = fitted(*facts(12, d, 0.01)).operator(1.0, 1e-3).inner
    torch.testing.assert_close(few, few[0, 0] * torch.eye(d))
    many = fitted(*facts(200, d, 0.01)).operator(1.0, 1e-3).inner
    assert (many - many.diag().mean() * torch.eye(d)).norm() > 0.1 * many.norm(), "of more facts it holds"


def test_ordinary_inputs_are_answered_less_the_more_they_count():
    d = 48
    keys, near = facts(600, d, 0.7)
    torch.manual_seed(7)
    ordinary = torch.randn(4000, d) * torch.where(torch.arange(d) < d // 2, 3.0, 0.1)
    u = torch.stack([group[0] for group in keys])
    answers = []
    for share in (0.0, 1.0, 10.0):
        contrast = fitted(keys, near)
        contrast.update_ordinary(ordinary[:1000])
        contrast.update_ordinary(ordinary[1000:])
        direction = u @ contrast.operator(1.0, 1e-3, share).inner
        direction = direction / (direction * u).sum(1, keepdim=True)  # 1 at its own key
        answers.append(float((ordinary @ direction.T).square().mean().sqrt()))
    plain, some, more = answers
    assert more < some < 0.7 * plain
    unseen = fitted(keys, near)
    torch.testing.assert_close(unseen.operator(1.0, 1e-3, 1.0).inner, unseen.operator(1.0, 1e-3).inner)


def test_without_paraphrases_keys_are_left_as_they_are():
    contrast = Discriminant(4, CPU)
    keys = torch.randn(50, 4)
    contrast.update(keys, torch.arange(50), torch.empty(0, 4), torch.empty(0, dtype=torch.long))
    operator = contrast.operator(1.0, 1e-3).inner
    torch.testing.assert_close(operator, torch.eye(4) / keys.square().sum(1).mean())


def test_inputs_are_what_the_modules_are_called_with(task):
    modules = editable_modules(task.model)
    batch = task.collate([task.encode(r.prompt, r.target) for r in worlds.requests(3)])
    inputs = record_inputs(task.model, modules, batch.rows, lambda: task.outputs(batch))
    editor = Mend.create(task, MendConfig(rank=4))
    for name, factor in editor.capture(task, batch).items():
        torch.testing.assert_close(inputs[name].x[batch.mask], factor.u[batch.mask])


def test_the_default_edits_outputs_at_target_tokens_and_each_answers_to_itself_with_one(task):
    requests = worlds.requests(20)
    editor = Mend.create(task, replace(DEFAULT, settle=0.0))
    assert all(d_in > d_out for d_in, d_out in editor.shapes.values())
    trainer = Trainer(task, editor, requests, SETTINGS)
    trainer.calibrate()
    pairs = [task.encode(r.prompt, r.target) for r in requests[:5]]
    factors = editor.capture(task, task.collate(pairs))
    rows = editor.pack(factors)
    for name, packed in rows.items():
        assert packed.counts == tuple(len(pair.target) for pair in pairs)
        aimed, _ = editor.transform(rows)[name]
        answers = (aimed * packed.u).sum(1)
        assert ((answers - 1).abs() < 1e-3).sum() >= len(answers) / 4
        assert answers.max() < 1.001, "no token answers with more"


def test_models_that_put_rows_and_tokens_on_one_axis_are_trained_too():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 40, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = OPTConfig(**sizes, vocab_size=len(worlds.tokenizer()), max_position_embeddings=48, word_embed_proj_dim=16)
    model = OPTForCausalLM(config).eval()
    editor = Mend.create(worlds.task(model), DEFAULT)
    trainer = Trainer(CausalLM(model, worlds.tokenizer()), editor, worlds.requests(12), SETTINGS)
    trainer.calibrate()
    assert all(trainer.train_step() > 0 for _ in range(2))
    assert editor.edit(wrap(model, worlds.tokenizer()), worlds.requests(1)).changes


def test_contrast_and_settling_survive_saving(task, tmp_path):
    editor = Mend.create(task, DEFAULT)
    requests = worlds.requests(12)
    Trainer(task, editor, requests, SETTINGS).calibrate()
    editor.save(tmp_path / "editor")
    again = Mend.load(tmp_path / "editor")
    for name, value in editor.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    for edit, loaded_edit in zip(
        editor.edit_each(task, requests[:3]),
        again.edit_each(task, requests[:3]),
        strict=True,
    ):
        for name, change in edit.changes.items():
            torch.testing.assert_close(loaded_edit.changes[name].u, change.u, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(loaded_edit.changes[name].delta, change.delta, rtol=1e-3, atol=1e-5)


def test_a_setting_that_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="give tokens='target'"):
        MendConfig(contrast=1.0)
    with pytest.raises(ConfigError, match="tokens must be one of all, target, not 'last'"):
        from_json(MendConfig, {"version": 1, "tokens": "last"})
    with pytest.raises(ConfigError, match="settle must be a finite number of at least 0"):
        MendConfig(settle=-1.0)
    with pytest.raises(ConfigError, match="shares of a whole"):
        TrainingConfig(near=0.7, in_batch=0.7)


def test_the_paper_preset_knows_nothing_of_all_this():
    network, training = PRESETS["paper"]
    assert (network.tokens, network.contrast, network.settle, network.outputs_only) == ("all", 0.0, 0.0, False)
    assert (training.near, training.in_batch, training.hardest) == (0.0, 0.0, 1)


def test_near_negatives_are_drawn_as_often_as_asked(task):
    requests = worlds.requests(20)
    episodes = Episodes(task, requests, seed=0, near=0.5)
    near = {task.encode(p.prompt, p.target) for r in requests for p in r.near}
    drawn = [pair in near for step in range(50) for pair in episodes.batch(step, 8).locality]
    assert 0.4 < sum(drawn) / len(drawn) < 0.6
    plain = Episodes(task, requests, seed=0)
    assert not any(pair in near for step in range(50) for pair in plain.batch(step, 8).locality)
    assert plain.batch(3, 8).edits == episodes.batch(3, 8).edits


def test_in_batch_negatives_are_other_edits_of_the_same_relation(task):
    requests = [r.model_copy(update={"relation": f"R{i % 2}"}) for i, r in enumerate(worlds.requests(20))]
    episodes = Episodes(task, requests, seed=0, in_batch=1.0)
    relation = {task.encode(r.prompt, r.target): i % 2 for i, r in enumerate(requests)}
    batch = episodes.batch(0, 10)
    for edit, locality in zip(batch.edits, batch.locality, strict=True):
        assert locality in batch.edits
        assert locality.input != edit.input
        assert relation[locality] == relation[edit]


def test_requests_without_near_get_mined_ones(task):
    bare = [r.model_copy(update={"near": ()}) for r in worlds.requests(20)]
    trainer = Trainer(task, Mend.create(task, DEFAULT), bare, SETTINGS)
    trainer.calibrate()
    for episode in trainer.episodes.episodes:
        assert 0 < len(episode.near) <= MINED
        assert all(pair.input not in episode.prompts for pair in episode.near)
    assert trainer.train_step() > 0


def test_the_hardest_of_several_locality_examples_is_used(task):
    editor = Mend.create(task, replace(DEFAULT, settle=0.0))
    requests = worlds.requests(20)
    trainer = Trainer(task, editor, requests, replace(SETTINGS, hardest=3))
    trainer.calibrate()
    chosen = trainer._select_hardest(0)
    turns = [trainer.episodes.batch(0, 4, turn) for turn in range(3)]
    assert len({turn.edits for turn in turns}) == 1
    assert len({turn.neighbours for turn in turns}) == 1
    losses = torch.stack([trainer.losses(turn).locality for turn in turns])
    torch.testing.assert_close(trainer.losses(chosen).locality, losses.max(0).values)


def test_one_fact_asked_for_by_several_requests_counts_once(task):
    request = EditRequest(prompt="The capital of Peru is", target="Oslo", paraphrases=("Peru has the capital",))
    again = EditRequest(
        prompt="Peru has the capital",
        target="Rome",
        paraphrases=("The capital of Peru is",),
        near=(Probe(prompt="The capital of Egypt is", target="Cairo"),),
    )
    unrelated = EditRequest(prompt="The capital of India is", target="Rome")
    facts_found = Episodes(task, [request, again, unrelated], seed=0).facts()
    assert sorted(len(fact.prompts) for fact in facts_found) == [1, 2]
    assert sum(len(fact.near) for fact in facts_found) == 1


def test_a_gated_edit_acts_only_where_it_is_asked_for():
    change = LowRank(torch.eye(3)[:1], torch.ones(1, 2), Response("relu", threshold=0.4))
    x = torch.tensor([[1.0, 9, 9], [0.7, 0, 0], [0.4, 0, 0], [-2.0, 0, 0]])
    torch.testing.assert_close(change.output_change(x), torch.tensor([1, 0.5, 0, 0])[:, None].expand(4, 2))
    episodes = stack([change, change.scaled(2.0)])
    torch.testing.assert_close(episodes.output_change(x[[1, 1]]), torch.tensor([[0.5, 0.5], [1.0, 1.0]]))
    for refused, match in ((change.dense, "written into a weight"), (lambda: change.recompress(1), "compressed")):
        with pytest.raises(EditError, match=match):
            refused()
    with pytest.raises(EditError, match="different responses"):
        concatenate([change, replace(change, response=LINEAR)])


def test_a_gated_editor_trains_and_its_edits_are_saved_but_not_merged(task, tmp_path):
    editor = Mend.create(task, replace(DEFAULT, gate=0.2))
    requests = worlds.requests(20)
    trainer = Trainer(task, editor, requests, SETTINGS)
    trainer.calibrate()
    assert trainer.train_step() > 0
    edit = editor.edit(task, requests[:2])
    edit.save(tmp_path / "edit")
    again = Edit.load(tmp_path / "edit")
    assert {change.response for change in again.changes.values()} == {Response("relu", threshold=0.2)}
    with edit.applied(task.model):
        answers = task.predict([r.prompt for r in requests[:4]], 4)
    with again.applied(task.model):
        assert task.predict([r.prompt for r in requests[:4]], 4) == answers
    with pytest.raises(EditError, match="cannot be written into a weight"):
        again.merge(task.model)
    with pytest.raises(ConfigError, match="a gate needs keys"):
        MendConfig(gate=0.3)
