"""Causal language models: prompt → target, and token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from remend.errors import RequestError
from remend.request import Chat, Prompt
from remend.tasks.base import Batch, Example
from remend.tasks.language_model import LanguageTask, closed, gather_at

_ANCHORS = "\n:.0"
"""Characters of which one is a token of its own, whatever follows."""


class CausalLM(LanguageTask):
    """A causal language model: it goes on with the prompt.

    The target is separated from the prompt by one space (by none after a line break). Both are tokenised as one text
    where that text begins with the prompt's own tokens, else apart; in either case the prompt's tokens are what the
    model is given when the prompt alone is asked.
    """

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt that is asked: with the tokenizer's beginning tokens, without an end token.

        A space at its end is left out: it would be a token of its own, after which a model expects no word. Of a
        conversation, what its chat template writes, up to where the answer begins.

        Raises:
            RequestError: the prompt is empty, nothing of it is left when tokenised, or there is no chat template.
        """
        ids = self._read(self._opening(prompt)[0], prompt)
        if ids == self._nothing:
            raise RequestError(f"the prompt {str(prompt)!r} holds no text that the tokenizer knows")
        return ids

    def answer_ids(self, asked: list[int], prompt: Prompt, target: str) -> list[int]:
        """The target's token ids after the prompt's, and the end token."""
        opening, space = self._opening(prompt)
        whole = self._read(opening + space + target, prompt)
        goes_on = whole[: len(asked)] == asked
        answer = whole[len(asked) :] if goes_on else self._apart(asked, whole, space + target)
        if not self.decoded(answer).strip():  # a space alone is no answer
            return []
        return closed(answer, self.chat.end if isinstance(prompt, Chat) else self.tokenizer.eos_token_id)

    def _apart(self, asked: list[int], whole: list[int], answer: str) -> list[int]:
        """Token ids that go on from the prompt's to the same text as ``whole``, whose first tokens are others.

        Some tokenizers put a space before any text, an answer too; behind another character, which is taken away again,
        they do not.
        """
        for before in ("", *_ANCHORS):
            ahead, both = self.ids(before, False), self.ids(before + answer, False)
            found = both[len(ahead) :]
            if both[: len(ahead)] == ahead and self.decoded([*asked, *found]) == self.decoded(whole):
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

    def length(self, pair: Example) -> int:
        """Prompt and target share the context."""
        return len(pair)

    def room(self, prompt: int, most: int) -> int:
        """What the prompt leaves of the context."""
        return most if self.context is None else min(most, self.context - prompt)

    def entering(self, pair: Example, stack: int) -> int:
        """All that are shown."""
        return len(pair.shown)

    def tokens(self, batch: Batch, names: Iterable[str], predicting: bool) -> dict[str, Bool[Tensor, "row token"]]:
        """The same at every module."""
        return dict.fromkeys(names, batch.predicting if predicting else batch.mask)

    def collate(self, pairs: Sequence[Example]) -> Batch:
        """One batch of ``pairs`` on the model's device."""
        length = max(len(pair.shown) for pair in pairs)
        ids = torch.zeros((len(pairs), length), dtype=torch.long)  # padding is masked: any token of the vocabulary does
        mask = torch.zeros((len(pairs), length), dtype=torch.bool)
        row: list[int] = []
        position: list[int] = []
        target: list[int] = []
        for i, pair in enumerate(pairs):
            shown = pair.shown
            ids[i, : len(shown)] = torch.tensor(shown)
            mask[i, : len(shown)] = True
            row += [i] * len(pair.target)
            position += range(len(pair.prompt) - 1, len(shown))
            target += pair.target
        device = self.device
        parts = (ids, mask, torch.tensor(row), torch.tensor(position), torch.tensor(target))
        return Batch(*(part.to(device) for part in parts))

    def _run(self, batch: Batch) -> Float[Tensor, "row token vocabulary"]:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False)
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
