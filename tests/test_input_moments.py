"""What editors without training measure of a model and its text, and how sure one is of their edits."""

import copy

import pytest
import torch
from transformers import AddedToken

import families
import remend
import worlds
from remend.core.layers import weight_rms
from remend.core.sketched_moment import SketchedMoment
from remend.editors import input_moments, make
from remend.editors.finetune import FineTuneConfig
from remend.editors.input_moments import second_moments, whiteners
from remend.editors.ke import Ke
from remend.editors.ridge import Ridge
from remend.errors import ConfigError, NonFiniteError
from remend.evaluation.ordinary_text import Elsewhere
from remend.evaluation.robustness import Robustness, measure_robustness
from remend.evaluation.summary import Summary
from remend.fingerprint import find_modules
from remend.models.blocks import find_stacks
from remend.models.frozen_prefix import run_as_far_as
from remend.request import EditRequest
from remend.tasks import wrap
from remend.tasks.base import Example
from remend.tasks.ordinary_inputs import MOST_TOKENS


@pytest.fixture
def task():
    return families.task("gpt2")


def test_of_a_long_text_stretches_are_drawn_from_all_of_it(task):
    text = [f"The capital of {country} is" for country in worlds.COUNTRIES for _ in range(3_000)]
    shown = task.ordinary_examples(text)
    tokens = sum(len(pair.input) for pair in shown)
    assert 0.99 * MOST_TOKENS < tokens <= MOST_TOKENS
    assert len({pair.input for pair in shown}) == len(worlds.COUNTRIES)
    assert task.ordinary_examples(text) == shown != task.ordinary_examples(text, seed=1)


def test_a_long_passage_is_cut_and_each_stretch_begins_as_the_model_expects(task, monkeypatch):
    tokenizer = copy.deepcopy(task.tokenizer)
    tokenizer.bos_token = "The"
    begin = tokenizer.bos_token_id
    monkeypatch.setattr(type(task), "encode_input", lambda self, prompt: [begin, *range(10, 210)])
    shown = [pair.input for pair in wrap(task.model, tokenizer).ordinary_examples(["a long text"])]
    assert len(shown) > 1
    assert all(own[0] == begin and len(own) <= task.context for own in shown)
    assert sorted(token for own in shown for token in own[1:]) == list(range(10, 210))


def test_tokens_without_an_embedding_are_not_drawn(task):
    tokenizer = copy.deepcopy(task.tokenizer)
    tokenizer.add_tokens([AddedToken(f"<more {number}>") for number in range(400)])
    edit = make("ridge", wrap(task.model, tokenizer)).edit(wrap(task.model, tokenizer), worlds.requests(1))
    assert all(change.rank for change in edit.changes.values())


@pytest.mark.parametrize("name", ["ridge", "finetune"])
def test_a_model_that_holds_nan(task, name):
    weight = task.model.transformer.h[0].mlp.c_fc.weight
    weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"h\.0\.mlp\.c_fc\.weight holds NaN"):
        make(name, task).edit(task, worlds.requests(1))


def test_matrices_over_an_encoders_output():
    task = families.task("t5")
    editor = Ridge.create(task, modules=["*EncDecAttention.k"])
    edit = editor.edit(task, worlds.requests(1))
    assert all("EncDecAttention" in name for name in edit.changes)


def test_wide_inputs_are_whitened_in_some_directions(task, monkeypatch):
    modules = find_modules(task.model, ["transformer.h.1.mlp.c_proj"])
    pairs = task.ordinary_examples([])
    dense = whiteners(task, modules, pairs, 0.01)
    monkeypatch.setattr(input_moments, "sketch_directions", lambda d: 8)
    (moment,) = second_moments(task, modules, pairs, sketched=True).values()
    assert isinstance(moment, SketchedMoment)
    assert not any(isinstance(m, SketchedMoment) for m in second_moments(task, modules, pairs).values())
    ((name, sketched),) = whiteners(task, modules, pairs, 0.01).items()
    assert sketched.basis is not None
    assert dense[name].basis is None
    edit = make("ridge", task).edit(task, worlds.requests(2))
    assert all(change.u.isfinite().all() for change in edit.changes.values())


MLP_OUTPUTS = {"t5": ".DenseReluDense.wo", "gpt2": ".mlp.c_proj", "llama": ".mlp.down_proj", "bart": ".fc2"}


