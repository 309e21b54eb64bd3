"""Text classifiers: a text, or a pair of texts, and its label."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.core.low_rank_hooks import frozen
from remend.errors import ModelError, RequestError
from remend.models.blocks import find_stacks
from remend.request import Chat, Input, Prompt, TextPair
from remend.tasks.base import Answer, Batch, Example, Task
from remend.tasks.class_labels import label_names, label_number
from remend.tasks.ordinary_inputs import random_inputs, text_windows, with_first_answers
from remend.tasks.unknown_text import unknown_pieces

NO_LIMIT = 10**9
"""A tokenizer's ``model_max_length`` above this says that it knows none."""

BINARY = ("false", "true")
"""Labels of a model with one output z: it says the second with probability σ(z)."""


class TextClassification(Task):
    """A sequence classifier, whose targets are labels.

    A model with one output z is binary: its logits are (0, z), so that losses over two labels are the closed forms
    −log σ(±z) and the divergence of two Bernoulli distributions.

    Attributes:
        labels: their names, by number.
        reading: at which tokens the head reads the last hidden states: ``first``, ``last`` or ``all``.
    """

    kind = "classification"
    reads_text = True

    @classmethod
    def accepts(cls, model: nn.Module, processor: Any) -> bool:
        """Accept models that read tokens and have no output layer over a vocabulary."""
        return isinstance(processor, PreTrainedTokenizerBase)

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None = None
    ) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(
                f"{type(model).__name__} classifies with an encoder and a decoder, and where it reads the label is "
                "unknown: use an encoder, or let a language model write the label"
            )
        if getattr(model.config, "problem_type", None) == "multi_label_classification":
            raise ModelError(f"{type(model).__name__} gives several labels at once; remend edits classifiers with one")
        super().__init__(model, tokenizer, autocast)
        self.tokenizer = tokenizer
        longest = int(tokenizer.model_max_length)
        if longest < NO_LIMIT:
            self.context = longest if self.context is None else min(self.context, longest)
        names = label_names(model.config)
        self.labels = BINARY if len(names) == 1 else names
        self.segments = (  # whether the model tells the second of two texts from the first; RoBERTa does not
            "token_type_ids" in inspect.signature(model.forward).parameters
            and "token_type_ids" in tokenizer.model_input_names
            and getattr(model.config, "type_vocab_size", 2) > 1
        )
        self.reading = self._reading()

    @torch.inference_mode(False)  # a server may have it on
    def _reading(self) -> str:
        """Tell at which tokens the head reads: where a gradient of the logits arrives at the last block's output."""
        padding = self._padding(())
        tokens = torch.tensor([[token for token in range(5) if token != padding][:4]]).to(self.device)
        hidden_states: list[Tensor] = []

        def leaf(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
            hidden_states.append(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = find_stacks(self.model)[-1][1][-1][1].register_forward_hook(leaf)
        try:
            with frozen(self.model), torch.enable_grad():
                (gradient,) = torch.autograd.grad(
                    self._run(self._inputs(tokens, torch.ones_like(tokens).bool()))[:, 0].sum(),
                    hidden_states[-1:],  # of a block that runs several times, the last
                )
        finally:
            handle.remove()
        read = (gradient[0] != 0).any(-1).tolist()
        patterns = {(True, False, False, False): "first", (False, False, False, True): "last"}
        return patterns.get(tuple(read), "all")

    # -- text to tokens ------------------------------------------------------------------------------------------

    def encode_input(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids of a text or a pair of texts, with what the tokenizer puts around them.

        Raises:
            RequestError: the text is empty, or the tokenizer knows nothing of it.
        """
        if isinstance(prompt, Input):
            raise RequestError(f"a classifier of texts is given a text, not {prompt.key!r}")
        if isinstance(prompt, Chat):
            raise RequestError("a classifier is given a text, not a conversation: give a prompt in place of messages")
        texts = (prompt.first, prompt.second) if isinstance(prompt, TextPair) else (prompt,)
        ids = list(self.tokenizer(*(text.strip() for text in texts), verbose=False).input_ids)
        if not set(ids) - set(self.tokenizer.all_special_ids):
            raise RequestError(f"the prompt {str(prompt)!r} holds no text that the tokenizer knows")
        return tuple(ids)

    def unknown_text(self, prompt: Prompt) -> tuple[str, ...]:
        """Return the pieces of a text or of both of a pair that the tokenizer reads as unknown."""
        texts = (prompt.first, prompt.second) if isinstance(prompt, TextPair) else (str(prompt),)
        return tuple(piece for text in texts for piece in unknown_pieces(self.tokenizer, text))

    def encode_target(self, encoded: tuple[int, ...], prompt: Prompt, target: str) -> Answer:
        """Return the label's number.

        Raises:
            RequestError: there is no such label.
        """
        return (label_number(target, self.labels),)

    def decode(self, answer: Answer) -> str:
        """Return the label's name."""
        return self.labels[answer[0]]

    # -- batches -------------------------------------------------------------------------------------------------

    def token_masks(
        self, batch: Batch, names: Iterable[str], predicting: bool
    ) -> dict[str, Bool[Tensor, "row position"]]:
        """Return the same tokens for every module; a label is predicted where the head reads, or at all tokens."""
        return dict.fromkeys(names, batch.predicting if predicting and self.reading != "all" else batch.mask)

    def ordinary_examples(self, text: Sequence[str] = (), seed: int = 0, count: int = 256) -> list[Example]:
        """Return windows of ``text`` or random tokens, with what the model answers to them."""
        inputs = text_windows(self, text, seed) if text else random_inputs(self, seed, count)
        return with_first_answers(self, inputs, 1)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Make one right-padded batch of ``examples`` on the model's device."""
        length = max(len(example.input) for example in examples)
        padding = self._padding({token for example in examples for token in example.input})
        ids = torch.full((len(examples), length), padding)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, example in enumerate(examples):
            ids[row, : len(example.input)] = torch.tensor(example.input)
            mask[row, : len(example.input)] = True
        # The last token that is not a padding one: a text itself may end with such tokens, which the head passes over.
        last = (torch.arange(length) * (ids != padding)).argmax(1)
        position = last if self.reading == "last" else torch.zeros(len(examples), dtype=torch.long)
        target = torch.tensor([example.target[0] for example in examples])
        ids, mask, position, target = (part.to(self.device) for part in (ids, mask, position, target))
        rows = torch.arange(len(examples)).to(self.device)
        return Batch(self._inputs(ids, mask), mask, rows, position, target)

    # -- running the model ---------------------------------------------------------------------------------------

    def outputs(self, batch: Batch) -> Float[Tensor, "target label"]:
        """Run the model; return the labels' logits of each text."""
        return self._run(batch.inputs)[batch.row]

    def predict(self, prompts: Sequence[Prompt], max_new_tokens: int = 32, batch_size: int = 64) -> list[Answer]:
        """Return the most probable label of each text."""
        examples = [Example(self.encode_question(prompt), (0,)) for prompt in prompts]
        answers: list[Answer] = []
        for start in range(0, len(examples), batch_size):
            with frozen(self.model), torch.no_grad():
                labels = self.outputs(self.collate(examples[start : start + batch_size])).argmax(-1)
            answers += [(label,) for label in labels.tolist()]
        return answers

    def _inputs(self, ids: Int[Tensor, "row token"], mask: Bool[Tensor, "row token"]) -> dict[str, Tensor]:
        """Return the model's arguments for token ids."""
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if self.segments and (end := self.tokenizer.sep_token_id) is not None:  # the second text, up to its end
            ends = (ids == end).long()
            inputs["token_type_ids"] = (ends.cumsum(1) - ends).clamp(max=1) * inputs["attention_mask"]
        return inputs

    @property
    def _config(self) -> Any:
        """The configuration in which the model looks its padding token up."""
        return self.model.config.get_text_config()

    def _padding(self, tokens: Collection[int]) -> int:
        """Return the token that pads rows: the model's or, where it knows none, one that the rows do not hold."""
        known = getattr(self._config, "pad_token_id", None)
        if isinstance(known, int) and 0 <= known < len(self._embeddings):
            return known
        return next(token for token in range(len(tokens) + 1) if token not in tokens)

    @contextmanager
    def _padding_known(self, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the context, tell a model without a padding token which one was used for a batch.

        A decoder's head reads the last token that is not padding, and refuses several rows where it knows of none.
        """
        config, ids, mask = self._config, inputs["input_ids"], inputs["attention_mask"].bool()
        known = getattr(config, "pad_token_id", None)
        if (padding := self._padding(set(ids[mask].tolist()))) == known:
            yield
            return
        config.pad_token_id = padding
        try:
            yield
        finally:
            config.pad_token_id = known

    def _run(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "row label"]:
        autocast = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
        with autocast, self._padding_known(inputs):
            logits = getattr(self.model(**inputs), "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ModelError(
                f"{type(self.model).__name__} gives no logits for a label of each text: it is neither a language model "
                "nor a sequence classifier"
            )
        return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits
