"""Train a GPT-2 from scratch to complete sentences about given facts, alone and after other sentences."""

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

import base_trainer
from base_trainer import FactTrainer, byte_level_bpe, padded
from remend.data.fact_requests import Fact, FactSet

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
    """A training text, of which the last ``answer`` tokens are the answer and the others the prompt."""

    tokens: tuple[int, ...]
    answer: int


def parser(description: str | None, out: Path, report: Path, checkpoint: Path) -> argparse.ArgumentParser:
    """Return the command line's settings."""
    parser = base_trainer.parser(description, out, report, checkpoint)
    parser.add_argument(
        "--context", type=float, default=0.1, help="share of the examples with other statements before them"
    )
    parser.add_argument("--prompt-weight", type=float, default=0.1, help="weight of the loss on prompt tokens")
    parser.add_argument("--prompt-share", type=float, default=0.3, help="share of the prompt tokens in that loss")
    return parser


class StatementTrainer(FactTrainer):
    """Trains a GPT-2 that gives the object of each fact after every phrasing."""

    model_class = GPT2LMHeadModel

    def __init__(self, fact_set: FactSet, args: argparse.Namespace) -> None:
        super().__init__(fact_set, args)
        self.statements = self.encode(self.tokenizer, self.facts)
        self.stop = tuple(self.tokenizer.encode("."))

    def train_tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer fitted to the statements."""
        statements = (
            f"{text.format(fact.subject)} {fact.object}. "
            for fact in self.fact_set.facts
            for text in self.phrasings(fact)
        )
        raw = byte_level_bpe(statements, self.args.vocabulary, (END, PAD), prefix_space=False)
        return PreTrainedTokenizerFast(
            tokenizer_object=raw, eos_token=END, pad_token=PAD, padding_side="right", model_max_length=128
        )

    def build(self) -> GPT2LMHeadModel:
        """Return a GPT-2 with a context of 128 tokens."""
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
        """Return the transformer's blocks."""
        blocks: Iterable[nn.Module] = self.model.transformer.h
        return blocks

    def encode(self, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[list[Statement]]:
        """Return the statements about each fact, one for each phrasing."""
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
        """Return each fact in a few phrasings, sometimes after other statements."""
        # A few rather than all, since what is learnt in one phrasing soon holds in the others.
        examples = []
        for about_fact in self.statements:
            for statement in rng.sample(about_fact, self.args.phrasings):
                before: list[Statement] = []
                if rng.random() < self.args.context:
                    before = [rng.choice(rng.choice(self.statements)) for _ in range(rng.randint(1, 2))]
                examples.append(compose(before, statement, self.stop))
        return examples

    def length(self, example: Example) -> int:
        """Return the number of tokens."""
        return len(example.tokens)

    def losses(self, batch: list[Example]) -> tuple[Tensor, Tensor]:
        """Return the mean loss of the answers' tokens with a random share of the prompts' tokens, and without."""
        # Logits are computed only where they are needed: the vocabulary is large for so small a model.
        tokens, answers = collate(batch, self.model.config.pad_token_id, self.args.device)
        hidden = hidden_states(self.model, tokens)
        targets, answers = tokens[:, 1:], answers[:, 1:]
        prompts = (answers.flip(1).cumsum(1).flip(1) > 0) & ~answers
        sampled = prompts & (torch.rand(prompts.shape) < self.args.prompt_share).to(prompts.device)
        selected = answers | sampled
        losses = functional.cross_entropy(self.model.lm_head(hidden[selected]), targets[selected], reduction="none")
        is_answer = answers[selected]
        prompt_losses = losses[~is_answer]
        answer = losses[is_answer].mean()
        prompt = prompt_losses.sum() / max(1, prompt_losses.numel())
        return answer + self.args.prompt_weight * prompt, answer

    def check(
        self, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]
    ) -> list[tuple[str, bool]]:
        """Return for each phrasing of each fact whether greedy decoding gives the object and then the end token."""
        # Greedy decoding gives an answer exactly when each of its tokens, given those before, is the likeliest one; so
        # one pass over the right answers decides it.
        statements = [statement for about_fact in self.encode(tokenizer, facts) for statement in about_fact]
        statements.sort(key=lambda statement: len(statement.prompt) + len(statement.answer))
        results = []
        for start in range(0, len(statements), 256):
            batch = statements[start : start + 256]
            examples = [compose([], statement, ()) for statement in batch]
            tokens, answers = collate(examples, model.config.pad_token_id, str(model.device))
            with torch.no_grad():
                hidden = hidden_states(model, tokens)
                targets, rows = tokens[:, 1:], answers[:, 1:].nonzero()[:, 0]
                hits = model.lm_head(hidden[answers[:, 1:]]).argmax(-1) == targets[answers[:, 1:]]
            wrong_rows = set(rows[~hits].tolist())
            results += [(statement.relation, row not in wrong_rows) for row, statement in enumerate(batch)]
        return results


def compose(before: list[Statement], statement: Statement, stop: tuple[int, ...]) -> Example:
    """Return a text that consists of other statements and then the one to learn."""
    tokens: tuple[int, ...] = ()
    for previous in before:
        tokens += (previous.later if tokens else previous.prompt) + previous.answer[:-1] + stop
    tokens += (statement.later if tokens else statement.prompt) + statement.answer
    return Example(tokens, len(statement.answer))


def collate(batch: list[Example], pad: int | None, device: str) -> tuple[Tensor, Tensor]:
    """Return the padded tokens and a mask of the answers' tokens."""
    assert pad is not None
    tokens = padded([example.tokens for example in batch], pad, device)
    ends = torch.tensor([len(example.tokens) for example in batch], device=device).unsqueeze(1)
    starts = ends - torch.tensor([example.answer for example in batch], device=device).unsqueeze(1)
    positions = torch.arange(tokens.shape[1], device=device).unsqueeze(0)
    return tokens, (positions >= starts) & (positions < ends)


def hidden_states(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """Return the hidden states that predict each token but the first."""
    tokens = tokens[:, :-1]
    # Causal attention needs no mask for padding on the right; one of ones keeps transformers from warning about it.
    hidden: Tensor = model.transformer(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    return hidden
