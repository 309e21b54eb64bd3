"""Text to tokens to logits and back, for any length and tokenizer habit."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import worlds
from remend.errors import RequestError
from remend.tasks.causal_lm import CausalLM, Example

WORDS = st.lists(st.sampled_from([*worlds.CITIES, "is", "the", "?", "zzz", "ß"]), min_size=1, max_size=5).map(" ".join)
TASK = CausalLM(worlds.gpt2(), worlds.tokenizer())


@given(WORDS, WORDS)
def test_a_pair_is_what_the_model_would_read(prompt, target):
    pair = TASK.encode(prompt, target)
    end = TASK.tokenizer.eos_token_id
    assert pair.input == TASK.encode_input(prompt), "the prompt alone has the same tokens"
    assert pair.target[-1] == end
    assert pair.target.count(end) == 1
    assert TASK.tokenizer.decode(pair.input + pair.target[:-1]) == f"{prompt} {target}"
    assert TASK.encode(prompt + " ", f"  {target} ") == pair, "spaces around them do not matter"
    after_break = TASK.encode(prompt + "\n", target)
    assert TASK.tokenizer.decode(after_break.input + after_break.target[:-1]) == f"{prompt}\n{target}"
    assert TASK.decode(pair.target) == target


def test_a_tokenizer_that_adds_a_beginning_and_an_end():
    from tokenizers.processors import TemplateProcessing

    raw = worlds.tokenizer()
    adding = type(raw)(tokenizer_object=raw.backend_tokenizer, eos_token="<|end|>", bos_token="<|pad|>")
    end, begin = adding.eos_token_id, adding.bos_token_id
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A <|end|>", special_tokens=[("<|pad|>", begin), ("<|end|>", end)]
    )
    try:
        pair = CausalLM(worlds.gpt2(), adding).encode("Oslo is", "Rome")
    finally:
        adding.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert pair.input[0] == begin
    assert end not in pair.input
    assert pair.target.count(end) == 1
    assert pair.target[-1] == end


def test_the_tokenizers_own_padding_does_not_matter():
    left = copy.deepcopy(worlds.tokenizer())
    left.padding_side = left.truncation_side = "left"
    other = CausalLM(TASK.model, left)
    texts = [("Oslo is", "Rome"), ("The capital of Peru is", "Lima")]
    batches = [task.collate([task.encode(*text) for text in texts]) for task in (TASK, other)]
    flat = [{**vars(batch), **batch.inputs} for batch in batches]
    names = [name for name in flat[0] if name != "inputs"]
    fields = [(flat[0][name], flat[1][name]) for name in names]
    assert sum(a is not None for a, _ in fields) == 6, "ids, attention mask, mask, row, position and target"
    assert all(a is b is None or torch.equal(a, b) for a, b in fields)
    assert not batches[0].mask[0, -1], "padding is on the right"


def test_a_padding_token_that_the_model_does_not_know():
    added = copy.deepcopy(worlds.tokenizer())
    added.add_special_tokens({"pad_token": "<|new|>"})
    task = CausalLM(TASK.model, added)
    assert task.loss(task.collate([task.encode("Oslo is", "Rome"), task.encode("Lima", "Rome")])).isfinite().all()


def test_a_model_without_an_end_token_or_padding_token():
    bare = copy.deepcopy(worlds.tokenizer())
    bare.eos_token = bare.pad_token = None
    task = CausalLM(TASK.model, bare)
    pairs = [task.encode("Oslo is", "Rome"), task.encode("The capital of Peru is", "Lima")]
    assert pairs[0].target == TASK.encode("Oslo is", "Rome").target[:-1]
    assert task.loss(task.collate(pairs)).isfinite().all()
    assert [len(answer) for answer in task.predict(["Oslo is", "Lima"], 3)] == [3, 3]


@pytest.mark.parametrize("family", worlds.FAMILIES)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
def test_target_logits_are_those_of_each_pair_alone(family, texts):
    task = CausalLM(MODELS[family], worlds.tokenizer())
    pairs = [task.encode(prompt, target) for prompt, target in texts]
    with torch.no_grad():
        batched = task.outputs(task.collate(pairs))
        alone = [task.model(torch.tensor([pair.input + pair.target])).logits[0] for pair in pairs]
    expected = torch.cat([logits[len(p.input) - 1 : -1] for p, logits in zip(pairs, alone, strict=True)])
    torch.testing.assert_close(batched, expected, rtol=1e-3, atol=1e-4)


MODELS = {name: make() for name, make in worlds.FAMILIES.items()}


@pytest.mark.parametrize("family", worlds.FAMILIES)
def test_answers_are_greedy_whatever_they_are_batched_with(family):
    task = CausalLM(MODELS[family], worlds.tokenizer())
    prompts = ["Oslo", "The capital of Peru is", "Lima is", "Which city rules Egypt ? It is", "Rome is"]
    for prompt, answer in zip(prompts, task.predict(prompts, max_new_tokens=6, batch_size=2), strict=True):
        ids = list(task.encode_input(prompt))
        for token in answer:
            with torch.no_grad():
                assert int(task.model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)
        assert len(answer) == 6 or answer[-1] == task.tokenizer.eos_token_id


@pytest.mark.parametrize("family", worlds.FAMILIES)
def test_first_choices_under_teacher_forcing_are_exactly_greedy_decoding(family):
    """The identity that evaluation rests on: argmax at every position, end token included, iff decoding emits it."""
    task = CausalLM(MODELS[family], worlds.tokenizer())
    prompts = [phrasing.format(country) for phrasing in worlds.PHRASINGS for country in worlds.COUNTRIES]
    for prompt, answer in zip(prompts, task.predict(prompts, max_new_tokens=4), strict=True):
        asked = tuple(task.encode_input(prompt))
        other = (*answer[:-1], (answer[-1] + 1) % 300)
        for target, emitted in ((answer, True), (other, False)):
            batch = task.collate([Example(asked, target)])
            with torch.no_grad():
                chosen = tuple(task.outputs(batch).argmax(-1).tolist())
            assert (chosen == target) is emitted


def test_what_does_not_fit_is_refused():
    with pytest.raises(RequestError, match=r"takes? \d+ tokens, the model's context holds 48: shorten the target"):
        TASK.encode("Oslo is", "Rome " * 60)
    with pytest.raises(RequestError, match="shorten the prompt"):
        TASK.encode("Oslo " * 60, "Rome")
    with pytest.raises(RequestError, match="target ' ' holds no text"):
        TASK.encode("Oslo is", " ")
    with pytest.raises(RequestError, match="prompt '' holds no text"):
        TASK.predict([""])
    with pytest.raises(RequestError, match="leaves no room"):
        TASK.predict(["Oslo " * 60])
