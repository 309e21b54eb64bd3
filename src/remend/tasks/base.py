"""``Task``: a model together with what is needed to give it inputs and to read its outputs.

The library deals with this one object. What differs between kinds of models is in its subclasses, one module each; the
rest of the library never asks which of them a task is.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from remend.core.layers import execution_device
from remend.core.low_rank_hooks import frozen
from remend.core.output_distributions import Categorical, Distribution
from remend.errors import RequestError
from remend.fingerprint import model_name
from remend.models.context_length import context_length
from remend.request import Completion, Prompt

EDIT_BATCH_SIZE = 32
"""Examples whose gradients are taken in one pass when edits are made: bounds the memory, does not change the result."""

EncodedInput = Any
"""An input as a task's ``encode_input`` returns it: hashable, and compared by what the model is given."""

Answer = tuple[Any, ...]
"""A target as numbers: token ids, one label's number, or the dimensions of an action."""


LONG_PROMPT = 512
"""Tokens of a prompt from which on it is not read in many variants: each would take as long as the prompt itself."""


@dataclass(frozen=True)
class Example:
    """An encoded input with the target that belongs to it.

    Attributes:
        input: what :meth:`Task.encode_input` returned, such as a tuple of token ids.
        target: what :meth:`Task.encode_target` returned; of generative models the tokens, the end token last.
    """

    input: EncodedInput
    target: Answer

    def __len__(self) -> int:
        return len(self.input) + len(self.target)


