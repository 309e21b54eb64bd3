"""Whatever a tokenizer's habits, a pair is the text that it stands for, begun once and ended once."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

import families
import tokenizers_of
import worlds
from remend.errors import RequestError
from remend.tasks import wrap
from remend.tasks.causal_lm import CausalLM
from remend.tasks.seq2seq import Seq2SeqLM
from tokenizers_of import BEGIN, CAUSAL, END, SEQ2SEQ

WORDS = st.one_of(
    st.sampled_from([*worlds.CITIES, *worlds.COUNTRIES, "The", "is", "?", "It's", "(so)", "-", "42"]),
    st.text(tokenizers_of.LETTERS + tokenizers_of.LETTERS.upper() + ".,'", min_size=1, max_size=6),
)
TEXTS = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)
"""A prompt and a target fit together into the tiny models' context of 64, even at a token a letter."""

SPACES = st.sampled_from(["", " ", "   "])
BREAKS = st.sampled_from(["", "\n", "\n\n", ":\n"])
ODD = st.text("ßé日本😀\t", min_size=1, max_size=4)
"""Characters that only tokenizers with bytes to fall back on know."""


@functools.cache
def task_for(habit, kind="llama", padding_side="right"):
    """A tiny model of a family with a tokenizer of some habit."""
    tokenizer = tokenizers_of.tokenizer(habit, padding_side)
    torch.manual_seed(0)
    model = families.LANGUAGE_MODELS[kind]()
    return wrap(fitted(wrap(model, tokenizer)).eval(), tokenizer)


def fitted(task):
    """The model with the tokenizer's vocabulary."""
    task.model.resize_token_embeddings(len(task.tokenizer))
    if task.model.config.is_encoder_decoder:
        task.model.config.decoder_start_token_id = task.tokenizer.pad_token_id
    return task.model


def read(task, ids):
    """Token ids as text, without the space that some tokenizers put before."""
    return task.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False).lstrip(" ")


@pytest.mark.parametrize("habit", CAUSAL)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_causal_pair_is_its_text(habit, data):
    task = task_for(habit)
    assert isinstance(task, CausalLM)
    tokenizer, known = task.tokenizer, "unigram" in habit
    prompt = data.draw(TEXTS) + data.draw(st.just("") if known else BREAKS)
    target = data.draw(TEXTS) + data.draw(st.just("") if known else ODD | st.just(""))
    pair = task.encode(prompt, target)
    text = prompt + ("" if prompt.endswith("\n") else " ") + target.strip()
    assert read(task, (*pair.input, *pair.target)) == text
    assert pair.input == tuple(task.encode_input(prompt))
    assert read(task, pair.input) == prompt
    assert task.decode(pair.target) == target.strip()
    whole = [token for token in tokenizer(text).input_ids if token != tokenizer.eos_token_id]
    if tuple(whole[: len(pair.input)]) == pair.input:
        assert (*pair.input, *pair.target[:-1]) == tuple(whole)
    assert pair.target[-1] == tokenizer.eos_token_id
    assert (*pair.input, *pair.target).count(tokenizer.eos_token_id) == 1
    assert (*pair.input, *pair.target).count(tokenizer.bos_token_id) == ("begun" in habit or "pieces" in habit)
    before, after = data.draw(SPACES), data.draw(SPACES)
    if prompt.endswith("\n"):  # spaces at the beginning of a line indent what follows
        indented = task.encode(f"{before}{prompt}{after}", f"{after}{target}{before}")
        assert read(task, indented.input) == prompt + after
        assert read(task, (*indented.input, *indented.target)) == prompt + after + target.strip()
    else:
        assert task.encode(f"{before}{prompt}{after}", f"{after}{target}{before}") == pair


