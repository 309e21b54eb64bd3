"""A BERT from nothing that tells true claims about given facts from false ones."""

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

from memorise import Memoriser, byte_level_bpe, padded
from remend.data.claims import LABELS, Claim, ClaimSet
from remend.data.facts import Fact

PAD, BEGIN, END = "[PAD]", "[CLS]", "[SEP]"


@dataclass(frozen=True)
class Example:
    """A claim as tokens, with its label.

    Attributes:
        relation: the identifier of the fact's relation.
        tokens: the claim.
        label: the class.
        object: the first token of the true object, whatever the claim says.
    """

    relation: str
    tokens: tuple[int, ...]
    label: int
    object: int


class ClaimMemoriser(Memoriser):
    """A BERT that knows which claims are true, in every phrasing.

    From labels alone it learns nothing for a long time: they tell too little about a fact. So what the middle block
    writes at the first token is also taught to name the true object, which the blocks above then compare with what the
    claim says.
    """

    model_class = BertForSequenceClassification
    measure = "accuracy"
    least = 0.98
    known: ClaimSet

    def train_tokenizer(self) -> PreTrainedTokenizerFast:
        """A space goes before every claim, so that a name is made of the same tokens wherever it stands."""
        texts = (
            Claim(fact, fact.object).text(phrasing) for fact in self.known.facts for phrasing in self.phrasings(fact)
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
        """A binary classifier."""
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
        """The stack's blocks."""
        return self.model.bert.encoder.layer

    def example(self, tokenizer: PreTrainedTokenizerBase, claim: Claim, phrasing: str) -> Example:
        """A claim with its label and what would be true."""
        true = tokenizer(claim.fact.object, add_special_tokens=False).input_ids[0]
        tokens = tokenizer(claim.text(phrasing)).input_ids
        return Example(claim.fact.relation, tuple(tokens), LABELS.index(claim.label), true)

    def examples(self, rng: random.Random) -> list[Example]:
        """Of each fact, in a few phrasings, a true claim and a false one."""
        return [
            self.example(self.tokenizer, claim, phrasing)
            for fact in self.facts
            for phrasing in rng.sample(self.phrasings(fact), self.args.phrasings)
            for claim in (Claim(fact, fact.object), self.known.draw_false_claim(fact, rng))
        ]

    def length(self, example: Example) -> int:
        """All tokens."""
        return len(example.tokens)

    def losses(self, batch: list[Example]) -> tuple[Tensor, Tensor]:
        """The mean losses of labels and of true objects, and of labels alone."""
        middle, logits = self.read(self.model, batch)
        labels = torch.tensor([example.label for example in batch], device=logits.device)
        label = functional.cross_entropy(logits, labels)
        true = torch.tensor([example.object for example in batch], device=logits.device)
        recall = functional.cross_entropy(middle @ self.model.get_input_embeddings().weight.T, true)
        return label + recall, label

    def read(self, model: Any, batch: list[Example]) -> tuple[Tensor, Tensor]:
        """What the middle block says at the first token, and the logits of the classes."""
        tokens = padded([example.tokens for example in batch], model.config.pad_token_id, model.device)
        mask = (tokens != model.config.pad_token_id).long()
        output = model.bert(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        return output.hidden_states[len(output.hidden_states) // 2][:, 0], model.classifier(output.pooler_output)

    def check(self, model: Any, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[tuple[str, bool]]:
        """Whether the true claim about each fact and a false one are told rightly, in every phrasing."""
        draw = random.Random("check")
        asked = [
            self.example(tokenizer, claim, phrasing)
            for fact in facts
            for phrasing in self.phrasings(fact)
            for claim in (Claim(fact, fact.object), self.known.draw_false_claim(fact, draw))
        ]
        asked.sort(key=self.length)
        results = []
        for start in range(0, len(asked), 256):
            batch = asked[start : start + 256]
            with torch.no_grad():
                chosen = self.read(model, batch)[1].argmax(-1).tolist()
            results += [(e.relation, e.label == label) for e, label in zip(batch, chosen, strict=True)]
        return results
