"""Which texts hidden units answer: what is left out of a measurement is what changes nothing."""

import pytest
import torch

import families
from remend.core.low_rank import LowRank
from remend.core.response import Response
from remend.edit import Edit
from remend.evaluation import ordinary_text
from remend.evaluation.interventions import NoIntervention, SeparateEdits, SharedEdit
from remend.evaluation.ordinary_text import OrdinaryText
from remend.evaluation.unit_answers import rows_acted_on
from remend.fingerprint import ModelFingerprint
from remend.models import block_mlp
from remend.models.blocks import find_stacks


def unit_at(task, key, block, size=3.0, threshold=0.5):
    """An edit of one unit that answers what enters an MLP as ``key`` does: inputs alone, with relu's exact zero."""
    mlp = block_mlp(task.model, block)
    delta = size * torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    change = LowRank(key[None] / key.square().sum(), delta, Response("relu", threshold=threshold), reads=mlp.reads)
    return Edit({mlp.down: change}, ModelFingerprint.of(task.model, [mlp.reads, mlp.down]))


def block_of(task, number, stack=-1):
    """The name of a block."""
    return find_stacks(task.model)[stack][1][number][0]


@torch.no_grad()
def last_key(task, example, block):
    """What enters an MLP at the last token of a text."""
    seen = []
    reads = task.model.get_submodule(block_mlp(task.model, block).reads)
    handle = reads.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    task.outputs(task.collate([example]))
    handle.remove()
    return seen[0][-2]


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5-gated", "bert, binary"])
def test_what_is_left_out_changes_nothing(family, monkeypatch):
    task = families.task(family)
    text = OrdinaryText(task)
    block = block_of(task, 0, stack=0)
    edits = [unit_at(task, last_key(task, text.examples[n], block), block, threshold=0.95) for n in (0, 5)]
    interventions = [SharedEdit(task, edits[0]), SeparateEdits(task, edits)]
    acted_on = rows_acted_on(interventions[1], text.examples[:16], 2)
    assert acted_on[0, 0]
    assert acted_on[1, 5]
    assert not acted_on.all()
    found = [text.measure(intervention, number) for number, intervention in enumerate(interventions, start=1)]
    monkeypatch.setattr(
        ordinary_text, "rows_acted_on", lambda i, examples, n: torch.ones(n, len(examples), dtype=torch.bool)
    )
    for of_some, intervention in zip(found, interventions, strict=True):
        for one, other in zip(of_some, text.measure(intervention, len(of_some)), strict=True):
            assert one.stays == other.stays
            assert one.divergence.mean == pytest.approx(other.divergence.mean, rel=1e-3, abs=1e-6)
            assert one.perplexity == pytest.approx(other.perplexity)
            if task.causal:
                assert one.perplexity_ratio.mean == pytest.approx(other.perplexity_ratio.mean, rel=1e-4)


def test_a_unit_that_answers_nothing_takes_no_pass_through_the_blocks_above():
    task = families.task("llama")
    text = OrdinaryText(task)
    block = block_of(task, 0)
    key = 100 * last_key(task, text.examples[0], block)  # nothing else is so far from the origin
    text.measure(SharedEdit(task, unit_at(task, key, block)))
    passes = []
    task.model.model.layers[-1].register_forward_hook(lambda *_: passes.append(1))
    (found,) = text.measure(SharedEdit(task, unit_at(task, key, block)))
    assert passes == []
    assert (found.stays.mean, found.divergence.mean, found.perplexity_ratio.mean) == (1.0, 0.0, 1.0)
    assert found.perplexity == text.perplexity


def test_where_it_cannot_be_told_all_texts_count(monkeypatch):
    task = families.task("llama")
    examples = OrdinaryText(task).examples[:4]
    key = torch.ones(16)
    above_all = unit_at(task, key, block_of(task, -1))
    assert rows_acted_on(SharedEdit(task, above_all), examples, 1).all()
    low = unit_at(task, 1e6 * key, block_of(task, 0))
    assert not rows_acted_on(SharedEdit(task, low), examples, 1).any()
    weight = task.model.get_submodule(name := block_mlp(task.model, block_of(task, 0)).down).weight
    nothing = LowRank(torch.zeros(1, weight.shape[1]), torch.zeros(1, weight.shape[0]))
    linear = Edit({name: nothing}, ModelFingerprint.of(task.model, [name]))
    assert rows_acted_on(SharedEdit(task, linear), examples, 1).all()
    assert rows_acted_on(NoIntervention(task, {}), examples, 1).all()
    # The last of an encoder's blocks: the next block of the model reads something else.
    t5 = families.task("t5-gated")
    at_end = unit_at(t5, 1e6 * key, block_of(t5, -1, stack=0))
    assert rows_acted_on(SharedEdit(t5, at_end), OrdinaryText(t5).examples[:4], 1).all()
    # A stack that runs twice.
    again = families.task("llama")
    outputs = type(again).outputs
    monkeypatch.setattr(type(again), "outputs", lambda self, batch: [outputs(self, batch) for _ in range(2)][1])
    assert rows_acted_on(SharedEdit(again, unit_at(again, 1e6 * key, block_of(again, 0))), examples, 1).all()