@pytest.mark.parametrize(
    ("family", "blocks", "runs"),
    [
        ("gpt2", [0, 1], [0, 1]),
        ("llama", [2, 1], [0, 1, 2]),
        ("llama", [3], [0, 1, 2, 3]),
        ("t5", [0], [0]),  # of the encoder, so the decoder need not run
        ("t5", [3], [0, 1, 2, 3]),
        ("bart", [5], [0, 1, 2, 3, 4, 5]),  # the decoder's second
        ("a class that no library knows", [1], [0, 1]),
    ],
)
@torch.no_grad()
def test_what_lies_above_the_measured_matrices_does_not_run(family, blocks, runs, monkeypatch):
    task = families.task(family)
    stack = [block for _, part in find_stacks(task.model) for _, block in part]
    prefixes = tuple(f"{name}." for name, module in task.model.named_modules() if module in [stack[b] for b in blocks])
    suffix = MLP_OUTPUTS.get(family, ".thinking.slim")
    modules = {n: m for n, m in task.model.named_modules() if n.startswith(prefixes) and n.endswith(suffix)}
    examples = task.ordinary_examples((), 0, 8)
    ran = []
    for block in stack:
        block.register_forward_hook(lambda block, args, output: ran.append(stack.index(block)))
    stopped = second_moments(task, modules, examples)
    assert sorted(set(ran)) == runs
    monkeypatch.setattr(input_moments, "run_as_far_as", lambda model, modules, forward: forward())
    whole = second_moments(task, modules, examples)
    assert sorted(set(ran)) == list(range(len(stack)))
    for name, moment in stopped.items():
        assert all(torch.equal(*pair) for pair in zip(moment.totals, whole[name].totals, strict=True))


def test_all_runs_where_a_matrix_lies_outside_of_the_blocks_or_in_several():
    task = families.task("llama")
    batch, ran = task.collate([Example((5, 6), (7,))]), []
    shared = task.model.model.layers[0].mlp
    task.model.model.layers[2].mlp = shared
    for number, block in enumerate(task.model.model.layers):
        block.register_forward_hook(lambda block, args, output, number=number: ran.append(number))
    for modules, runs in (([task.model.lm_head], 4), ([shared.down_proj], 3), ([task.model.model.layers[1].mlp], 2)):
        ran.clear()
        run_as_far_as(task.model, modules, lambda: task.outputs(batch))
        assert len(ran) == runs
    assert len(task.outputs(batch)) == 1


def test_sizes_of_weights_that_cannot_be_read():
    assert weight_rms(torch.nn.Linear(16, 4, device="meta")) == 0.25
    linear = torch.nn.Linear(16, 4)
    assert weight_rms(linear) == pytest.approx(float(linear.weight.detach().square().mean().sqrt()))


def test_tuning_in_batches_does_not_look_at_all_of_them():
    with pytest.raises(ConfigError, match="set until_taken to False"):
        FineTuneConfig(batch_size=2)
    assert FineTuneConfig(batch_size=2, until_taken=False).batch_size == 2


def test_ke_reads_targets_of_a_model_whose_answers_do_not_end(task):
    tokenizer = copy.deepcopy(task.tokenizer)
    tokenizer.eos_token = None
    edit = Ke.create(task).edit(wrap(task.model, tokenizer), worlds.requests(1))
    assert edit.changes


def test_ridge_takes_on_the_whole_target_and_leaves_what_is_known():
    task = remend.load("atlas")
    task, editor = task, make("ridge", task)
    every = remend.read_source("atlas:validation")
    long = [r for r in every if len(task.encode(r.prompt, r.target).target) > 3][:12]
    edits = editor.edit_each(task, long)
    taken = 0
    for request, edit in zip(long, edits, strict=True):
        with edit.applied(task.model):
            taken += remend.answers(task, [request.prompt]) == [request.target]
    assert taken >= 11
    known = [r.model_copy(update={"target": r.ground_truth}) for r in every[:3] if r.ground_truth]
    with pytest.warns(UserWarning, match="3 of 3 edits change nothing"):
        edits = editor.edit_each(task, known)
    assert all(float(norm) == 0 for edit in edits for norm in edit.norms().values())


def test_a_prompt_that_fills_the_context_is_looked_at_as_it_is(task):
    room = task.context - len(task.encode("The", "Paris").target)
    prompt = "The capital " * 200
    request = EditRequest(prompt=task.tokenizer.decode(task.tokenizer(prompt).input_ids[:room]), target="Paris")
    assert len(task.encode(request.prompt, request.target)) >= task.context - 1
    edit = make("ridge", task).edit(task, [request])
    assert 0 <= measure_robustness(task, edit, [request]).probability <= 1


def test_a_classifier_is_not_asked_after_other_beginnings():
    task, (request, *_) = families.task("bert, binary"), families.requests("bert, binary", 1)
    with pytest.warns(UserWarning, match="changes nothing: the model answers so already"):
        edit = make("ridge", task).edit(task, [request])
    found = measure_robustness(task, edit, [request])
    assert found.in_context is None
    assert found.elsewhere.choices > 0


def test_what_makes_an_edit_doubtful_is_said():
    good, bad = (
        Elsewhere(False, 9, 99, stays=Summary(share, (share, share), 9), divergence=Summary(0.0, (0.0, 0.0), 9))
        for share in (0.99, 0.9)
    )
    assert Robustness(0.9, 0.8, good).sure
    assert Robustness(0.9, None, good).sure
    assert Robustness(0.4, 0.5, bad).doubts == [
        "the probability is below 50%",
        "it should hold after 75% of beginnings",
        "98% of other choices should stay",
    ]


def test_a_text_is_a_list_of_passages(task):
    with pytest.raises(ConfigError, match="a list of passages"):
        make("ridge", task, text="a passage")
