"""The distribution that a model's output describes at a target: its loss, divergence and most probable value.

Tasks differ in what their outputs mean (logits over a vocabulary or over labels, mean and spread of an action).
Training, editors and metrics ask the distribution, so that none of them assumes a softmax.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from remend.core.losses import locality_loss, row_mean, target_loss


class Distribution(ABC):
    """A distribution over targets whose parameters are a model's outputs, one row for each target.

    A target that consists of several numbers (the tokens of an answer, the dimensions of an action) is several rows:
    their distributions are independent given what the model was shown.

    Attributes:
        discrete: whether targets are numbers of a finite set, so that a target has a rank among all others.
    """

    discrete: bool

    @abstractmethod
    def loss(
        self, outputs: Float[Tensor, "target output"], target: Shaped[Tensor, " target"], row: Tensor, rows: int
    ) -> Float[Tensor, " row"]:
        """Return −log p of the targets of each row, averaged over them, in nats (the paper's l_e)."""

    @abstractmethod
    def divergence(
        self,
        before: Float[Tensor, "target output"],
        after: Float[Tensor, "target output"],
        row: Tensor,
        rows: int,
    ) -> Float[Tensor, " row"]:
        """Return KL(before ‖ after) of each row, averaged over its targets, in nats (the paper's L_loc, Eq. 4).

        Differentiable with respect to ``after`` only.
        """

    @abstractmethod
    def mode(self, outputs: Float[Tensor, "target output"]) -> Shaped[Tensor, " target"]:
        """Return the most probable value of each target."""

    @abstractmethod
    def correct(
        self, outputs: Float[Tensor, "target output"], target: Shaped[Tensor, " target"]
    ) -> Bool[Tensor, " target"]:
        """Tell for each target whether the most probable value is the target."""

    @abstractmethod
    def unchanged(
        self, before: Float[Tensor, "target output"], after: Float[Tensor, "target output"]
    ) -> Bool[Tensor, " target"]:
        """Tell for each target whether the most probable value is the same after a change as before."""

    def same_value(self, value: float, other: float) -> bool:
        """Tell whether two values of a target count as the same."""
        return value == other

    @abstractmethod
    def margin(
        self, outputs: Float[Tensor, "target output"], target: Shaped[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        """Return how far each target is from not being predicted: positive where it is, in units of the outputs."""

    @abstractmethod
    def log_prob(
        self, outputs: Float[Tensor, "target output"], target: Shaped[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        """Return log p of each target, in nats (of a density, per unit of the target)."""


class Categorical(Distribution):
    """A softmax over classes: the tokens of a vocabulary, labels, discrete actions. The outputs are logits."""

    discrete = True

    def loss(
        self, outputs: Float[Tensor, "target output"], target: Shaped[Tensor, " target"], row: Tensor, rows: int
    ) -> Float[Tensor, " row"]:
        """Return the cross entropy of each row."""
        return target_loss(outputs, target, row, rows)

    def divergence(
        self,
        before: Float[Tensor, "target output"],
        after: Float[Tensor, "target output"],
        row: Tensor,
        rows: int,
    ) -> Float[Tensor, " row"]:
        """Return the KL divergence of the softmax distributions of each row."""
        return locality_loss(before, after, row, rows)

    def mode(self, outputs: Float[Tensor, "target output"]) -> Int[Tensor, " target"]:
        """Return the class with the largest logit, the first of equal ones."""
        return outputs.argmax(-1)

    def correct(
        self, outputs: Float[Tensor, "target output"], target: Shaped[Tensor, " target"]
    ) -> Bool[Tensor, " target"]:
        """Compare the class with the largest logit with the target."""
        return outputs.argmax(-1) == target

    def unchanged(
        self, before: Float[Tensor, "target output"], after: Float[Tensor, "target output"]
    ) -> Bool[Tensor, " target"]:
        """Compare the classes with the largest logits."""
        return after.argmax(-1) == before.argmax(-1)

    def margin(
        self, outputs: Float[Tensor, "target output"], target: Shaped[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        """Return the target's logit minus the largest of the others."""
        rival = outputs.scatter(1, target[:, None], -torch.inf).max(1).values
        return outputs.gather(1, target[:, None])[:, 0] - rival

    def log_prob(
        self, outputs: Float[Tensor, "target output"], target: Shaped[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        """Return the target's log softmax, in float32."""
        return outputs.float().log_softmax(-1).gather(1, target[:, None])[:, 0]


class Gaussian(Distribution):
    """A normal distribution of one number, such as one dimension of an action. The outputs are its mean and log σ.

    Args:
        tolerance: how far the mean may lie from a target that still counts as predicted, in units of the target.
    """

    discrete = False

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance

    def loss(
        self, outputs: Float[Tensor, "target output"], target: Shaped[Tensor, " target"], row: Tensor, rows: int
    ) -> Float[Tensor, " row"]:
        """Return the negative log density of each row."""
        return row_mean(-self.log_prob(outputs, target), row, rows)

    def divergence(
        self,
        before: Float[Tensor, "target output"],
        after: Float[Tensor, "target output"],
        row: Tensor,
        rows: int,
    ) -> Float[Tensor, " row"]:
        """Return KL(N(μ, σ) ‖ N(μ', σ')) = log σ'/σ + (σ² + (μ − μ')²) / 2σ'² − 1/2 of each row."""
        (mean, log_std), (other_mean, other_log_std) = (x.float().unbind(-1) for x in (before.detach(), after))
        squares = (2 * log_std).exp() + (mean - other_mean).square()
        return row_mean(other_log_std - log_std + squares / (2 * (2 * other_log_std).exp()) - 0.5, row, rows)

    def mode(self, outputs: Float[Tensor, "target output"]) -> Float[Tensor, " target"]:
        """Return the mean."""
        return outputs[:, 0]

    def correct(
        self, outputs: Float[Tensor, "target output"], target: Shaped[Tensor, " target"]
    ) -> Bool[Tensor, " target"]:
        """Tell whether the mean lies within the tolerance of the target."""
        return self.margin(outputs, target) > 0

    def unchanged(
        self, before: Float[Tensor, "target output"], after: Float[Tensor, "target output"]
    ) -> Bool[Tensor, " target"]:
        """Tell whether the means lie within the tolerance of each other."""
        return (before[:, 0] - after[:, 0]).abs() < self.tolerance

    def same_value(self, value: float, other: float) -> bool:
        """Tell whether two values lie within the tolerance of each other."""
        return abs(value - other) < self.tolerance

    def margin(
        self, outputs: Float[Tensor, "target output"], target: Shaped[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        """Return what is left of the tolerance."""
        return self.tolerance - (outputs[:, 0] - target).abs()

    def log_prob(
        self, outputs: Float[Tensor, "target output"], target: Shaped[Tensor, " target"]
    ) -> Float[Tensor, " target"]:
        """Return the log density, in float32."""
        mean, log_std = outputs.float().unbind(-1)
        scaled = (target - mean) * (-log_std).exp()
        return -0.5 * scaled.square() - log_std - 0.5 * math.log(2 * math.pi)
