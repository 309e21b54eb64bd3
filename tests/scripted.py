"""A language model whose every answer is written down, before and after any edits: what metrics say of it is known."""

import functools
import math

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from remend.core.low_rank import LowRank
from remend.edit import Edit
from remend.fingerprint import ModelFingerprint
from remend.tasks import wrap

EDITS = 4
SURE = 0.9
"""The probability of what the model says next."""
END = "<end>"


class ScriptedConfig(PretrainedConfig):
    model_type = "scripted"


class Scripted(PreTrainedModel):
    """Says what ``script(prompt, edits)`` says, where ``edits`` are the numbers of the edits at work.

    An edit is told by what the one editable layer gives for a constant input: edit k adds 1 to its k-th output.
    """

    config_class = ScriptedConfig

    def __init__(self, config, script, tokenizer):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, 1)
        self.switch = nn.Linear(1, EDITS, bias=False)
        self.head = nn.Linear(config.vocab_size, config.vocab_size, bias=False)
        self.script, self.words = script, tokenizer
        with torch.no_grad():
            self.switch.weight.zero_()
            self.head.weight.copy_(torch.eye(config.vocab_size))
        self.boost = math.log(SURE / (1 - SURE) * (config.vocab_size - 1))

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=None, past_key_values=None):
        rows, length = input_ids.shape
        bits = self.switch(torch.ones(rows, 1, 1))[:, 0] > 0.5
        hidden = torch.zeros(rows, length, self.config.vocab_size)
        for row in range(rows):
            edits = frozenset(torch.nonzero(bits[row])[:, 0].tolist())
            words = self.words.convert_ids_to_tokens(input_ids[row].tolist())
            for place in range(length):
                said = self.next_word(words[: place + 1], edits)
                hidden[row, place, self.words.convert_tokens_to_ids(said)] = self.boost
        return CausalLMOutput(logits=self.head(hidden))

    def next_word(self, words, edits):
        """The next word of the answer to the longest prompt that begins the text; of none, the end."""
        for length in range(len(words), 0, -1):
            answer = self.script.get(" ".join(words[:length]))
            if answer is not None:
                said = [*(answer(edits) if callable(answer) else answer).split(), END]
                return said[min(len(words) - length, len(said) - 1)]
        return END


@functools.cache
def tokenizer(vocabulary):
    table = {word: number for number, word in enumerate((END, *vocabulary))}
    raw = Tokenizer(models.WordLevel(table, unk_token=END))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=END)


def model(script, vocabulary, context=32):
    """The model with its tokenizer, as a task; ``script`` says the answer to each prompt, or how edits change it."""
    words = tokenizer(vocabulary)
    config = ScriptedConfig(vocab_size=len(words), max_position_embeddings=context, pad_token_id=0, eos_token_id=0)
    return wrap(Scripted(config, script, words).eval(), words)


class Numbered:
    """Makes the edit that a request's id is the number of."""

    def edit(self, task, requests):
        delta = torch.stack([torch.eye(EDITS)[request.id] for request in requests])
        changes = {"switch": LowRank(torch.ones(len(requests), 1), delta)}
        return Edit(changes, ModelFingerprint.of(task.model, changes), tuple(requests))

    def edit_each(self, task, requests):
        return [self.edit(task, [request]) for request in requests]
