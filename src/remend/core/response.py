"""``Response``: how much a factor pair of a change adds for an input that answers to it with q = u·x."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from remend.errors import EditError, nearest

LINEAR_ACTIVATION = "linear"

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "gelu": torch.nn.functional.gelu,
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": torch.nn.functional.silu,
    "mish": torch.nn.functional.mish,
    "sigmoid": torch.sigmoid,
}
"""The activation functions that an MLP's hidden units may have, under transformers' names."""

_HOMOGENEOUS = ("relu", "relu2")
"""Those of which a(βx) / a(β) is a(x): the sharpness makes no difference."""

SMALLEST_ANSWER = 1e-3
"""The least a(β(1 − θ)), by which a response is divided."""


@dataclass(frozen=True)
class Response:
    """The function f of a change Σ_j delta_j f(u_j·x), with f(1) = 1.

    - linear (the default): f(q) = q, a change of a weight;
    - a hidden unit of an MLP with the activation function a: f(q) = a(β(q − θ)) / a(β(1 − θ));
    - a hidden unit of a gated MLP: f(q) = q · a(β(q − θ)) / a(β(1 − θ)).

    A unit adds its whole delta where q is 1, and little where q is small: of a gated one with a large β, about q² of
    it. A threshold θ takes a bias in the MLP (:func:`remend.core.mlp.find_mlp` tells whether there is one).

    Attributes:
        activation: a, one of :data:`ACTIVATIONS`, or ``linear``.
        gated: whether q is multiplied with the activation.
        beta: β, the sharpness. It makes no difference to relu and relu2, and is then 1.
        threshold: θ, from 0 to below 1.
        scale: a(β(1 − θ)): the activation at an edit's own key, by which it is divided.

    Raises:
        EditError: there is no such activation, or a number is out of its range.
    """

    activation: str = LINEAR_ACTIVATION
    gated: bool = False
    beta: float = 1.0
    threshold: float = 0.0
    scale: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", 1.0)
        if self.activation in _HOMOGENEOUS:
            object.__setattr__(self, "beta", 1.0)
        if self.activation == LINEAR_ACTIVATION:
            if (self.gated, self.beta, self.threshold) != (False, 1.0, 0.0):
                raise EditError("a linear response has no gate, no beta and no threshold: name an activation")
            return
        if self.activation not in ACTIVATIONS:
            known = (LINEAR_ACTIVATION, *ACTIVATIONS)
            raise EditError(f"there is no activation {self.activation!r}; {nearest(self.activation, known)}")
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise EditError(f"the beta of a response is a number above 0, not {self.beta!r}")
        if not 0 <= self.threshold < 1:
            raise EditError(f"the threshold of a response is a number from 0 to below 1, not {self.threshold!r}")
        at_key = torch.tensor(self.beta * (1 - self.threshold), dtype=torch.float64)
        object.__setattr__(self, "scale", float(ACTIVATIONS[self.activation](at_key)))
        if self.scale < SMALLEST_ANSWER:
            raise EditError(
                f"with beta {self.beta:g} and threshold {self.threshold:g}, {self.activation} is {self.scale:.2g} at "
                f"an edit's own key, by which its answer is divided: take a beta with which it is {SMALLEST_ANSWER:g} "
                "or more"
            )

    @staticmethod
    def from_gate(gate: float) -> Response:
        """Return relu(q − gate) / (1 − gate), or the linear response where ``gate`` is 0."""
        return Response("relu", threshold=gate) if gate else LINEAR

    @property
    def linear(self) -> bool:
        """Whether a change with this response is a change of a weight."""
        return self.activation == LINEAR_ACTIVATION

    def __call__(self, q: Float[Tensor, "*rows rank"]) -> Float[Tensor, "*rows rank"]:
        """Compute f(q) of each q."""
        if self.linear:
            return q
        # Without operations that change nothing, whose gradients cost memory.
        inner = q - self.threshold if self.threshold else q
        active = ACTIVATIONS[self.activation](inner * self.beta if self.beta != 1 else inner) / self.scale
        return q * active if self.gated else active

    def __str__(self) -> str:
        """Return the response in words, for tables: ``gated silu, beta 10``."""
        beta = f", beta {self.beta:g}" if self.beta != 1 else ""
        threshold = f", threshold {self.threshold:g}" if self.threshold else ""
        return f"{'gated ' if self.gated else ''}{self.activation}{beta}{threshold}"

    def to_json(self) -> dict[str, Any]:
        """Return the response as a JSON object."""
        return {key: value for key, value in asdict(self).items() if key != "scale"}

    @staticmethod
    def from_json(described: object) -> Response:
        """Read what :meth:`to_json` returned.

        Raises:
            EditError: a field is missing, unknown, of another type or out of its range.
        """
        kinds: dict[str, tuple[type, ...]] = {
            "activation": (str,),
            "gated": (bool,),
            "beta": (int, float),
            "threshold": (int, float),
        }
        if not isinstance(described, dict) or described.keys() != kinds.keys():
            raise EditError(f"a response should be an object of {', '.join(kinds)}, not {str(described)[:80]}")
        for key, kind in kinds.items():
            if not isinstance(described[key], kind) or (isinstance(described[key], bool) and kind != (bool,)):
                raise EditError(f"{key!r} of a response should be {kind[-1].__name__}, it is {described[key]!r}")
        return Response(**described)


LINEAR = Response()
"""The response of a change of a weight."""