@pytest.mark.parametrize("habit", SEQ2SEQ)
@settings(deadline=None, max_examples=40)
@given(prompt=TEXTS, target=TEXTS, before=SPACES, after=SPACES)
def test_an_encoder_decoders_pair_is_its_two_texts(habit, prompt, target, before, after):
    task = task_for(habit, "t5")
    assert isinstance(task, Seq2SeqLM)
    pair = task.encode(prompt, target)
    assert list(pair.input) == task.tokenizer(prompt).input_ids
    assert read(task, pair.input) == prompt
    assert task.decode(pair.target) == target
    assert pair.target[-1] == task.tokenizer.eos_token_id
    assert pair.target.count(task.tokenizer.eos_token_id) == 1
    assert pair.target.count(task.tokenizer.bos_token_id) == ("begun" in habit or "pieces" in habit)
    assert task.encode(f"{before}{prompt}{after}", f"{after}{target}{before}") == pair


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("habit", CAUSAL)
def test_a_beginning_that_the_text_brings_is_not_doubled(habit, kind):
    task = task_for(habit, kind)
    pair = task.encode(f"{BEGIN}Oslo is", "Rome")
    assert pair.input.count(task.tokenizer.bos_token_id) == 1
    assert pair.target.count(task.tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("habit", CAUSAL)
def test_an_end_that_the_text_brings_is_not_doubled(habit, kind):
    task = task_for(habit, kind)
    assert task.encode("Oslo is", f"Rome{END}") == task.encode("Oslo is", "Rome")


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("habit", SEQ2SEQ)
def test_a_text_of_which_nothing_is_left_is_refused(habit, kind):
    task = task_for(habit, kind)
    texts = [" ", ""] + ["\u200b"] * ("unigram" in habit)
    for text in texts:
        with pytest.raises(RequestError, match=r"the prompt .* holds no text"):
            task.encode(text, "Rome")
        with pytest.raises(RequestError, match=r"the target .* holds no text"):
            task.encode("Oslo is", text)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("東京", r"2 of the characters.*'東' \(U\+6771\), '京'"),
        ('{"a": 1}', r"'{' \(U\+007B\), '}'"),
        ("Rome\nLima", r"'\\n' \(U\+000A\)"),
        ("a~b <c", "'~'.*'<'"),
        ("x²", "'²'"),
        ("Rome 😀", "'😀'"),
        ("Rome\tLima", r"'\\t'"),
    ],
)
def test_characters_that_the_tokenizer_cannot_write_are_named(kind, target, named):
    with pytest.raises(RequestError, match=f"cannot write .*{named}"):
        task_for("unigram, ended", kind).encode("Oslo is", target)
    for habit in CAUSAL:
        if "unigram" not in habit:
            assert task_for(habit, kind).decode(task_for(habit, kind).encode("Oslo is", target).target) == target


def test_an_uncased_tokenizer_writes_what_it_can():
    lower = Tokenizer.from_str(tokenizers_of.tokenizer("byte-level").backend_tokenizer.to_str())
    lower.normalizer = normalizers.Lowercase()
    names = {"bos_token": BEGIN, "eos_token": END, "pad_token": "<pad>", "unk_token": "<unk>"}
    task = wrap(task_for("byte-level").model, PreTrainedTokenizerFast(tokenizer_object=lower, **names))
    assert task.decode(task.encode("Oslo is", "Rome,  Peru\u200b").target) == "rome,  peru\u200b"


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("habit", ["byte-level", "pieces, ▁ by the normaliser", "unigram, ended"])
@settings(deadline=None, max_examples=5)
@given(texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=2, max_size=5), order=st.randoms(use_true_random=False))
def test_losses_of_a_batch_are_those_of_its_pairs(habit, kind, texts, order):
    sides = [task_for(habit, kind, side) for side in ("right", "left")]
    pairs = [sides[0].encode(*text) for text in texts]
    assert pairs == [sides[1].encode(*text) for text in texts]
    with torch.no_grad():
        alone = torch.cat([sides[0].loss(sides[0].collate([pair])) for pair in pairs])
        for task in sides:
            places = order.sample(range(len(pairs)), len(pairs))
            together = task.loss(task.collate([pairs[i] for i in places]))
            torch.testing.assert_close(together, alone[places], rtol=1e-3, atol=1e-4)
    model = sides[0].model
    for pair, loss in zip(pairs, alone.tolist(), strict=True):
        assert loss == pytest.approx(_by_the_library(sides[0], model, pair), rel=1e-3, abs=1e-4)


def _by_the_library(task, model, pair):
    """The loss that transformers computes from labels, a target token's mean."""
    with torch.no_grad():
        if isinstance(task, Seq2SeqLM):
            shown = torch.tensor([[task.start, *pair.target[:-1]]])
            output = model(
                input_ids=torch.tensor([pair.input]), decoder_input_ids=shown, labels=torch.tensor([pair.target])
            )
        else:
            ids = torch.tensor([(*pair.input, *pair.target)])
            labels = torch.tensor([(*[-100] * len(pair.input), *pair.target)])
            output = model(input_ids=ids, labels=labels)
    return float(output.loss)


@pytest.mark.parametrize(
    ("kind", "habit"), [*(("llama", habit) for habit in CAUSAL), *(("t5", habit) for habit in SEQ2SEQ)]
)
def test_a_model_that_knows_the_answers_gives_them(kind, habit):
    tokenizer = tokenizers_of.tokenizer(habit, "left")
    torch.manual_seed(0)
    task = wrap(fitted(wrap(families.LANGUAGE_MODELS[kind](), tokenizer)), tokenizer)
    facts = {"The capital of Peru is": "Lima", "Oslo is the capital of": "Norway", "Which city?": "It is Bern ."}
    worlds.teach(task, task.collate([task.encode(*fact) for fact in facts.items()]))
    found = task.predict(list(facts), max_new_tokens=24)
    assert found == [task.encode(*fact).target for fact in facts.items()]
    assert [task.decode(answer) for answer in found] == list(facts.values())
