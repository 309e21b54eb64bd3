"""One step of Adam over the editor's parameters, whose large gradients exist one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.core.factored_gradients import FactoredGradients
from remend.editors import Trainable
from remend.errors import TrainingError
from remend.training.config import TrainingConfig
from remend.training.distributed import ProcessGroup

CERTAIN = 1e-4
"""The norm of a gradient that is clipped need not be known better than this; Adam hardly sees its scale."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """What is known of a backward pass over all processes without forming a large gradient.

    Attributes:
        small: the parameters whose gradient is in ``.grad``.
        norms: that gradient's norm, for each of them.
        bounds: for each matrix in the ledger, a number that its gradient's norm does not exceed.
    """

    small: tuple[nn.Parameter, ...]
    norms: Float[Tensor, " small"]
    bounds: Float[Tensor, " weight"]

    @property
    def bound(self) -> Float[Tensor, ""]:
        """What the norm of the whole gradient does not exceed; finite only if every gradient is."""
        bound: Tensor = torch.cat((self.norms, self.bounds)).norm()
        return bound


class EditorOptimizer:
    """Adam, with the paper's two rates: one for the editor networks, one for the step sizes α.

    A backward pass leaves the small parameters' gradients in ``.grad`` and the factors of the matrices' in the ledger;
    of those, only one is ever dense.

    Attributes:
        ledger: the factors.
        names: the editor's parameters with their names.
        adam: the moments.
    """

    def __init__(
        self, editor: Trainable, config: TrainingConfig, workers: ProcessGroup, product_dtype: torch.dtype
    ) -> None:
        self.config = config
        self.workers = workers
        self.ledger = FactoredGradients(product_dtype)
        self.names = {parameter: name for name, parameter in editor.named_parameters()}
        self._unmoved = dict(self.names)
        networks = [parameter for parameter in self.names if parameter is not editor.alpha]
        rates = (networks, config.learning_rate), ([editor.alpha], config.alpha_learning_rate)
        self.adam = torch.optim.Adam([{"params": own, "lr": rate, "full": rate} for own, rate in rates], fused=True)

    @property
    def learning_rate(self) -> float:
        """The editor networks', of the last step."""
        return float(self.adam.param_groups[0]["lr"])

    def clear(self) -> None:
        """Forget all gradients."""
        self.ledger.clear()
        self.adam.zero_grad()

    def gather(self, loss: Float[Tensor, ""]) -> Gradients:
        """Add up ``loss`` and the small gradients over all processes, in place; returns what is known then."""
        small = {parameter: parameter.grad for parameter in self.names if parameter.grad is not None}
        bounds = self.ledger.norm_bounds().to(loss.device)
        self.workers.sum(loss, bounds, *small.values())
        return Gradients(tuple(small), torch.stack([gradient.norm() for gradient in small.values()]), bounds)

    def check_flow(self, gradients: Gradients, first: bool) -> None:
        """Assert that every tensor of the editor is reached by a gradient that is not zero.

        At the very first step the gradients of V and of the scales *are* zero, since U starts at zero; so a tensor may
        be without one at the first step, and no longer at the second.

        Raises:
            TrainingError: a tensor was not.
        """
        if not self._unmoved:
            return
        reached = zip((*gradients.small, *self.ledger.weights()), (*gradients.norms, *gradients.bounds), strict=True)
        for parameter, norm in reached:
            if norm > 0:
                self._unmoved.pop(parameter, None)
        if self._unmoved and not first:
            raise TrainingError(
                f"no gradient reaches {', '.join(self._unmoved.values())} of the editor: it would train and learn "
                "nothing. Check that the edited modules lie on the path from the prompt to the loss"
            )

    def step(self, gradients: Gradients, share: float) -> None:
        """Move every parameter, with the whole gradient clipped; no gradient is left.

        Args:
            gradients: what :meth:`gather` found.
            share: of the run that is done, for the decay of the learning rates.
        """
        for group in self.adam.param_groups:
            group["lr"] = group["full"] * (1 - share if self.config.decay else 1)
        factor = self.clipping(gradients)
        for parameter in gradients.small:
            if parameter.grad is not None and factor < 1:
                parameter.grad *= factor
        self.adam.step()  # a parameter without a gradient is left as it is
        self.adam.zero_grad()
        for weight, gradient in self._dense():
            weight.grad = gradient.mul_(factor) if factor < 1 else gradient
            self.adam.step()
            weight.grad = None
        self.ledger.clear()

    def clipping(self, gradients: Gradients) -> float:
        """The factor that brings the norm of the whole gradient down to the largest allowed, or 1.

        The norm lies between that of the small parameters' gradients and the bound. As a rule that settles it: nothing
        is clipped, or α's gradient outweighs all others. Only otherwise is each matrix's own taken.
        """
        bound, norm = float(gradients.bound), float(gradients.norms.norm())
        if bound <= self.config.gradient_clip:
            return 1.0
        if bound - norm > CERTAIN * bound:
            several = self.workers.count > 1  # then the sum over processes must be formed
            large = torch.stack([g.norm() for _, g in self._dense()]) if several else self.ledger.norms()
            norm = float(torch.cat((gradients.norms, large)).norm())
        return min(1.0, self.config.gradient_clip / (norm + 1e-6))

    def broken(self) -> list[str]:
        """The names of the parameters whose gradient in this process is not finite."""
        names = [name for p, name in self.names.items() if p.grad is not None and not p.grad.isfinite().all()]
        weights = zip(self.ledger.weights(), self.ledger.norm_bounds(), strict=True)
        return names + [self.names[weight] for weight, bound in weights if not bound.isfinite()]

    def _dense(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each large matrix with its gradient over all processes; one at a time."""
        for weight, gradient in self.ledger.gradients():
            self.workers.sum(gradient)
            yield weight, gradient
