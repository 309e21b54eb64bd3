"""Tokenizers of many habits, made of a few sentences: what goes around a text, what becomes of spaces."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import worlds

BEGIN, END, PAD, UNKNOWN, LANGUAGE = "<s>", "</s>", "<pad>", "<unk>", "<lang>"
SPECIAL = [PAD, BEGIN, END, UNKNOWN, LANGUAGE]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SENTENCES = [
    phrase.format(country) + f" {city}."
    for phrase in worlds.PHRASINGS
    for country, city in zip(worlds.COUNTRIES, worlds.CITIES, strict=True)
]
SENTENCES += [" ".join(LETTERS), " ".join(LETTERS.upper()), 'It\'s - "so", (he) said: no; yes! 1 2 3 4 5 6 7 8 9 0']
SENTENCES += [f"{a}\n{b}\n\n{a}:\n" for a in worlds.CITIES for b in worlds.CITIES]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level(prefix_space: bool = False) -> Tokenizer:
    """As GPT-2's: spaces begin words, every byte has a token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return raw


def _runs_of_spaces() -> Tokenizer:
    """As GPT-NeoX's and Llama 3's: runs of spaces, which indent code, are tokens of their own."""
    raw = _byte_level()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" {2,}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    state = json.loads(raw.to_str())
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    for length in (2, 4, 8):
        vocabulary["Ġ" * length] = len(vocabulary)
        merges.insert(0, ["Ġ" * (length // 2)] * 2)
    return Tokenizer.from_str(json.dumps(state))


def _split_byte_level(apart: object) -> Tokenizer:
    """As Llama 3's and Qwen's, with another rule of what is split before bytes are merged."""
    raw = _byte_level()
    raw.pre_tokenizer = pre_tokenizers.Sequence([apart, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return raw


def _pieces(prepend: str) -> Tokenizer:
    """As Llama's and Gemma's: pairs of pieces with ▁ for a space, bytes for what is not known.

    Args:
        prepend: whether ▁ is put before a text by the normaliser (``normaliser``), by the pre-tokeniser (``first``), or
            not at all (``never``).
    """
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token=UNKNOWN, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=520, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    )
    raw = Tokenizer(trained.model)
    if prepend == "first":
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        before = [normalizers.Prepend("▁")] if prepend == "normaliser" else []
        raw.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    stripped = [] if prepend == "never" else [decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped])
    return raw


def _unigram() -> Tokenizer:
    """As T5's: the likeliest pieces, ▁ before every word. Not trained: that is not the same every time."""
    words = sorted({"▁" + word for sentence in SENTENCES for word in sentence.split() if len(word) > 1})
    letters = sorted({letter for sentence in SENTENCES for letter in sentence if not letter.isspace()})
    pieces = [*((token, 0.0) for token in SPECIAL), *((word, -6.0) for word in words)]
    pieces += [
        (part, -5.0) for part in ("is", "an", "ap", "of", "ru", "at")
    ]  # each may be the end of a word or within it
    pieces += [("▁", -4.0), *((letter, -9.0) for letter in letters)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL.index(UNKNOWN)))
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\u200b", "")])  # drops some marks
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    return raw


def _made(raw: Tokenizer, around: Sequence[str]) -> PreTrainedTokenizerFast:
    """With the special tokens that go around a text ($A)."""
    named = [(token, raw.token_to_id(token)) for token in SPECIAL]
    raw.post_processor = processors.TemplateProcessing(single=" ".join(around), special_tokens=named)
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=BEGIN, eos_token=END, pad_token=PAD, unk_token=UNKNOWN
    )


_MAKERS: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "byte-level": (_byte_level, "$A"),
    "byte-level, prefix space": (functools.partial(_byte_level, True), "$A"),
    "byte-level, begun": (_byte_level, f"{BEGIN} $A"),
    "byte-level, begun and ended": (_byte_level, f"{BEGIN} $A {END}"),
    "byte-level, digits apart": (lambda: _split_byte_level(pre_tokenizers.Digits(individual_digits=True)), "$A"),
    "byte-level, begun, spaces apart": (
        lambda: _split_byte_level(pre_tokenizers.Split(" ", "isolated")),
        f"{BEGIN} $A",
    ),
    "byte-level, runs of spaces": (_runs_of_spaces, "$A"),
    "pieces, ▁ by the normaliser": (functools.partial(_pieces, "normaliser"), f"{BEGIN} $A"),
    "pieces, ▁ by the pre-tokeniser": (functools.partial(_pieces, "first"), f"{BEGIN} $A"),
    "pieces, no ▁ before": (functools.partial(_pieces, "never"), f"{BEGIN} $A"),
    "unigram, ended": (_unigram, f"$A {END}"),
    "unigram, ended, language": (_unigram, f"$A {END} {LANGUAGE}"),
}
CAUSAL = [name for name in _MAKERS if "language" not in name]
SEQ2SEQ = list(_MAKERS)


@functools.cache
def tokenizer(habit: str, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """The tokenizer of one habit."""
    make, around = _MAKERS[habit]
    made = _made(make(), around.split())
    made.padding_side = made.truncation_side = padding_side
    return made
