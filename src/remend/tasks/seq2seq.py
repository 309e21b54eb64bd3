"""Encoder-decoders: the encoder reads the prompt, the decoder writes the target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.errors import ModelError, RequestError
from remend.models.blocks import find_stacks
from remend.request import Chat, Prompt
from remend.tasks.base import Batch, Example
from remend.tasks.language_model import LanguageTask, closed, gather_at


class Seq2SeqLM(LanguageTask):
    """An encoder-decoder. Prompt and target are tokenised each as the tokenizer does for its side.

    The decoder begins with the model's own start token, which predicts the first token of the target; for some models
    (BART) that is a beginning token, which is then a part of every answer.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None = None
    ) -> None:
        start = getattr(model.config, "decoder_start_token_id", None)
        if start is None:
            raise ModelError(
                f"{type(model).__name__} has no decoder_start_token_id in its configuration, so nobody knows with what "
                "its decoder begins: set model.config.decoder_start_token_id"
            )
        self.start = int(start)
        self._encoder = f"{find_stacks(model)[0][0]}."
        super().__init__(model, tokenizer, autocast)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, with whatever the tokenizer (of a conversation: its chat template) puts around it.

        Raises:
            RequestError: the prompt is empty, nothing of it is left when tokenised, or there is no chat template.
        """
        prompt = self._one_text(prompt)
        if isinstance(prompt, Chat):
            return self.ids(self.chat.opening(prompt)[0], False)
        ids = self.ids(prompt.strip(" "))
        if self._strip_end(ids) == self._nothing:
            raise RequestError(f"the prompt {prompt!r} holds no text that the tokenizer knows")
        return ids

    def answer_ids(self, asked: list[int], prompt: Prompt, target: str) -> list[int]:
        """The target's token ids, and the end token; what a tokenizer writes after that (a language) is left out."""
        ids = list(self.tokenizer(text_target=target).input_ids)
        if ids == self.tokenizer(text_target="").input_ids:
            return []
        begun = int(ids[0] == self.tokenizer.bos_token_id)  # with some, the same token begins and ends
        return [*ids[:begun], *closed(ids[begun:], self.tokenizer.eos_token_id)]

    def length(self, pair: Example) -> int:
        """Each side has the context for itself."""
        return max(len(pair.prompt), len(pair.target))

    def room(self, prompt: int, most: int) -> int:
        """The decoder's context."""
        return most if self.context is None else min(most, self.context)

    def entering(self, pair: Example, stack: int) -> int:
        """The prompt enters the encoder, as many tokens as the target has the decoder."""
        return len(pair.target if stack else pair.prompt)

    def tokens(self, batch: Batch, names: Iterable[str], predicting: bool) -> dict[str, Bool[Tensor, "row token"]]:
        """The prompt's tokens in the encoder, the target's places in the decoder, all of which predict one."""
        assert batch.decoder_mask is not None
        return {name: batch.mask if name.startswith(self._encoder) else batch.decoder_mask for name in names}

    def collate(self, pairs: Sequence[Example]) -> Batch:
        """One batch of ``pairs`` on the model's device."""
        ids, mask = _padded([pair.prompt for pair in pairs])
        shown, places = _padded([(self.start, *pair.target[:-1]) for pair in pairs])
        row, position = places.nonzero(as_tuple=True)
        target = torch.tensor([token for pair in pairs for token in pair.target])
        return Batch(*(part.to(self.device) for part in (ids, mask, row, position, target, shown, places)))

    def _run(self, batch: Batch) -> Float[Tensor, "row place vocabulary"]:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.model(
                input_ids=batch.input_ids,
                attention_mask=batch.mask.long(),
                decoder_input_ids=batch.decoder_ids,
                use_cache=False,
            )
        logits = output.logits
        assert isinstance(logits, Tensor)
        return logits

    def _greedy(self, asked: Int[Tensor, "row token"], room: int) -> list[tuple[int, ...]]:
        rows, mask = torch.arange(asked.shape[0], device=asked.device), torch.ones_like(asked)
        encoded = self.model.get_encoder()(input_ids=asked, attention_mask=mask)
        shown: dict[str, Any] = {"encoder_outputs": encoded, "attention_mask": mask, "past_key_values": None}
        beginning = torch.full_like(rows, self.start)

        def step(last: Tensor | None) -> Float[Tensor, "row vocabulary"]:
            ids = (beginning if last is None else last)[:, None]
            with gather_at(self.head, rows, torch.zeros_like(rows)):
                output = self.model(**shown, decoder_input_ids=ids, use_cache=True)
            shown["past_key_values"] = output.past_key_values
            logits: Tensor = output.logits[0]
            return logits

        return self._decode(len(rows), room, step)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "row token"], Bool[Tensor, "row token"]]:
    """Rows of token ids, right-padded with zeros, and which of them are real."""
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = True
    return ids, mask
