"""``EditorOptimizer``: Adam over an editor's parameters, forming one large gradient at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.core.distributed import ProcessGroup
from remend.core.editor_gradients import FactoredGradients
from remend.editors.trainable import TrainableEditor
from remend.errors import TrainingError
from remend.training.config import TrainingConfig

NORM_TOLERANCE = 1e-4
"""The relative error allowed in the norm of a gradient that is clipped: Adam is nearly invariant to its scale."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """What is known of the gradient, summed over all processes, without forming a large matrix's part of it.

    Attributes:
        small: the parameters whose gradient is in ``.grad``.
        norms: the norm of the gradient of each of them.
        bounds: for each matrix of the factored gradients, an upper bound of its gradient's norm.
    """

    small: tuple[nn.Parameter, ...]
    norms: Float[Tensor, " small"]
    bounds: Float[Tensor, " weight"]

    @property
    def bound(self) -> Float[Tensor, ""]:
        """An upper bound of the norm of the whole gradient; finite only if every gradient is."""
        bound: Tensor = torch.cat((self.norms, self.bounds)).norm()
        return bound


class EditorOptimizer:
    """Adam with the paper's two learning rates: one for the editor networks, one for the step sizes α.

    A backward pass leaves the gradients of small parameters in ``.grad``, and those of the networks' matrices as
    factors in :attr:`factored_gradients`. Only one of the latter is dense at any time.

    Attributes:
        factored_gradients: the factors.
        names: the name of each parameter of the editor.
        adam: the optimizer with its moments.
    """

    def __init__(
        self, editor: TrainableEditor, config: TrainingConfig, process_group: ProcessGroup, product_dtype: torch.dtype
    ) -> None:
        self.config = config
        self.process_group = process_group
        self.factored_gradients = FactoredGradients(product_dtype)
        self.names = {parameter: name for name, parameter in editor.named_parameters()}
        self._without_gradient = dict(self.names)
        groups = editor.parameter_groups()
        rates = (groups.networks, config.learning_rate), (groups.step_sizes, config.alpha_learning_rate)
        self.adam = torch.optim.Adam(
            [{"params": list(group), "lr": rate, "full_lr": rate} for group, rate in rates], fused=True
        )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the editor networks in the last step."""
        return float(self.adam.param_groups[0]["lr"])

    def clear(self) -> None:
        """Delete all gradients."""
        self.factored_gradients.clear()
        self.adam.zero_grad()

    def gather(self, loss: Float[Tensor, ""]) -> Gradients:
        """Sum ``loss`` and the small gradients over all processes, in place, and return what is known of them."""
        small = {parameter: parameter.grad for parameter in self.names if parameter.grad is not None}
        bounds = self.factored_gradients.norm_bounds().to(loss.device)
        self.process_group.sum(loss, bounds, *small.values())
        return Gradients(tuple(small), torch.stack([gradient.norm() for gradient in small.values()]), bounds)

    def check_flow(self, gradients: Gradients, first: bool) -> None:
        """Check that every tensor of the editor has received a gradient that is not zero.

        Args:
            gradients: the step's gradients.
            first: whether this is the first step. Gradients of V and of the scales are zero then, since U starts at
                zero; so a missing one is an error from the second step on.

        Raises:
            TrainingError: a tensor has received none.
        """
        if not self._without_gradient:
            return
        parameters = (*gradients.small, *self.factored_gradients.weights())
        for parameter, norm in zip(parameters, (*gradients.norms, *gradients.bounds), strict=True):
            if norm > 0:
                self._without_gradient.pop(parameter, None)
        if self._without_gradient and not first:
            raise TrainingError(
                f"no gradient reaches {', '.join(self._without_gradient.values())} of the editor: it would train and "
                "learn nothing. Check that the edited modules lie on the path from the prompt to the loss"
            )

    def step(self, gradients: Gradients, share: float) -> None:
        """Update every parameter with the clipped gradient, and delete the gradients.

        Args:
            gradients: what :meth:`gather` returned.
            share: the share of the run that is done, for the decay of the learning rates.
        """
        for group in self.adam.param_groups:
            group["lr"] = group["full_lr"] * (1 - share if self.config.decay else 1)
        factor = self.clip_factor(gradients)
        for parameter in gradients.small:
            if parameter.grad is not None and factor < 1:
                parameter.grad *= factor
        # Adam skips parameters whose gradient is None, so each call of step() updates only those that have one: first
        # all small ones, then one large matrix after the other, whose gradients share one buffer.
        self.adam.step()
        self.adam.zero_grad()
        for weight, gradient in self._dense_gradients():
            weight.grad = gradient.mul_(factor) if factor < 1 else gradient
            self.adam.step()
            weight.grad = None
        self.factored_gradients.clear()

    def clip_factor(self, gradients: Gradients) -> float:
        """Compute the factor that reduces the norm of the whole gradient to the largest allowed, or 1.

        The norm lies between that of the small parameters' gradients and the upper bound. Usually these decide: nothing
        is clipped, or α's gradient outweighs all others. Only otherwise is the norm of each matrix's gradient computed.
        """
        bound, norm = float(gradients.bound), float(gradients.norms.norm())
        if bound <= self.config.gradient_clip:
            return 1.0
        if bound - norm > NORM_TOLERANCE * bound:
            # Norms cannot be summed over processes: each gradient has to be formed and summed.
            if self.process_group.count > 1:
                large = torch.stack([gradient.norm() for _, gradient in self._dense_gradients()])
            else:
                large = self.factored_gradients.norms()
            norm = float(torch.cat((gradients.norms, large)).norm())
        return min(1.0, self.config.gradient_clip / (norm + 1e-6))

    def non_finite(self) -> list[str]:
        """Return the names of the parameters whose gradient in this process is not finite."""
        names = [name for p, name in self.names.items() if p.grad is not None and not p.grad.isfinite().all()]
        weights = zip(self.factored_gradients.weights(), self.factored_gradients.norm_bounds(), strict=True)
        return names + [self.names[weight] for weight, bound in weights if not bound.isfinite()]

    def _dense_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each large matrix with its gradient, summed over all processes; one at a time."""
        for weight, gradient in self.factored_gradients.gradients():
            self.process_group.sum(gradient)
            yield weight, gradient
