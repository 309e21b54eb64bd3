"""Train a BERT from scratch to tell true claims about given facts from false ones."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from base_trainer import FactTrainer, byte_level_bpe, padded
from remend.data.atlas_claims import LABELS, Claim, ClaimSet
from remend.data.fact_requests import Fact

PAD, BEGIN, END = "[PAD]", "[CLS]", "[SEP]"


@dataclass(frozen=True)
class Example:
    """A claim as tokens, with its label.

    Attributes:
        relation: the identifier of the fact's relation.
        tokens: the claim.
        label: the class.
        true_object: the first token of the true object, in false claims too.
    """

    relation: str
    tokens: tuple[int, ...]
    label: int
    true_object: int


class ClaimTrainer(FactTrainer):
    """Trains a BERT that knows which claims are true, in every phrasing.

    From labels alone it learns nothing for a long time, since a label says too little about a fact. So the hidden state
    of the middle block at the first token is also trained to predict the true object, which the blocks above can then
    compare with the claimed one.
    """

    model_class = BertForSequenceClassification
    measure = "accuracy"
    min_accuracy = 0.98
    fact_set: ClaimSet

    def train_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer that puts a space before every claim, so that a name has the same tokens in all places."""
        texts = (
            Claim(fact, fact.object).text(phrasing) for fact in self.fact_set.facts for phrasing in self.phrasings(fact)
        )
        raw = byte_level_bpe(texts, self.args.vocabulary, (PAD, BEGIN, END), prefix_space=True)
        raw.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A {END}", special_tokens=[(name, raw.token_to_id(name)) for name in (BEGIN, END)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=raw,
            pad_token=PAD,
            cls_token=BEGIN,
            sep_token=END,
            model_max_length=64,
            model_input_names=["input_ids", "attention_mask"],
        )

    def build(self) -> Any:
        """Return a binary classifier."""
        config = BertConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=self.args.width,
            num_hidden_layers=self.args.layers,
            num_attention_heads=self.args.heads,
            intermediate_size=4 * self.args.width,
            max_position_embeddings=64,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=self.tokenizer.pad_token_id,
            id2label=dict(enumerate(LABELS)),
            label2id={label: number for number, label in enumerate(LABELS)},
        )
        return BertForSequenceClassification(config)

    def blocks(self) -> Iterable[nn.Module]:
        """Return the encoder's blocks."""
        blocks: Iterable[nn.Module] = self.model.bert.encoder.layer
        return blocks

    def encode(self, tokenizer: PreTrainedTokenizerBase, claim: Claim, phrasing: str) -> Example:
        """Return a claim as tokens, with its label and the true object."""
        true_object = tokenizer(claim.fact.object, add_special_tokens=False).input_ids[0]
        tokens = tokenizer(claim.text(phrasing)).input_ids
        return Example(claim.fact.relation, tuple(tokens), LABELS.index(claim.label), true_object)

    def examples(self, rng: random.Random) -> list[Example]:
        """Return a true and a false claim about each fact, in a few phrasings."""
        return [
            self.encode(self.tokenizer, claim, phrasing)
            for fact in self.facts
            for phrasing in rng.sample(self.phrasings(fact), self.args.phrasings)
            for claim in (Claim(fact, fact.object), self.fact_set.draw_false_claim(fact, rng))
        ]

    def length(self, example: Example) -> int:
        """Return the number of tokens."""
        return len(example.tokens)

    def losses(self, batch: list[Example]) -> tuple[Tensor, Tensor]:
        """Return the mean loss of labels and true objects together, and of labels alone."""
        hidden, logits = self.forward(self.model, batch)
        labels = torch.tensor([example.label for example in batch], device=logits.device)
        label_loss = functional.cross_entropy(logits, labels)
        true_objects = torch.tensor([example.true_object for example in batch], device=logits.device)
        object_loss = functional.cross_entropy(hidden @ self.model.get_input_embeddings().weight.T, true_objects)
        return label_loss + object_loss, label_loss

    def forward(self, model: Any, batch: list[Example]) -> tuple[Tensor, Tensor]:
        """Return the hidden state of the middle block at the first token, and the logits of the classes."""
        tokens = padded([example.tokens for example in batch], model.config.pad_token_id, model.device)
        mask = (tokens != model.config.pad_token_id).long()
        output = model.bert(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        return output.hidden_states[len(output.hidden_states) // 2][:, 0], model.classifier(output.pooler_output)

    def check(self, model: Any, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[tuple[str, bool]]:
        """Return whether the true claim and a false one about each fact are classified rightly, in every phrasing."""
        rng = random.Random("check")
        examples = [
            self.encode(tokenizer, claim, phrasing)
            for fact in facts
            for phrasing in self.phrasings(fact)
            for claim in (Claim(fact, fact.object), self.fact_set.draw_false_claim(fact, rng))
        ]
        examples.sort(key=self.length)
        results = []
        for start in range(0, len(examples), 256):
            batch = examples[start : start + 256]
            with torch.no_grad():
                predictions = self.forward(model, batch)[1].argmax(-1).tolist()
            results += [
                (example.relation, example.label == label) for example, label in zip(batch, predictions, strict=True)
            ]
        return results
