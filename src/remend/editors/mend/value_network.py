"""``ValueNetwork``: MEND's network where its input is one gradient at a subject, and its output a part of a value.

As the editor network of Eq. 3 it starts as the identity on the gradient. A value must also fit what is asked and the
target, which the gradient at one token tells only in part, so the network reads them, too; and it multiplies, since
which parts of a gradient hold for other phrasings depends on what is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

SCALARS = 3
"""Numbers that the network reads beside vectors."""

SMALLEST_NORM = 1e-12
"""A norm by which vectors may be divided."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the network reads of some edit pairs.

    Attributes:
        key: the input of the MLP at the subject's last token.
        delta: the natural gradient of the loss with respect to the MLP's output there, in units of the stream.
        value: the sum of the parts before, in units of the stream.
        target: the embedding of the target.
        answer: the hidden state in the middle of the model where the target's first token is predicted.
        loss: the loss with the parts before.
    """

    key: Float[Tensor, "row d_in"]
    delta: Float[Tensor, "row d_out"]
    value: Float[Tensor, "row d_out"]
    target: Float[Tensor, "row d_out"]
    answer: Float[Tensor, "row d_out"]
    loss: Float[Tensor, " row"]

    def vectors(self) -> Float[Tensor, "row d"]:
        """Return all as one vector a row: each part with a root mean square of 1, but the value, and the scalars."""
        size = self.delta.norm(dim=1).clamp(min=SMALLEST_NORM)
        scalars = torch.stack([size.log(), self.loss, (-self.loss).exp()], 1)
        parts = [unit_rms(part) for part in (self.key, self.target, self.answer, self.delta)]
        return torch.cat([*parts, self.value, scalars], 1)


def unit_rms(x: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """Return each row with a root mean square of 1."""
    means: Tensor = x.square().mean(1, keepdim=True)
    return x / means.sqrt().clamp(min=SMALLEST_NORM)


class ValueNetwork(nn.Module):
    """δ ↦ δ̃ = A (δ ⊙ (1 + g)) + c, where g and c are computed by two hidden layers of all inputs.

    A starts as the identity, g and c at zero, so that the first output is δ with a root mean square of 1.

    Args:
        steps: the number of steps, which share the network but for a scale and an offset of its first hidden layer, as
            the matrices of one shape do in MEND.
        d_in: the dimension of keys.
        d_out: the dimension of values.
        width: the width of the hidden layers.
    """

    def __init__(self, steps: int, d_in: int, d_out: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(d_in + 4 * d_out + SCALARS, width)
        self.second = nn.Linear(width, width)
        self.gate = nn.Linear(width, d_out)
        self.offset = nn.Linear(width, d_out)
        self.mix = nn.Linear(d_out, d_out, bias=False)
        self.step_scale = nn.Parameter(torch.ones(steps, width))
        self.step_offset = nn.Parameter(torch.zeros(steps, width))
        for layer in (self.gate, self.offset):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.eye_(self.mix.weight)

    def forward(self, inputs: Inputs, step: int) -> Float[Tensor, "row d_out"]:
        """Return the pseudo-delta of each row at a step."""
        hidden = silu(self.first(inputs.vectors()) * self.step_scale[step] + self.step_offset[step])
        hidden = silu(self.second(hidden))
        output: Tensor = self.mix(unit_rms(inputs.delta) * (1 + self.gate(hidden))) + self.offset(hidden)
        return output