def in_batches(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """Split examples into parts of :data:`EDIT_BATCH_SIZE`."""
    for start in range(0, len(examples), EDIT_BATCH_SIZE):
        yield examples[start : start + EDIT_BATCH_SIZE]


@dataclass(frozen=True, eq=False)
class Batch:
    """Several examples as the model takes them, with the places of the outputs that predict their targets.

    A row is an example. Rows of tokens are padded on the right: a causal model never reads what comes later, so
    positions are the same with and without padding.

    Attributes:
        inputs: the arguments of the model's forward pass.
        mask: the tokens of each row that are not padding.
        row: the row of each target.
        position: the position of its row at which each target is predicted; of an encoder-decoder, in the decoder.
        target: the targets of all rows, one after the other: token ids, labels, or numbers.
        decoder_mask: of an encoder-decoder, the decoder's positions that are not padding.
    """

    inputs: Mapping[str, Tensor]
    mask: Bool[Tensor, "row token"]
    row: Int[Tensor, " target"]
    position: Int[Tensor, " target"]
    target: Shaped[Tensor, " target"]
    decoder_mask: Bool[Tensor, "row position"] | None = None

    @property
    def rows(self) -> int:
        """The number of examples."""
        return self.mask.shape[0]

    @property
    def predicting(self) -> Bool[Tensor, "row position"]:
        """The positions at which a target is predicted."""
        positions = torch.zeros_like(self.mask if self.decoder_mask is None else self.decoder_mask)
        positions[self.row, self.position] = True
        return positions

    @property
    def first_position(self) -> Int[Tensor, " row"]:
        """The position at which the first target of each row is predicted."""
        last = self.position.new_full((self.rows,), int(self.position.max()))
        return last.scatter_reduce(0, self.row, self.position, "amin")

    def ordered(self, *groups: Sequence[int]) -> Batch:
        """Return the batch with its targets in another order: those of the first group's rows, then the next's."""
        rank = torch.cat([torch.tensor(group) for group in groups]).argsort().to(self.row.device)
        order = rank[self.row].argsort(stable=True)
        return replace(self, row=self.row[order], position=self.position[order], target=self.target[order])


class Task(ABC):
    """A model with its processor: encodes inputs and targets, runs the model, and reads its outputs.

    Args:
        model: the model.
        processor: what turns inputs into tensors: a tokenizer, an image processor, a description of actions, or None.
        autocast: a narrower dtype for the model's matrix products; by default that of its weights.

    Attributes:
        kind: the name of this kind of task, as in recipes and messages.
        distribution: what the outputs at a target mean.
        context: the largest number of tokens that the model takes, where there is a limit.
        reads_text: whether inputs are texts, so that subjects can be found in them and embeddings looked up.
        generates: whether targets are texts that the model writes token by token.
        causal: whether prompt and target are one sequence, so that any text is an input with targets at every token.
    """

    kind: ClassVar[str]
    distribution: Distribution = Categorical()
    reads_text: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    causal: ClassVar[bool] = False

    def __init__(self, model: nn.Module, processor: Any, autocast: torch.dtype | None = None) -> None:
        self.model: Any = model
        self.processor = processor
        self.autocast = autocast
        self.context = context_length(model)

    def __repr__(self) -> str:
        parameters = list(self.model.parameters())
        count = sum(parameter.numel() for parameter in parameters)
        dtypes = ", ".join(dict.fromkeys(str(parameter.dtype).removeprefix("torch.") for parameter in parameters))
        name = model_name(self.model)
        return f"{type(self).__name__}({name!r}: {self.kind}, {count:,} parameters, {dtypes}, on {self.device})"

    @classmethod
    @abstractmethod
    def accepts(cls, model: nn.Module, processor: Any) -> bool:
        """Tell from the structure of a model and its processor whether this is their task."""

    def with_autocast(self, dtype: torch.dtype | None) -> Task:
        """Return the same task with another dtype for matrix products."""
        task = copy.copy(self)
        task.autocast = dtype
        return task

    # -- encoding ------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode_input(self, prompt: Prompt) -> EncodedInput:
        """Encode what the model is asked.

        Raises:
            RequestError: it is empty, or not an input of this kind of model.
        """

    @abstractmethod
    def encode_target(self, encoded: EncodedInput, prompt: Prompt, target: str) -> Answer:
        """Encode a target (not empty, without spaces around it) that follows an input; empty if nothing is left of it.

        Args:
            encoded: the encoded input.
            prompt: the input.
            target: the target.

        Raises:
            RequestError: the model has no such target.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Make one batch of ``examples`` on the model's device."""

    def encode(self, prompt: Prompt, target: str) -> Example:
        """Encode an input with its target.

        Spaces around a text do not matter. A target of tokens is closed with the end token where the model ends its
        answers itself (:meth:`ends_answer`); in a conversation, with the one that ends a turn.

        Raises:
            RequestError: the input or the target is empty, or both are longer than the model's context.
        """
        if isinstance(prompt, Completion) and not self.causal:
            raise RequestError(
                f"separator belongs to models that continue the prompt's own text, and one of the kind {self.kind!r} "
                f"answers beside it: leave separator away ({prompt[:40]!r}…)"
            )
        encoded = self.encode_input(prompt)
        answer = self.encode_target(encoded, prompt, target.strip()) if target.strip() else ()
        if not answer:
            raise RequestError(f"the target {target!r} holds no text that the tokenizer knows")
        example = Example(encoded, answer)
        self.check_length(example, prompt, target)
        return example

    def separator(self, prompt: Prompt) -> str | None:
        """Return what stands between a prompt and its answer; None where they are not one text, or a template says."""
        return None

    def unknown_text(self, prompt: Prompt) -> tuple[str, ...]:
        """Return the pieces of a prompt that the tokenizer cannot write and reads as unknown; empty elsewhere."""
        return ()

    def ends_answer(self, prompt: Prompt) -> bool:
        """Tell whether the model itself ends its answer to a prompt; if not, it goes on writing after any answer."""
        return True

    def choose_answer_forms(self, prompts: Iterable[Prompt]) -> None:
        """Have the model decide what stands before answers to many prompts, and whether it ends them.

        Otherwise each is decided when it is encoded. It must be the unedited model.
        """
        return

    def sample_separators(self, prompts: Iterable[Prompt]) -> dict[Prompt, str]:
        """Return what stands between each of many texts and its answer, where the model decides that.

        The model, which must be the unedited one, is asked for a sample only
        (:meth:`remend.tasks.separators.Separators.sample`).
        """
        return {}

    def encode_question(self, prompt: Prompt) -> EncodedInput:
        """Encode an input that the model is to answer.

        Raises:
            RequestError: it is empty, not an input of this kind of model, or leaves no room for an answer.
        """
        encoded = self.encode_input(prompt)
        self.check_length(Example(encoded, (0,)), prompt)
        return encoded

    def check_length(self, example: Example, prompt: Prompt, target: str = "") -> None:
        """Check that the model's context holds an example.

        Raises:
            RequestError: it does not, with which of prompt and target to shorten.
        """
        if self.context is None or (length := self.context_length(example)) <= self.context:
            return
        if target:
            taken, longer = f"prompt and target take {length} tokens", len(example.target) > len(example.input)
        else:
            no_room = " and leaves no room for an answer" if self.generates else ""
            taken, longer = f"the prompt takes {len(example.input)} tokens{no_room}", False
        raise RequestError(
            f"{taken}, the model's context holds {self.context}: shorten {'the target' if longer else 'the prompt'} "
            f"({(target if longer else str(prompt))[:40]!r}…)"
        )

    def is_long(self, prompt: Prompt) -> bool:
        """Tell whether a prompt is so long that it should not be read in many variants (:data:`LONG_PROMPT`)."""
        return len(self.encode_input(prompt)) >= LONG_PROMPT

    def context_length(self, example: Example) -> int:
        """Return the number of tokens of the model's context that an example takes."""
        return len(example.input)

    def tokens_read(self, example: Example) -> EncodedInput:
        """Return all that the model reads of an example: what decides its hidden states."""
        return example.input

    def states_length(self, example: Example, stack: int) -> int | None:
        """Return the number of tokens of an example that enter the blocks of one of the model's stacks.

        None where all examples have as many positions, so that none is padded.
        """
        return len(example.input)

    def token_masks(
        self, batch: Batch, names: Iterable[str], predicting: bool
    ) -> dict[str, Bool[Tensor, "row position"]]:
        """Return for each named module the tokens that count there.

        Args:
            batch: the examples.
            names: the modules' names.
            predicting: whether only the tokens at which a target is predicted count, or all that are not padding.
        """
        return dict.fromkeys(names, batch.predicting if predicting else batch.mask)

    # -- running the model ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device that inputs go to: of a model that reads tokens, that of their embeddings."""
        return execution_device(self.model.get_input_embeddings() if self.reads_text else self.model)

    @property
    def output_size(self) -> int:
        """The number of outputs at each target, for estimates of memory."""
        return int(self._embeddings.shape[0])

    @property
    def state_bytes(self) -> int:
        """The bytes of one hidden state, for estimates of memory."""
        return int(self._embeddings.shape[1]) * self._embeddings.element_size()

    @property
    def _embeddings(self) -> Tensor:
        weight: Tensor = next(self.model.get_input_embeddings().parameters())
        return weight

    @abstractmethod
    def outputs(self, batch: Batch) -> Float[Tensor, "target output"]:
        """Run the model; return the outputs that predict each target, and no others."""

    def output_states(self, batch: Batch) -> Float[Tensor, "target state"]:
        """Run the model; return what :meth:`outputs_from_states` computes :meth:`outputs` of, smaller if possible."""
        return self.outputs(batch)

    def outputs_from_states(self, states: Float[Tensor, "target state"]) -> Float[Tensor, "target output"]:
        """Return the outputs that belong to :meth:`output_states`.

        Call it with the model's blocks bypassed (:meth:`FrozenPrefix.bypass_blocks`): where the model itself
        makes outputs of states, it runs as a whole.
        """
        return states

    def loss(self, batch: Batch) -> Float[Tensor, " row"]:
        """Run the model; return −log p(target | input) of each example, averaged over its targets: the paper's l_e."""
        return self.distribution.loss(self.outputs(batch), batch.target, batch.row, batch.rows)

    @torch.no_grad()
    def log_probabilities(self, examples: Sequence[Example]) -> list[list[float]]:
        """Return log p of each target of each example, in nats, in batches and without a gradient.

        Their sum is log p of the whole target, their mean the negative of :meth:`loss`.
        """
        log_p: list[list[float]] = []
        for part in in_batches(examples):
            batch = self.collate(part)
            with frozen(self.model):
                values = self.distribution.log_prob(self.outputs(batch), batch.target)
            log_p += [of_example.tolist() for of_example in values.split([len(example.target) for example in part])]
        return log_p

    def divergence(
        self, before: Float[Tensor, "target output"], after: Float[Tensor, "target output"], batch: Batch
    ) -> Float[Tensor, " row"]:
        """Return KL(before ‖ after) of the outputs of each example, averaged over its targets, in nats."""
        return self.distribution.divergence(before, after, batch.row, batch.rows)

    def correct(self, outputs: Float[Tensor, "target output"], batch: Batch) -> Bool[Tensor, " row"]:
        """Tell for each example whether every one of its targets is the model's first choice."""
        right = self.distribution.correct(outputs, batch.target)
        return all_of_row(right, batch.row, batch.rows)

    # -- answers -------------------------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, prompts: Sequence[Prompt], max_new_tokens: int = 32, batch_size: int = 64) -> list[Answer]:
        """Return the model's own answers, encoded as targets are.

        Args:
            prompts: the inputs.
            max_new_tokens: of generative models, the longest answer.
            batch_size: inputs that go through the model together.
        """

    def same_answer(self, answer: Answer, other: Answer) -> bool:
        """Tell whether two answers are the same: the one definition that all measurements and commands share.

        Of texts, whether a reader sees the same (:func:`remend.tasks.same_text.same_text`) and both have ended; of
        labels, whether they are the same label; of numbers, whether they lie within the tolerance of each other. An
        empty text is no answer, and the same as none: a model that says nothing has not kept its answer.
        """
        if self.distribution.discrete:
            return answer == other
        return len(answer) == len(other) and all(map(self.distribution.same_value, answer, other))

    def gives(self, prompt: Prompt, answer: Answer, expected: Answer) -> bool:
        """Tell whether a free answer to a prompt is the expected one.

        Where the model ends its answers, both must be the same (:meth:`same_answer`). Where it goes on writing, its
        text must begin with the expected answer at a word boundary (:func:`remend.tasks.open_answers.begins_with`).
        """
        return self.same_answer(answer, expected)

    def answer_span(self, prompt: Prompt, answer: Answer) -> Answer:
        """Return the part of the model's own answer that must stay: all of it, or its first word where it never ends.

        It is what :meth:`gives` expects (:func:`remend.tasks.open_answers.first_word_length`).
        """
        return answer

    def answer_length(self, answer: Answer, expected: Answer) -> int:
        """Return the number of targets of an answer that are the expected one, which it begins with."""
        return len(expected)

    def continuations(self, inputs: Sequence[EncodedInput], max_new_tokens: int = 32) -> list[Answer]:
        """Return what the model writes after encoded inputs; of models that write no text, nothing."""
        return [() for _ in inputs]

    def is_empty(self, answer: Answer) -> bool:
        """Tell whether an answer says nothing, as only a text can; it is never the same as another."""
        return False

    def same_target(self, prompt: Prompt, target: str, other: str) -> bool:
        """Tell whether two targets of a prompt are the same answer."""
        return self.same_answer(self.encode(prompt, target).target, self.encode(prompt, other).target)

    @abstractmethod
    def decode(self, answer: Answer) -> str:
        """Return an answer as text."""

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end an answer; empty where answers have no end."""
        return frozenset()

    # -- ordinary inputs -----------------------------------------------------------------------------------------

    @abstractmethod
    def ordinary_examples(self, text: Sequence[str] = (), seed: int = 0, count: int = 256) -> list[Example]:
        """Return ordinary inputs, on which editors measure the statistics of a model's activations.

        Args:
            text: passages like those that the model meets, where inputs are text; by default the model's own writing,
                or random inputs.
            seed: of every draw.
            count: how many, where none are given.

        Raises:
            ConfigError: the text holds no words, or this kind of model takes none.
            NonFiniteError: the model's outputs are not finite.
        """


def all_of_row(values: Bool[Tensor, " target"], row: Int[Tensor, " target"], rows: int) -> Bool[Tensor, " row"]:
    """Tell for each row whether ``values`` hold at all of its targets."""
    whole = torch.ones(rows, dtype=torch.bool, device=values.device)
    whole[row.to(values.device)[~values]] = False
    return whole
