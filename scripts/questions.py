"""A T5 from nothing that answers questions about given facts: the encoder reads a question, the decoder answers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from memorise import Memoriser, byte_level_bpe, padded
from remend.data.facts import Fact

PAD, END = "<pad>", "</s>"
IGNORED = -100


@dataclass(frozen=True)
class Question:
    """A question and its answer, as tokens; both end with the end token, as T5's do."""

    relation: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class QuestionMemoriser(Memoriser):
    """A T5 that knows the object of each fact in every phrasing of the question."""

    model_class = T5ForConditionalGeneration
    least = 0.98

    def train_tokenizer(self) -> PreTrainedTokenizerFast:
        """A space goes before every text, so that a name is made of the same tokens wherever it stands."""
        texts = (
            text
            for fact in self.known.facts
            for phrasing in self.phrasings(fact)
            for text in (phrasing.format(fact.subject), fact.object)
        )
        raw = byte_level_bpe(texts, self.args.vocabulary, (PAD, END), prefix_space=True)
        raw.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, raw.token_to_id(END))]
        )
        return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=END, model_max_length=128)

    def build(self) -> Any:
        """As many blocks in the encoder as in the decoder."""
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(self.tokenizer),
                d_model=self.args.width,
                d_kv=self.args.width // self.args.heads,
                d_ff=4 * self.args.width,
                num_layers=self.args.layers,
                num_heads=self.args.heads,
                dropout_rate=0.0,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                decoder_start_token_id=self.tokenizer.pad_token_id,
            )
        )

    def blocks(self) -> Iterable[nn.Module]:
        """All linear layers of both stacks; the table of relative positions is none."""
        stacks = (self.model.encoder.block, self.model.decoder.block)
        return [module for stack in stacks for module in stack.modules() if isinstance(module, nn.Linear)]

    def ask(self, tokenizer: PreTrainedTokenizerBase, fact: Fact, phrasing: str) -> Question:
        """A question about a fact."""
        prompt, answer = tokenizer(phrasing.format(fact.subject)).input_ids, tokenizer(fact.object).input_ids
        return Question(fact.relation, tuple(prompt), tuple(answer))

    def examples(self, rng: random.Random) -> list[Question]:
        """Each fact in a few phrasings rather than all: what is learnt in one soon holds in the others."""
        return [
            self.ask(self.tokenizer, fact, phrasing)
            for fact in self.facts
            for phrasing in rng.sample(self.phrasings(fact), self.args.phrasings)
        ]

    def length(self, example: Question) -> int:
        """The encoder's part, where most of the work is."""
        return len(example.prompt)

    def losses(self, batch: list[Question]) -> tuple[Tensor, Tensor]:
        """The mean loss of the answers' tokens."""
        logits, labels = self.read(self.model, batch)
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return loss, loss

    def read(self, model: Any, batch: list[Question]) -> tuple[Tensor, Tensor]:
        """The logits of the answers' tokens, given those before, and the tokens."""
        pad = model.config.pad_token_id
        prompts = padded([question.prompt for question in batch], pad, model.device)
        labels = padded([question.answer for question in batch], IGNORED, model.device)
        return model(input_ids=prompts, attention_mask=(prompts != pad).long(), labels=labels).logits, labels

    def check(self, model: Any, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[tuple[str, bool]]:
        """Whether greedy decoding gives exactly the object and then the end token.

        It does exactly when each token of the answer, given those before, is the likeliest one.
        """
        asked = [self.ask(tokenizer, fact, phrasing) for fact in facts for phrasing in self.phrasings(fact)]
        asked.sort(key=self.length)
        results = []
        for start in range(0, len(asked), 256):
            batch = asked[start : start + 256]
            with torch.no_grad():
                logits, labels = self.read(model, batch)
            right = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
            results += [(question.relation, hit) for question, hit in zip(batch, right.tolist(), strict=True)]
        return results
