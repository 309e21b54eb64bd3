"""Encoder-decoders: the encoder reads the prompt, and the decoder writes the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.errors import ModelError, RequestError
from remend.models.blocks import find_stacks
from remend.models.context_length import context_length
from remend.request import Chat, Prompt
from remend.tasks.base import Answer, Batch, Example
from remend.tasks.generative import GenerativeTask, closed, gather_at, has_vocabulary
from remend.tasks.ordinary_inputs import FIRST_ANSWER_TOKENS, random_inputs, text_windows, with_first_answers


class Seq2SeqLM(GenerativeTask):
    """An encoder-decoder. Prompt and target are tokenized each as the tokenizer does for its side.

    The decoder begins with the model's start token, at which the first token of the target is predicted. For some
    models (BART) that first token is a beginning token, which is then a part of every answer.

    Attributes:
        context: the largest number of tokens that the encoder reads.
        answer_context: the same of the decoder.
    """

    kind = "seq2seq"

    @classmethod
    def accepts(cls, model: nn.Module, processor: Any) -> bool:
        """Accept encoder-decoders with an output layer over a vocabulary."""
        return has_vocabulary(model) and bool(getattr(model.config, "is_encoder_decoder", False))

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None = None
    ) -> None:
        start = getattr(model.config, "decoder_start_token_id", None)
        if start is None:
            raise ModelError(
                f"{type(model).__name__} has no decoder_start_token_id in its configuration, so the first token of "
                "its decoder is unknown: set model.config.decoder_start_token_id"
            )
        self.start = int(start)
        self._encoder = f"{find_stacks(model)[0][0]}."
        super().__init__(model, tokenizer, autocast)
        self.context = context_length(model, model.get_encoder())
        self.answer_context = context_length(model, model.get_decoder())

    def encode_input(self, prompt: Prompt) -> tuple[int, ...]:
        """Return a prompt's token ids, with what the tokenizer, or the chat template of a conversation, puts around it.

        Raises:
            RequestError: the prompt is empty, the tokenizer knows nothing of it, or there is no chat template.
        """
        prompt = self._one_text(prompt)
        if isinstance(prompt, Chat):
            return tuple(self.ids(self.chat.opening(prompt)[0], False))
        ids = self.ids(prompt.strip(" "))
        if self._strip_end(ids) == self._nothing:
            raise RequestError(f"the prompt {prompt!r} holds no text that the tokenizer knows")
        return tuple(ids)

    def encode_target(self, encoded: tuple[int, ...], prompt: Prompt, target: str) -> Answer:
        """Return the target's token ids, closed with the end token."""
        # What some tokenizers write after the end token (the code of a language) is removed.
        ids = list(self.tokenizer(text_target=target).input_ids)
        if ids == self.tokenizer(text_target="").input_ids:
            return ()
        self.check_written(target, ids)
        begun = int(ids[0] == self.tokenizer.bos_token_id)  # with some, the same token begins and ends
        return (*ids[:begun], *closed(ids[begun:], self.tokenizer.eos_token_id))

    def check_length(self, example: Example, prompt: Prompt, target: str = "") -> None:
        """Check that the encoder's context holds the prompt, and the decoder's the target."""
        sides = (("prompt", example.input, self.context, str(prompt)),
                 ("target", example.target, self.answer_context, target))  # fmt: skip
        for name, tokens, context, text in sides:
            if context is not None and len(tokens) > context:
                raise RequestError(
                    f"the {name} takes {len(tokens)} tokens, the model's context holds {context}: shorten the {name} "
                    f"({text[:40]!r}…)"
                )

    def answer_room(self, prompt_length: int, limit: int) -> int:
        """Return the decoder's context."""
        return limit if self.answer_context is None else min(limit, self.answer_context)

    def tokens_read(self, example: Example) -> tuple[int, ...]:
        """Return the prompt, which the encoder reads, and what the decoder reads of the target: all but the last."""
        return (*example.input, *example.target)[:-1]

    def states_length(self, example: Example, stack: int) -> int:
        """Count the prompt's tokens, which enter the encoder, or as many as the target has, which enter the decoder."""
        return len(example.target if stack else example.input)

    def token_masks(
        self, batch: Batch, names: Iterable[str], predicting: bool
    ) -> dict[str, Bool[Tensor, "row position"]]:
        """Return the prompt's tokens for modules of the encoder, the target's positions for those of the decoder.

        Every position of the decoder predicts a target, and none of the encoder's does.
        """
        assert batch.decoder_mask is not None
        return {name: batch.mask if name.startswith(self._encoder) else batch.decoder_mask for name in names}

    def ordinary_examples(self, text: Sequence[str] = (), seed: int = 0, count: int = 256) -> list[Example]:
        """Return windows of ``text`` or random tokens, with what the model answers to them."""
        inputs = text_windows(self, text, seed) if text else random_inputs(self, seed, count)
        return with_first_answers(self, inputs, FIRST_ANSWER_TOKENS)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Make one batch of ``examples`` on the model's device, each side padded on the right."""
        ids, mask = _padded([example.input for example in examples])
        decoder_ids, decoder_mask = _padded([(self.start, *example.target[:-1]) for example in examples])
        row, position = decoder_mask.nonzero(as_tuple=True)
        target = torch.tensor([token for example in examples for token in example.target])
        ids, mask, decoder_ids, decoder_mask, row, position, target = (
            part.to(self.device) for part in (ids, mask, decoder_ids, decoder_mask, row, position, target)
        )
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": decoder_ids}
        return Batch(inputs, mask, row, position, target, decoder_mask)

    def _run(self, batch: Batch) -> Float[Tensor, "row place vocabulary"]:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.model(**batch.inputs, use_cache=False)
        logits = output.logits
        assert isinstance(logits, Tensor)
        return logits

    def next_logits(
        self, prompt_ids: Int[Tensor, "row token"], mask: Int[Tensor, "row token"] | None = None
    ) -> Callable[[Int[Tensor, " row"] | None], Float[Tensor, "row vocabulary"]]:
        """Return a function that gives the logits of each row's next token; the encoder runs once, here."""
        rows = torch.arange(prompt_ids.shape[0], device=prompt_ids.device)
        mask = torch.ones_like(prompt_ids) if mask is None else mask
        encoded = self.model.get_encoder()(input_ids=prompt_ids, attention_mask=mask)
        inputs: dict[str, Any] = {"encoder_outputs": encoded, "attention_mask": mask, "past_key_values": None}
        beginning = torch.full_like(rows, self.start)

        def step(last: Int[Tensor, " row"] | None) -> Float[Tensor, "row vocabulary"]:
            ids = (beginning if last is None else last)[:, None]
            with gather_at(self.head, rows, torch.zeros_like(rows)):
                output = self.model(**inputs, decoder_input_ids=ids, use_cache=True)
            inputs["past_key_values"] = output.past_key_values
            logits: Tensor = output.logits[0]
            return logits

        return step


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "row token"], Bool[Tensor, "row token"]]:
    """Return rows of token ids, right-padded with zeros, and the mask of those that are not padding."""
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    return ids, mask
