"""Causal language models: how a prompt and its target become one sequence of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from remend.core.low_rank_hooks import frozen
from remend.errors import RequestError
from remend.models.blocks import find_stacks
from remend.models.frozen_prefix import logits_or_none, same_logits
from remend.request import Chat, Completion, Prompt
from remend.tasks.base import Answer, Batch, Example
from remend.tasks.endings import Endings
from remend.tasks.generative import GenerativeTask, closed, gather_at, has_vocabulary
from remend.tasks.ordinary_inputs import sampled_texts, text_windows
from remend.tasks.separators import Separators, without_outer_spaces

PADDING_TRIAL = 8
"""Tokens of padding before a prompt in the trial whether a model reads padded prompts rightly."""

_ANCHORS = "\n:.0"
"""Characters of which at least one is a token of its own in every tokenizer, whatever follows it."""


class CausalLM(GenerativeTask):
    """A causal language model, which continues the prompt.

    What stands between a prompt and its target is what the model itself would write there (:class:`Separators`), unless
    the prompt is a :class:`Completion`, which says it; in a conversation, the chat template says it. Both are tokenized
    as one text if that text begins with the tokens of the prompt alone, and separately otherwise. So the prompt's
    tokens are always those that the model reads when it is asked the prompt.
    """

    kind = "causal-lm"
    causal = True
    _reads_padding: bool | None = None

    @classmethod
    def accepts(cls, model: nn.Module, processor: Any) -> bool:
        """Accept models with an output layer over a vocabulary and one stack of blocks."""
        return has_vocabulary(model) and not getattr(model.config, "is_encoder_decoder", False)

    def encode_input(self, prompt: Prompt) -> tuple[int, ...]:
        """Return a prompt's token ids, with the tokenizer's beginning tokens and without an end token.

        A space at the end of a prompt is removed: it would be a token of its own, after which models expect no word.
        Spaces that begin the last line stay, since they indent what follows. A conversation is what its chat template
        writes, up to the place where the answer begins.

        Raises:
            RequestError: the prompt is empty, the tokenizer knows nothing of it, or there is no chat template.
        """
        ids = self._tokenize(self._text(prompt), prompt)
        if ids == self._nothing:
            raise RequestError(f"the prompt {str(prompt)!r} holds no text that the tokenizer knows")
        return tuple(ids)

    def encode_target(self, encoded: tuple[int, ...], prompt: Prompt, target: str) -> Answer:
        """Return the target's token ids after the prompt's, closed with the end token where the model ends answers."""
        answer = self.answer_ids(encoded, prompt, target)
        if not self.decode_tokens(answer).strip():  # a space alone is no answer
            return ()
        self.check_written(target, answer)
        end = self.chat.end if isinstance(prompt, Chat) else self.tokenizer.eos_token_id
        ended = closed(answer, end)
        return tuple(ended if self.ends_answer(prompt) or end is None else ended[:-1])

    def answer_ids(self, encoded: tuple[int, ...], prompt: Prompt, target: str) -> list[int]:
        """Return the token ids of a text that follows a prompt, without an end token."""
        separated = self._between(prompt, encoded) + target
        whole = self._tokenize(self._text(prompt) + separated, prompt)
        continues = whole[: len(encoded)] == list(encoded)
        return whole[len(encoded) :] if continues else self._tokenize_apart(encoded, whole, separated)

    def _tokenize_apart(self, encoded: tuple[int, ...], whole: list[int], answer: str) -> list[int]:
        """Return tokens of the answer that, after the prompt's, decode to the same text as ``whole``.

        For a text whose tokenization as a whole does not begin with the prompt's tokens.
        """
        # Some tokenizers put a space before every text, so before an answer as well. After an anchor character, whose
        # token is removed again, they do not.
        for before in ("", *_ANCHORS):
            ahead, joined = self.ids(before, False), self.ids(before + answer, False)
            tokens = joined[len(ahead) :]
            if joined[: len(ahead)] == ahead and self.decode_tokens([*encoded, *tokens]) == self.decode_tokens(whole):
                return tokens
        return self.ids(answer, False)

    def separator(self, prompt: Prompt) -> str | None:
        """Return what stands between a text and its answer; None of a conversation, whose template says it."""
        return None if isinstance(prompt, Chat) else self._between(prompt, self.encode_input(prompt))

    def ends_answer(self, prompt: Prompt) -> bool:
        """Tell whether the model itself ends its answer to a prompt (:class:`Endings`); in a conversation, always."""
        if isinstance(prompt, Chat):  # its template ends every answer
            return self.chat.end is not None
        if self.tokenizer.eos_token_id is None:
            return False
        return self._endings.ends(str(prompt), self.encode_input(prompt))

    def choose_answer_forms(self, prompts: Iterable[Prompt]) -> None:
        """Have the model decide for many prompts together."""
        encoded = self._encode_texts(prompts)
        self._separators.choose([ids for prompt, ids in encoded.items() if not isinstance(prompt, Completion)])
        if self.tokenizer.eos_token_id is not None:
            self._endings.choose(encoded)

    def sample_separators(self, prompts: Iterable[Prompt]) -> dict[Prompt, str]:
        """Have the model decide for some of the prompts that end alike; the others follow them."""
        encoded = self._encode_texts(prompt for prompt in prompts if not isinstance(prompt, Completion))
        asked = {prompt: ids for prompt, ids in encoded.items() if not self._text(prompt)[-1:].isspace()}
        between = self._separators.sample(asked.values())
        return {prompt: between[ids] for prompt, ids in asked.items()}

    def _encode_texts(self, prompts: Iterable[Prompt]) -> dict[str, tuple[int, ...]]:
        """Encode the prompts that are texts and can be encoded."""
        encoded: dict[str, tuple[int, ...]] = {}
        for prompt in prompts:
            if isinstance(prompt, str) and prompt not in encoded:
                with suppress(RequestError):  # encoding it for use will say so, with the name of its request
                    encoded[prompt] = self.encode_input(prompt)
        return encoded

    def _between(self, prompt: Prompt, encoded: tuple[int, ...]) -> str:
        """Return what stands between a prompt and its answer."""
        if isinstance(prompt, Chat):
            return self.chat.opening(prompt)[1]
        if isinstance(prompt, Completion):
            return prompt.separator
        return "" if self._text(prompt)[-1:].isspace() else self._separators[encoded]

    def _text(self, prompt: Prompt) -> str:
        """Return the text that the model reads."""
        prompt = self._one_text(prompt)
        return self.chat.opening(prompt)[0] if isinstance(prompt, Chat) else without_outer_spaces(prompt)

    def _tokenize(self, text: str, prompt: Prompt) -> list[int]:
        """Return a text's token ids without an end token."""
        # The text of a conversation contains its beginning tokens already: the chat template wrote them.
        return self.ids(text, False) if isinstance(prompt, Chat) else self._strip_end(self.ids(text))

    @cached_property
    def _separators(self) -> Separators:
        return Separators(self)

    @cached_property
    def _endings(self) -> Endings:
        return Endings(self)

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
        row_ids, positions, targets = (torch.tensor(part).to(device) for part in (row, position, target))
        return Batch({"input_ids": ids, "attention_mask": mask.long()}, mask, row_ids, positions, targets)

    def _run(self, batch: Batch) -> Float[Tensor, "row token vocabulary"]:
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.model(**batch.inputs, use_cache=False)
        logits = output.logits
        assert isinstance(logits, Tensor)
        return logits

    @cached_property
    def keeps_tokens(self) -> bool:
        """Whether the model's cache can be used: a block that runs several times has one place in it for all runs."""
        blocks = [block for _, stack in find_stacks(self.model) for _, block in stack]
        return len(set(blocks)) == len(blocks)

    def reads_padding(self, prompt: tuple[int, ...]) -> bool:
        """Tell whether the model reads a prompt with padding before it as it does without; tried once, on this one."""
        if self._reads_padding is None:
            self._reads_padding = self.keeps_tokens and self._same_with_padding(prompt)
        return self._reads_padding

    @torch.no_grad()
    def _same_with_padding(self, prompt: tuple[int, ...]) -> bool:
        ids = torch.tensor([prompt], device=self.device)
        padded = [torch.nn.functional.pad(tensor, (PADDING_TRIAL, 0)) for tensor in (ids, torch.ones_like(ids))]
        with frozen(self.model):
            alone, with_padding = self.next_logits(ids), self.next_logits(*padded)
            for last in (None, ids[:, 0]):  # the second token is read with the cache of the first pass
                expected, found = alone(last).float(), logits_or_none(partial(with_padding, last))
                if found is None or not same_logits(found, expected):
                    return False
        return True

    def next_logits(
        self, prompt_ids: Int[Tensor, "row token"], mask: Int[Tensor, "row token"] | None = None
    ) -> Callable[[Int[Tensor, " row"] | None], Float[Tensor, "row vocabulary"]]:
        """Return a function that gives the logits of each row's next token, with the model's cache where it has one."""
        rows = torch.arange(prompt_ids.shape[0], device=prompt_ids.device)
        inputs: dict[str, Any] = {
            "input_ids": prompt_ids,
            "attention_mask": torch.ones_like(prompt_ids) if mask is None else mask,
            "past_key_values": None,
        }
        padded = mask is not None and not bool(mask.all())
        takes_positions = padded and "position_ids" in inspect.signature(self.model.forward).parameters

        def step(last: Int[Tensor, " row"] | None) -> Float[Tensor, "row vocabulary"]:
            if last is not None:  # without a cache, everything is read again
                cached = inputs["past_key_values"] is not None
                inputs["input_ids"] = last[:, None] if cached else torch.cat([inputs["input_ids"], last[:, None]], 1)
                inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            length = inputs["input_ids"].shape[1]
            if takes_positions:
                inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)[:, -length:]
            with gather_at(self.head, rows, torch.full_like(rows, length - 1)):
                output = self.model(**inputs, use_cache=self.keeps_tokens)
            inputs["past_key_values"] = getattr(output, "past_key_values", None) if self.keeps_tokens else None
            logits: Tensor = output.logits[0]
            return logits

        return step
