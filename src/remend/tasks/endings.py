"""``Endings``: whether a causal model ends its answers to texts by itself, measured on the model."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from remend.errors import RequestError
from remend.request import Chat, Completion, Prompt
from remend.tasks.base import Example
from remend.tasks.ordinary_inputs import random_tokens

if TYPE_CHECKING:
    from remend.tasks.causal_lm import CausalLM

ENDS_FROM = 0.2
"""The least probability of the end token after known answers, with or without a full stop, of a model that ends them.

Measured: .57 for SmolLM2-Instruct after questions without a chat template, .03 after sentences to complete, at most
.002 for Gemma 3 (base); models that were fine-tuned on answers are close to 1.
"""

KNOWN_MARGIN = math.log(4)
"""A model knows texts to which it gives a probability per token that is at least four times that of guessing."""

LONGEST_ANSWER = 32
"""Tokens within which a model ends an answer, or goes on."""

OWN_TEXTS = 32
"""Texts that the model writes, for whether it ends them."""

COMPLETIONS = {
    "The capital of France is": "Paris",
    "The author of Hamlet is": "William Shakespeare",
    "The opposite of hot is": "cold",
    "Albert Einstein was born in": "Germany",
    "The first month of the year is": "January",
    "The currency of Japan is the": "yen",
}
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "Who wrote Hamlet?": "William Shakespeare",
    "What is the opposite of hot?": "cold",
    "In which country was Albert Einstein born?": "Germany",
    "What is the first month of the year?": "January",
    "What is the currency of Japan?": "yen",
}
"""Prompts of each form with answers that general language models know."""


def asks(prompt: Prompt) -> bool:
    """Tell whether a prompt is a question, or a message to answer, and no text to complete."""
    return isinstance(prompt, Chat) or (isinstance(prompt, str) and is_question(prompt))


def is_question(text: str) -> bool:
    """Tell whether a text ends as a question does."""
    return text.rstrip().endswith(("?", "？", "؟"))


class Endings:
    """Whether a model ends its answers to texts by itself: fine-tuned models do, base models go on writing.

    What is found depends on the model and the prompt alone, never on what was asked before. Of a general language model
    the form of a prompt decides (a question, or a text to complete), in one pass over a few known answers. A model that
    does not know such texts has a domain of its own: if it ends all texts that it writes after random tokens, it ends
    its answers too; else its own answer to each prompt decides. Where a model knows nothing of a prompt either, nothing
    can be measured, and answers are taken to end.

    Args:
        task: the model, which has an end token.
    """

    def __init__(self, task: CausalLM) -> None:
        self.task = task
        self._forms: dict[bool, bool | None] = {}
        self._chosen: dict[tuple[int, ...], bool] = {}

    def ends(self, text: str, encoded: tuple[int, ...]) -> bool:
        """Tell whether the model ends its answer to a prompt."""
        of_form = self._of_form(is_question(text))
        if of_form is not None:
            return of_form
        if encoded not in self._chosen:
            self.choose({text: encoded})
        return self._chosen[encoded]

    @cached_property
    def _ends_all(self) -> bool:
        """Whether the model ends every text that it writes after a random token."""
        task = self.task
        first = random_tokens(task, torch.Generator().manual_seed(0), OWN_TEXTS, 1).tolist()
        begin = [token for token in task.ids("") if token == task.tokenizer.bos_token_id][:1]
        texts = task.continuations([(*begin, *token) for token in first], LONGEST_ANSWER)
        return all(text[-1] in task.end_tokens for text in texts)

    def choose(self, prompts: dict[str, tuple[int, ...]]) -> None:
        """Decide for prompts that are not decided yet, in few passes."""
        missing = {
            encoded: text
            for text, encoded in prompts.items()
            if encoded not in self._chosen and self._of_form(is_question(text)) is None
        }
        going_on = self._going_on(missing)
        self._chosen |= {encoded: encoded not in going_on for encoded in missing}

    def _going_on(self, missing: Collection[tuple[int, ...]]) -> set[tuple[int, ...]]:
        """Return the prompts after whose answers the model goes on writing, of a domain of its own."""
        # An answer ends if any of the reasons to say so holds, so their order does not matter: the quickest first.
        if len(missing) > OWN_TEXTS and self._ends_all:
            return set()
        rooms = {encoded: self.task.answer_room(len(encoded), LONGEST_ANSWER) for encoded in missing}
        # What a context cuts off tells nothing, and a prompt of one token has none that could be known.
        asked = [encoded for encoded in missing if rooms[encoded] == LONGEST_ANSWER and len(encoded) > 1]
        examples = [Example(encoded[:1], encoded[1:]) for encoded in asked]
        log_p = [math.fsum(parts) / len(parts) for parts in self.task.log_probabilities(examples)]
        known = [encoded for encoded, mean in zip(asked, log_p, strict=True) if self._knows(mean)]
        if not known or self._ends_all:
            return set()
        answers = self.task.continuations(known, LONGEST_ANSWER)
        return {e for e, answer in zip(known, answers, strict=True) if answer[-1] not in self.task.end_tokens}

    def _of_form(self, question: bool) -> bool | None:
        """Return whether the model ends its answers to prompts of a form; None where it does not know such texts."""
        if question not in self._forms:
            self._forms[question] = self._measure_form(QUESTIONS if question else COMPLETIONS)
        return self._forms[question]

    def _measure_form(self, answered: dict[str, str]) -> bool | None:
        task, examples = self.task, []
        for prompt, answer in answered.items():
            try:
                encoded = task.encode_input(prompt)
            except RequestError:  # nothing of it is in the vocabulary
                return None
            if task.unknown_text(prompt):
                return None
            for written in (answer, f"{answer}."):
                ids = task.answer_ids(encoded, Completion(prompt, " "), written)
                examples.append(Example(encoded[:1], (*encoded[1:], *ids, task.tokenizer.eos_token_id)))
        if any(task.context is not None and len(example) > task.context for example in examples):
            return None
        measured = task.log_probabilities(examples)
        # The end token is left out of what is known: whether it is expected is the question.
        texts = [math.fsum(log_p[:-1]) / (len(log_p) - 1) for log_p in measured]
        if not self._knows(math.fsum(texts) / len(texts)):
            return None
        ends = [math.exp(log_p[-1]) for log_p in measured]
        return sum(map(max, ends[::2], ends[1::2])) / len(answered) >= ENDS_FROM

    def _knows(self, log_p: float) -> bool:
        return log_p > KNOWN_MARGIN - math.log(self.task.output_size)
