"""Control policies: an observation of a state, and the action to take there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.core.low_rank_hooks import frozen
from remend.core.output_distributions import Categorical, Distribution, Gaussian
from remend.errors import ConfigError, ModelError, RequestError
from remend.request import Input, Prompt
from remend.tasks.base import Answer, Batch, Example, Task
from remend.tasks.class_labels import label_number
from remend.tasks.hashable_tensor import TensorInput


@dataclass(frozen=True)
class Observation(Input):
    """The numbers that a policy observes in one state, under the key ``observation`` of a request.

    Attributes:
        values: the numbers.
    """

    key: ClassVar[str] = "observation"
    values: tuple[float, ...]

    @classmethod
    def from_json(cls, value: object) -> Observation:
        """Make the input of a list of numbers."""
        numbers = value if isinstance(value, list | tuple) else ()
        if not numbers or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise ValueError(f"should be a list of numbers, not {str(value)[:40]!r}")
        return cls(tuple(float(number) for number in numbers))

    def to_json(self) -> list[float]:
        """Return the list of numbers."""
        return list(self.values)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{value:g}" for value in self.values) + "]"


@dataclass(frozen=True)
class DiscreteActions:
    """Actions of which a policy chooses one; its outputs are their logits.

    Attributes:
        names: the actions' names, by number.
        observations: the number of values that the policy observes.
    """

    names: tuple[str, ...]
    observations: int


@dataclass(frozen=True)
class GaussianActions:
    """Actions of real numbers, each normally distributed around the policy's output.

    Attributes:
        dimensions: how many numbers an action has.
        observations: the number of values that the policy observes.
        log_std: log σ of each number, where the policy gives means only; a policy with twice as many outputs gives the
            means and then log σ.
        tolerance: how far from its target a number may be and count as right.
    """

    dimensions: int
    observations: int
    log_std: tuple[float, ...] = field(default=())
    tolerance: float = 0.05


class Policy(Task):
    """A control policy: any module that maps observations [row, value] to the parameters of a distribution of actions.

    Its processor is a :class:`DiscreteActions` or a :class:`GaussianActions`. An action of several numbers is several
    targets of one example.
    """

    kind = "policy"

    @classmethod
    def accepts(cls, model: nn.Module, processor: Any) -> bool:
        """Accept any module with a description of its actions as the processor."""
        return isinstance(processor, DiscreteActions | GaussianActions)

    def __init__(
        self, model: nn.Module, processor: DiscreteActions | GaussianActions, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__(model, processor, autocast)
        self.actions = processor
        self.distribution: Distribution = (
            Categorical() if isinstance(processor, DiscreteActions) else Gaussian(processor.tolerance)
        )
        with frozen(model), torch.no_grad():
            outputs = model(torch.zeros(1, processor.observations, device=self.device))
        allowed = (
            (len(processor.names),)
            if isinstance(processor, DiscreteActions)
            else (2 * processor.dimensions, *((processor.dimensions,) if processor.log_std else ()))
        )
        if not isinstance(outputs, Tensor) or outputs.shape[-1] not in allowed:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ModelError(
                f"the policy's output for one observation is {shape}; its actions need a tensor [1, "
                f"{' or '.join(map(str, allowed))}]"
            )

    # -- encoding ------------------------------------------------------------------------------------------------

    def encode_input(self, prompt: Prompt) -> TensorInput:
        """Return the observation as a tensor.

        Raises:
            RequestError: the input is not an observation, or has another number of values.
        """
        if not isinstance(prompt, Observation):
            raise RequestError(f'a policy is given {{"observation": [numbers]}}, not {str(prompt)[:40]!r}')
        if len(prompt.values) != self.actions.observations:
            raise RequestError(
                f"the observation {prompt} has {len(prompt.values)} values, the policy observes "
                f"{self.actions.observations}"
            )
        return TensorInput(torch.tensor(prompt.values))

    def encode_target(self, encoded: TensorInput, prompt: Prompt, target: str) -> Answer:
        """Return the action's number, or its numbers (``"0.5, -0.2"``).

        Raises:
            RequestError: there is no such action.
        """
        if isinstance(self.actions, DiscreteActions):
            return (label_number(target, self.actions.names),)
        try:
            numbers = tuple(float(number) for number in target.strip("[]()").replace(",", " ").split())
        except ValueError:
            numbers = ()
        if len(numbers) != self.actions.dimensions or not all(map(math.isfinite, numbers)):
            raise RequestError(
                f"the action {target!r} should be {self.actions.dimensions} numbers, such as '0.5, -0.2'"
            )
        return numbers

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stack the observations of ``examples``; each number of an action is a target of its own."""
        device, dtype = self.device, next(self.model.parameters()).dtype
        observations = torch.stack([example.input.tensor for example in examples]).to(device, dtype)
        row = torch.tensor([number for number, example in enumerate(examples) for _ in example.target], device=device)
        target = torch.tensor([value for example in examples for value in example.target], device=device)
        mask = torch.ones(len(examples), 1, dtype=torch.bool, device=device)
        return Batch({"observation": observations}, mask, row, torch.zeros_like(row), target)

    def states_length(self, example: Example, stack: int) -> None:
        """Return None: no observation is padded."""

    # -- running the model ---------------------------------------------------------------------------------------

    @property
    def output_size(self) -> int:
        """The number of actions; of numbers, their mean and log σ."""
        return len(self.actions.names) if isinstance(self.actions, DiscreteActions) else 2

    @property
    def state_bytes(self) -> int:
        """The bytes of the widest of the policy's hidden states."""
        widest = max(max(parameter.shape) for parameter in self.model.parameters() if parameter.dim())
        return int(widest) * int(next(self.model.parameters()).element_size())

    def outputs(self, batch: Batch) -> Float[Tensor, "target output"]:
        """Run the policy; return the logits of its actions, or the mean and log σ of each number of an action."""
        # By position: what a module calls its argument is its own matter.
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            outputs: Tensor = self.model(batch.inputs["observation"])
        if isinstance(self.actions, DiscreteActions):
            return outputs[batch.row]
        size = self.actions.dimensions
        if outputs.shape[-1] == size:
            log_std = torch.tensor(self.actions.log_std, device=outputs.device, dtype=outputs.dtype).expand_as(outputs)
        else:
            outputs, log_std = outputs.split(size, -1)
        return torch.stack([outputs, log_std], -1).flatten(0, 1)

    def predict(self, prompts: Sequence[Prompt], max_new_tokens: int = 32, batch_size: int = 64) -> list[Answer]:
        """Return the most probable action in each state."""
        size = 1 if isinstance(self.actions, DiscreteActions) else self.actions.dimensions
        examples = [Example(self.encode_input(prompt), (0,) * size) for prompt in prompts]
        answers: list[Answer] = []
        for start in range(0, len(examples), batch_size):
            chunk = examples[start : start + batch_size]
            with frozen(self.model), torch.no_grad():
                actions = self.distribution.mode(self.outputs(self.collate(chunk)))
            answers += [tuple(action) for action in actions.view(len(chunk), size).tolist()]
        return answers

    def decode(self, answer: Answer) -> str:
        """Return the action's name, or its numbers with four digits."""
        if isinstance(self.actions, DiscreteActions):
            return self.actions.names[answer[0]]
        return ", ".join(f"{number:.4g}" for number in answer)

    def ordinary_examples(self, text: Sequence[str] = (), seed: int = 0, count: int = 256) -> list[Example]:
        """Return normally distributed observations.

        Raises:
            ConfigError: a text was given.
        """
        if text:
            raise ConfigError("a policy reads no text: leave text (--statistics) out")
        noise = torch.randn(count, self.actions.observations, generator=torch.Generator().manual_seed(seed))
        size = 1 if isinstance(self.actions, DiscreteActions) else self.actions.dimensions
        return [Example(TensorInput(observation), (0,) * size) for observation in noise]
