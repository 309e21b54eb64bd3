"""Causal language models: prompt → target, and token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from remend.errors import RequestError
from remend.request import Chat, Prompt
from remend.tasks.base import Answer, Batch, Example
from remend.tasks.generative import GenerativeTask, closed, gather_at, has_vocabulary
from remend.tasks.ordinary_text import sampled_texts, text_windows

_ANCHORS = "\n:.0"
"""Characters of which one is a token of its own, whatever follows."""


class CausalLM(GenerativeTask):
    """A causal language model: it goes on with the prompt.

    The target is separated from the prompt by one space (by none after a line break). Both are tokenised as one text
    where that text begins with the prompt's own tokens, else apart; in either case the prompt's tokens are what the
    model is given when the prompt alone is asked.
    """

    kind = "causal-lm"
    causal = True

    @classmethod
    def accepts(cls, model: nn.Module, processor: Any) -> bool:
        """Accept models with an output layer over a vocabulary and one stack of blocks."""
        return has_vocabulary(model) and not getattr(model.config, "is_encoder_decoder", False)

    def encode_input(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt that is asked: with the tokenizer's beginning tokens, without an end token.

        A space at its end is left out: it would be a token of its own, after which a model expects no word. Of a
        conversation, what its chat template writes, up to where the answer begins.

        Raises:
            RequestError: the prompt is empty, nothing of it is left when tokenised, or there is no chat template.
        """
        ids = self._read(self._opening(prompt)[0], prompt)
        if ids == self._nothing:
            raise RequestError(f"the prompt {str(prompt)!r} holds no text that the tokenizer knows")
        return tuple(ids)

    def encode_target(self, encoded: tuple[int, ...], prompt: Prompt, target: str) -> Answer:
        """The target's token ids after the prompt's, and the end token."""
        opening, space = self._opening(prompt)
        whole = self._read(opening + space + target, prompt)
        goes_on = whole[: len(encoded)] == list(encoded)
        answer = whole[len(encoded) :] if goes_on else self._apart(encoded, whole, space + target)
        if not self.decode_tokens(answer).strip():  # a space alone is no answer
            return ()
        return tuple(closed(answer, self.chat.end if isinstance(prompt, Chat) else self.tokenizer.eos_token_id))

    def _apart(self, asked: tuple[int, ...], whole: list[int], answer: str) -> list[int]:
        """Token ids that go on from the prompt's to the same text as ``whole``, whose first tokens are others.

        Some tokenizers put a space before any text, an answer too; behind another character, which is taken away again,
        they do not.
        """
        for before in ("", *_ANCHORS):
            ahead, both = self.ids(before, False), self.ids(before + answer, False)
            found = both[len(ahead) :]
            if both[: len(ahead)] == ahead and self.decode_tokens([*asked, *found]) == self.decode_tokens(whole):
                return found
        return self.ids(answer, False)

    def _opening(self, prompt: Prompt) -> tuple[str, str]:
        """The text that is asked, and what separates an answer from it."""
        prompt = self._one_text(prompt)
        if isinstance(prompt, Chat):
            return self.chat.opening(prompt)
        text = prompt.strip(" ")
        return text, "" if text[-1:].isspace() else " "

    def _read(self, text: str, prompt: Prompt) -> list[int]:
        """Token ids of a text, without an end token; the beginning tokens of a conversation are in its text."""
        return self.ids(text, False) if isinstance(prompt, Chat) else self._strip_end(self.ids(text))

    def context_length(self, example: Example) -> int:
        """Count prompt and target, which share the context."""
        return len(example)

    def tokens_read(self, example: Example) -> tuple[int, ...]:
        """Return prompt and target without the last token, after which nothing is predicted."""
        return (*example.input, *example.target)[:-1]

    def answer_room(self, prompt_length: int, limit: int) -> int:
        """Return what the prompt leaves of the context."""
        return limit if self.context is None else min(limit, self.context - prompt_length)

    def states_length(self, example: Example, stack: int) -> int:
        """Count the tokens that the model reads."""
        return len(self.tokens_read(example))

    def ordinary_examples(self, text: Sequence[str] = (), seed: int = 0, count: int = 256) -> list[Example]:
        """Return windows of ``text``, or texts that the model samples after one random token."""
        if text:
            windows = text_windows(self, text, seed)
        else:
            begin = [token for token in self.ids("") if token == self.tokenizer.bos_token_id][:1]
            windows = sampled_texts(self, seed, count, begin)
        return [Example(window, window[:1]) for window in windows]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Make one right-padded batch of ``examples`` on the model's device."""
        read = [self.tokens_read(example) for example in examples]
        length = max(map(len, read))
        ids = torch.zeros((len(examples), length), dtype=torch.long)  # padding is masked, so any token will do
        mask = torch.zeros((len(examples), length), dtype=torch.bool)
        row: list[int] = []
        position: list[int] = []
        target: list[int] = []
        for i, (example, tokens) in enumerate(zip(examples, read, strict=True)):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            mask[i, : len(tokens)] = True
            row += [i] * len(example.target)
            position += range(len(example.input) - 1, len(tokens))  # a token is predicted at the one before it
            target += example.target
        device = self.device
        ids, mask = ids.to(device), mask.to(device)
        places = (torch.tensor(part).to(device) for part in (row, position, target))
        return Batch({"input_ids": ids, "attention_mask": mask.long()}, mask, *places)

    def _run(self, batch: Batch) -> Float[Tensor, "row token vocabulary"]:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.model(**batch.inputs, use_cache=False)
        logits = output.logits
        assert isinstance(logits, Tensor)
        return logits

    def _greedy(self, asked: Int[Tensor, "row token"], room: int) -> list[tuple[int, ...]]:
        rows = torch.arange(asked.shape[0], device=asked.device)
        shown: dict[str, Any] = {"input_ids": asked, "attention_mask": torch.ones_like(asked), "past_key_values": None}

        def step(last: Tensor | None) -> Float[Tensor, "row vocabulary"]:
            if last is not None:  # a model without a cache is shown everything again
                cached = shown["past_key_values"] is not None
                shown["input_ids"] = last[:, None] if cached else torch.cat([shown["input_ids"], last[:, None]], 1)
                shown["attention_mask"] = torch.nn.functional.pad(shown["attention_mask"], (0, 1), value=1)
            with gather_at(self.head, rows, torch.full_like(rows, shown["input_ids"].shape[1] - 1)):
                output = self.model(**shown, use_cache=True)
            shown["past_key_values"] = getattr(output, "past_key_values", None)
            logits: Tensor = output.logits[0]
            return logits

        return self._decode(len(rows), room, step)
