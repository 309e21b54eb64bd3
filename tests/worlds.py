"""Tiny models with a tokenizer, and requests they can be edited with. Random, small and made in milliseconds."""

from __future__ import annotations

import functools
import itertools
import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from remend.request import EditRequest, Probe
from remend.tasks import wrap
from remend.tasks.base import Batch, Task

CITIES = ["Paris", "Rome", "Oslo", "Bern", "Lima", "Cairo", "Delhi", "Quito", "Sofia", "Tunis"]
COUNTRIES = ["France", "Italy", "Norway", "Switzerland", "Peru", "Egypt", "India", "Ecuador", "Bulgaria", "Tunisia"]
PHRASINGS = ["The capital of {} is", "{} has the capital", "Which city rules {} ? It is"]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokens over a word list: a leading space belongs to its word, as in GPT-2."""
    words = {"The", "capital", "of", "is", "has", "the", "Which", "city", "rules", "?", "It", *CITIES, *COUNTRIES}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in sorted(words):
        for form in (word, "Ġ" + word):
            built = form[0]
            for letter in form[1:]:
                if built + letter not in vocabulary:
                    vocabulary[built + letter] = len(vocabulary)
                    merges.append((built, letter))
                built += letter
    for special in ("<|end|>", "<|pad|>"):
        vocabulary[special] = len(vocabulary)
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>")


@functools.cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words between [CLS] and [SEP], as in BERT."""
    words = {word for phrasing in PHRASINGS for word in phrasing.split()} - {"{}"}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *sorted({*words, *CITIES, *COUNTRIES})])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, model_input_names=inputs, **names)


CHAT_TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n"
        "{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
    ),
    "llama-2": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% else %}"
        "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
    ),
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
"""Templates as chat models have them."""


@functools.cache
def chat_tokenizer(style: str = "chatml") -> PreTrainedTokenizerFast:
    """The same tokens with those of a chat template; a beginning token, as Llama's templates write, begins a text."""
    raw = type(tokenizer().backend_tokenizer).from_str(tokenizer().backend_tokenizer.to_str())
    marks = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>"]
    raw.add_special_tokens(marks)
    raw.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", raw.token_to_id("<|begin|>"))]
    )
    chat = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|begin|>", eos_token="<|end|>")
    chat.chat_template = CHAT_TEMPLATES[style]
    return chat


def chat_model(seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random Llama with the chat tokenizer's vocabulary, and context enough for a conversation."""
    return llama(seed, vocab_size=len(chat_tokenizer()), max_position_embeddings=128, **changes)


def gpt2(seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random GPT-2 (``Conv1D`` layers) of four blocks."""
    torch.manual_seed(seed)
    settings = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 48, "vocab_size": len(tokenizer())}
    special = {"bos_token_id": tokenizer().eos_token_id, "eos_token_id": tokenizer().eos_token_id}
    return _sharpened(GPT2LMHeadModel(GPT2Config(**{**settings, **special, **changes})))


def llama(seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random Llama (``Linear`` layers, gated MLP) of four blocks."""
    torch.manual_seed(seed)
    settings = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 1, "max_position_embeddings": 48, "vocab_size": len(tokenizer())}
    special = {"bos_token_id": tokenizer().eos_token_id, "eos_token_id": tokenizer().eos_token_id}
    return _sharpened(LlamaForCausalLM(LlamaConfig(**{**settings, **special, **changes})))


FAMILIES = {"gpt2": gpt2, "llama": llama}


def _sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """Weights ten times their initial size: a fresh model answers all prompts alike, and an edit would hardly show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model.eval()


def chat_requests(count: int = 12) -> list[EditRequest]:
    """The same requests as conversations of one message."""
    chats = []
    for request in requests(count):
        fields = request.to_json()
        messages = [{"role": "user", "content": fields.pop("prompt")}]
        chats.append(EditRequest.model_validate_json(json.dumps({"messages": messages, **fields})))
    return chats


def requests(count: int = 12) -> list[EditRequest]:
    """Requests about different countries (first ``len(COUNTRIES)``), then again with other targets."""
    edit_requests = []
    for number, (shift, i) in enumerate(itertools.product(range(1, 9), range(len(COUNTRIES)))):
        if number == count:
            break
        far = (i + 3) % len(COUNTRIES)
        edit_requests.append(
            EditRequest(
                prompt=PHRASINGS[0].format(COUNTRIES[i]),
                target=CITIES[(i + shift) % len(CITIES)],
                subject=COUNTRIES[i],
                id=number,
                paraphrases=(PHRASINGS[1].format(COUNTRIES[i]),),
                unseen_paraphrases=(PHRASINGS[2].format(COUNTRIES[i]),),
                locality=(Probe(prompt=PHRASINGS[1].format(COUNTRIES[far]), target=CITIES[far]),),
                near=(Probe(prompt=PHRASINGS[0].format(COUNTRIES[far]), target=CITIES[far]),),
            )
        )
    return edit_requests


def teach(task: Task, batch: Batch, steps: int = 200) -> None:
    """Train a task's model until its first choice is the right one at each target token of a batch."""
    model = task.model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        losses = torch.nn.functional.cross_entropy(task.outputs(batch), batch.target, reduction="none")
        if losses.max() < 0.5:  # below log 2, the target is more likely than all else together
            break
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


def task(model, processor=None):
    """The task of a model, with the tokenizer that suits all of them."""
    return wrap(model, processor or tokenizer())
