"""``MendConfig``: the settings of MEND."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from remend.config import Config, Factor
from remend.errors import ConfigError


@dataclass(frozen=True)
class MendConfig(Config):
    """Settings of MEND; the defaults are the paper's.

    Attributes:
        rank: the inner width r of the editor networks; d_in + d_out where that is smaller (paper: 1920).
        alpha: the initial step size α_ℓ of every matrix (paper: 1e-4).
        ridge: if not 0, u is whitened by the layer's input covariance before the editor network and ũ after it, with
            this share of the mean eigenvalue as the floor (the paper does not whiten). The edit stays as low-rank.
        relative: whether α is in units in which 1 changes a layer's output at an edited token by about the output's
            own size, so that one setting suits models of any width and scale (in the paper it is not).
        outputs_only: whether only the narrowing matrices of the MLPs are edited, unless others are named (the paper
            edits the widening ones too).
        tokens: the tokens of the edit that take part: ``all`` that carry gradient (the paper), or ``target``, those at
            which the target is predicted.
        limit: if not 0, gradients at a matrix are clipped to this multiple of their usual norm there (the geometric
            mean over the training set). A classifier that is sure of its answers has gradients of very different
            sizes; without a limit the few large ones make edits that ruin the model.
        contrast: if not 0, ũ is turned towards what a prompt shares with its paraphrases and away from what it shares
            with its neighbours, with this weight (:mod:`remend.core.key_discriminant`), and scaled so that each token
            responds to its own edit with 1. Needs ``tokens`` = ``target``.
        ordinary: how much ordinary inputs count, against prompts, among those that ũ is turned away from: the more,
            the less an edit changes of ordinary text. They are the text that training is given or, of a decoder, what
            it writes by itself; inputs are whitened over them. Other models have none without a text. Has no effect
            where inputs are not whitened and there is no ``contrast``.
        settle: if not 0, each edit is scaled by √(settle · s) when it is made, where s is the scale at which the first
            token of its target just becomes the model's answer (:mod:`remend.editors.strength_search`).
        gate: if not 0, edits act only on keys that respond to them with more than this (their own key responds with
            1). Fewer neighbours change, but an edit is not a low-rank change of weights any more, and cannot be
            merged, compressed or exported as an adapter. Needs ``contrast``.
        share: whether all edited matrices of one shape share an editor network (section 3.2); if not, each has its own.
            This and the next three are the paper's ablations (section 5.4, Table 6), for comparison.
        normalise: whether the networks read u and δ with zero mean and unit variance per dimension (section 3.2). If
            not, no one step size suits all models; ``relative`` helps.
        identity: whether U starts at zero, so that the networks start as the identity (appendix A); if not, it starts
            Xavier-uniform as V does.
        transforms: which of u and δ the networks read and transform: ``both``, ``u``, ``delta``, or ``smaller``, the
            one with fewer dimensions (u if they have equally many). The other one enters the edit as it is: not
            normalized, but whitened, clipped or multiplied by the discriminant where the settings above say so.
        aggregate: how several requests become one edit: ``sum`` (section 3.1), or ``least-squares``, after which each
            still acts at its own tokens as it does alone (:mod:`remend.core.least_squares`).
    """

    rank: PositiveInt = 1920
    alpha: PositiveFloat = 1e-4
    ridge: NonNegativeFloat = 0.0
    relative: bool = False
    outputs_only: bool = False
    tokens: Literal["all", "target"] = "all"
    limit: NonNegativeFloat = 0.0
    contrast: NonNegativeFloat = 0.0
    ordinary: NonNegativeFloat = 0.0
    settle: NonNegativeFloat = 0.0
    gate: Factor = 0.0
    share: bool = True
    normalise: bool = True
    identity: bool = True
    transforms: Literal["both", "u", "delta", "smaller"] = "both"
    aggregate: Literal["sum", "least-squares"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate and not self.contrast:
            raise ConfigError("a gate needs keys that respond to their own edit with 1: give contrast too")
        if self.contrast and self.tokens != "target":
            raise ConfigError(
                "contrast compares the keys of the tokens that predict a target: give tokens='target' too"
            )
