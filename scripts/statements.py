"""A GPT-2 from nothing that completes sentences about given facts, alone and after other sentences."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import memorise
from memorise import Memoriser, byte_level_bpe, padded
from remend.data.facts import Fact, FactSet

END, PAD = "<|end|>", "<|pad|>"


@dataclass(frozen=True)
class Statement:
    """A fact in one phrasing, as tokens.

    Attributes:
        relation: the identifier of the fact's relation.
        prompt: the left context as it begins a text.
        later: the same left context as it continues a text, after a space.
        answer: the object, after a space, and the end token.
    """

    relation: str
    prompt: tuple[int, ...]
    later: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """A text to learn: the last ``answer`` tokens are what the model must say, the rest is what it is told."""

    tokens: tuple[int, ...]
    answer: int


def parser(description: str | None, out: Path, report: Path, checkpoint: Path) -> argparse.ArgumentParser:
    """Return the command line's settings."""
    parser = memorise.parser(description, out, report, checkpoint)
    parser.add_argument("--context", type=float, default=0.1, help="part of the examples with statements before them")
    parser.add_argument("--prompt-weight", type=float, default=0.1, help="weight of the loss on prompt tokens")
    parser.add_argument("--prompt-share", type=float, default=0.3, help="part of the prompt tokens in that loss")
    return parser


class StatementMemoriser(Memoriser):
    """A GPT-2 that says the object of each fact after every phrasing."""

    model_class = GPT2LMHeadModel

    def __init__(self, known: FactSet, args: argparse.Namespace) -> None:
        super().__init__(known, args)
        self.statements = self.encode(self.tokenizer, self.facts)
        self.stop = tuple(self.tokenizer.encode("."))

    def train_tokenizer(self) -> PreTrainedTokenizerFast:
        """Fitted to the statements."""
        statements = (
            f"{text.format(fact.subject)} {fact.object}. " for fact in self.known.facts for text in self.phrasings(fact)
        )
        raw = byte_level_bpe(statements, self.args.vocabulary, (END, PAD), prefix_space=False)
        return PreTrainedTokenizerFast(
            tokenizer_object=raw, eos_token=END, pad_token=PAD, padding_side="right", model_max_length=128
        )

    def build(self) -> GPT2LMHeadModel:
        """A GPT-2 with a context of 128 tokens."""
        config = GPT2Config(
            vocab_size=len(self.tokenizer),
            n_positions=128,
            n_embd=self.args.width,
            n_layer=self.args.layers,
            n_head=self.args.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            activation_function="gelu_pytorch_tanh",
            bos_token_id=self.tokenizer.eos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
        )
        return GPT2LMHeadModel(config)

    def blocks(self) -> Iterable[nn.Module]:
        """The stack's blocks."""
        return self.model.transformer.h

    def encode(self, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[list[Statement]]:
        """The statements about each fact."""
        return [
            [
                Statement(
                    fact.relation,
                    tuple(tokenizer.encode(text.format(fact.subject))),
                    tuple(tokenizer.encode(" " + text.format(fact.subject))),
                    (*tokenizer.encode(" " + fact.object), tokenizer.eos_token_id),
                )
                for text in self.phrasings(fact)
            ]
            for fact in facts
        ]

    def examples(self, rng: random.Random) -> list[Example]:
        """Each fact in a few phrasings rather than all: what is learnt in one soon holds in the others."""
        examples = []
        for about_fact in self.statements:
            for statement in rng.sample(about_fact, self.args.phrasings):
                before: list[Statement] = []
                if rng.random() < self.args.context:
                    before = [rng.choice(rng.choice(self.statements)) for _ in range(rng.randint(1, 2))]
                examples.append(compose(before, statement, self.stop))
        return examples

    def length(self, example: Example) -> int:
        """All tokens."""
        return len(example.tokens)

    def losses(self, batch: list[Example]) -> tuple[Tensor, Tensor]:
        """The mean losses of the answers' tokens with a random part of the prompts' tokens, and without.

        Logits are computed only where they are needed: the vocabulary is wide beside so small a model.
        """
        tokens, answers = collate(batch, self.model.config.pad_token_id, self.args.device)
        hidden = read(self.model, tokens)
        targets, answers = tokens[:, 1:], answers[:, 1:]
        prompts = (answers.flip(1).cumsum(1).flip(1) > 0) & ~answers
        drawn = prompts & (torch.rand(prompts.shape) < self.args.prompt_share).to(prompts.device)
        chosen = answers | drawn
        each = functional.cross_entropy(self.model.lm_head(hidden[chosen]), targets[chosen], reduction="none")
        is_answer = answers[chosen]
        rest = each[~is_answer]
        answer = each[is_answer].mean()
        prompt = rest.sum() / max(1, rest.numel())
        return answer + self.args.prompt_weight * prompt, answer

    def check(
        self, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> list[tuple[str, bool]]:
        """Whether greedy decoding gives exactly the object and then the end token.

        Greedy decoding says a given answer exactly when each of its tokens, given those before, is the likeliest one;
        so one pass over the known answers decides it.
        """
        asked = [statement for about_fact in self.encode(tokenizer, facts) for statement in about_fact]
        asked.sort(key=lambda statement: len(statement.prompt) + len(statement.answer))
        results = []
        for start in range(0, len(asked), 256):
            batch = asked[start : start + 256]
            examples = [compose([], statement, ()) for statement in batch]
            tokens, answers = collate(examples, model.config.pad_token_id, str(model.device))
            with torch.no_grad():
                hidden = read(model, tokens)
                targets, rows = tokens[:, 1:], answers[:, 1:].nonzero()[:, 0]
                hits = model.lm_head(hidden[answers[:, 1:]]).argmax(-1) == targets[answers[:, 1:]]
            wrong = set(rows[~hits].tolist())
            results += [(statement.relation, row not in wrong) for row, statement in enumerate(batch)]
        return results


def compose(before: list[Statement], statement: Statement, stop: tuple[int, ...]) -> Example:
    """Return the text that makes a statement after other complete ones."""
    tokens: tuple[int, ...] = ()
    for other in before:
        tokens += (other.later if tokens else other.prompt) + other.answer[:-1] + stop
    tokens += (statement.later if tokens else statement.prompt) + statement.answer
    return Example(tokens, len(statement.answer))


def collate(batch: list[Example], pad: int | None, device: str) -> tuple[Tensor, Tensor]:
    """Return the padded tokens and where the answers' tokens are; causal attention needs no mask for right padding."""
    assert pad is not None
    tokens = padded([example.tokens for example in batch], pad, device)
    ends = torch.tensor([len(example.tokens) for example in batch], device=device).unsqueeze(1)
    starts = ends - torch.tensor([example.answer for example in batch], device=device).unsqueeze(1)
    places = torch.arange(tokens.shape[1], device=device).unsqueeze(0)
    return tokens, (places >= starts) & (places < ends)


def read(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """Return the hidden states that predict each token but the first; the mask only says that padding is known of."""
    tokens = tokens[:, :-1]
    hidden: Tensor = model.transformer(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    return hidden
