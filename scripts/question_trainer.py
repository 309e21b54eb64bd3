"""Train a T5 from scratch to answer questions about given facts: the encoder reads a question, the decoder answers."""

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

from base_trainer import FactTrainer, byte_level_bpe, padded
from remend.data.fact_requests import Fact

PAD, END = "<pad>", "</s>"
IGNORED_LABEL = -100
"""The label that the cross-entropy ignores."""


@dataclass(frozen=True)
class Question:
    """A question and its answer, as tokens; both end with the end token, as T5's do."""

    relation: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class QuestionTrainer(FactTrainer):
    """Trains a T5 that knows the object of each fact in every phrasing of the question."""

    model_class = T5ForConditionalGeneration
    min_accuracy = 0.98

    def train_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer that puts a space before every text, so that a name has the same tokens in all places."""
        texts = (
            text
            for fact in self.fact_set.facts
            for phrasing in self.phrasings(fact)
            for text in (phrasing.format(fact.subject), fact.object)
        )
        raw = byte_level_bpe(texts, self.args.vocabulary, (PAD, END), prefix_space=True)
        raw.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, raw.token_to_id(END))]
        )
        return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=END, model_max_length=128)

    def build(self) -> Any:
        """Return a T5 with as many blocks in the encoder as in the decoder."""
        # It begins answers with the padding token, but the configuration's signature does not name that setting.
        start: dict[str, Any] = {"decoder_start_token_id": self.tokenizer.pad_token_id}
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
                **start,
            )
        )

    def blocks(self) -> Iterable[nn.Module]:
        """Return all linear layers of both stacks, without the table of relative positions, which is an embedding."""
        stacks = (self.model.encoder.block, self.model.decoder.block)
        return [module for stack in stacks for module in stack.modules() if isinstance(module, nn.Linear)]

    def encode(self, tokenizer: PreTrainedTokenizerBase, fact: Fact, phrasing: str) -> Question:
        """Return a question about a fact with its answer."""
        prompt, answer = tokenizer(phrasing.format(fact.subject)).input_ids, tokenizer(fact.object).input_ids
        return Question(fact.relation, tuple(prompt), tuple(answer))

    def examples(self, rng: random.Random) -> list[Question]:
        """Return each fact in a few phrasings."""
        # A few rather than all, since what is learnt in one phrasing soon holds in the others.
        return [
            self.encode(self.tokenizer, fact, phrasing)
            for fact in self.facts
            for phrasing in rng.sample(self.phrasings(fact), self.args.phrasings)
        ]

    def length(self, example: Question) -> int:
        """Return the number of the encoder's tokens, where most of the work is."""
        return len(example.prompt)

    def losses(self, batch: list[Question]) -> tuple[Tensor, Tensor]:
        """Return the mean loss of the answers' tokens, twice."""
        logits, labels = self.logits_and_labels(self.model, batch)
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
        return loss, loss

    def logits_and_labels(self, model: Any, batch: list[Question]) -> tuple[Tensor, Tensor]:
        """Return the logits of the answers' tokens, given those before, and the tokens."""
        pad = model.config.pad_token_id
        prompts = padded([question.prompt for question in batch], pad, model.device)
        labels = padded([question.answer for question in batch], IGNORED_LABEL, model.device)
        return model(input_ids=prompts, attention_mask=(prompts != pad).long(), labels=labels).logits, labels

    def check(self, model: Any, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[tuple[str, bool]]:
        """Return for each phrasing of each fact whether greedy decoding gives the object and then the end token."""
        # It does exactly when each token of the answer, given those before, is the likeliest one.
        questions = [self.encode(tokenizer, fact, phrasing) for fact in facts for phrasing in self.phrasings(fact)]
        questions.sort(key=self.length)
        results = []
        for start in range(0, len(questions), 256):
            batch = questions[start : start + 256]
            with torch.no_grad():
                logits, labels = self.logits_and_labels(model, batch)
            correct = ((logits.argmax(-1) == labels) | (labels == IGNORED_LABEL)).all(1)
            results += [(question.relation, hit) for question, hit in zip(batch, correct.tolist(), strict=True)]
        return results
