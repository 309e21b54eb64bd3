"""Settings of a MEND editor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from remend.config import Config, Factor
from remend.errors import ConfigError


@dataclass(frozen=True)
class MendConfig(Config):
    """The editor network's size and its starting step.

    Attributes:
        rank: inner width r of the editor networks; d_in + d_out where that is smaller (paper: 1920).
        alpha: the step size α_ℓ that every matrix starts with (paper: 1e-4).
        ridge: if not 0, u is whitened by the layer's input covariance before the editor network and ũ after it, with
            this share of the mean eigenvalue as the floor (the paper does not). The edit stays as low-rank as before.
        relative: whether α counts in units in which 1 would change a layer's output at an edited token by about the
            output's own size, so that one setting suits models of any width and scale (in the paper it does not).
        outputs_only: whether the MLPs' narrowing matrices alone are edited, unless others are named (the paper edits
            the widening ones too).
        tokens: which tokens of the edit take part: ``all`` that carry gradient (the paper), or ``target``, those at
            which the target is predicted.
        limit: if not 0, a gradient that is larger at a matrix than so many times what is usual there (the geometric
            mean over training) counts as that large. A classifier that is sure of itself has gradients of very
            different sizes: without a limit the few large ones make edits that ruin the model.
        contrast: if not 0, ũ is turned towards what a prompt shares with its paraphrases and away from what it shares
            with its neighbours, the latter weighted so (:mod:`remend.core.discriminant`), and scaled so that each token
            answers to its own edit with 1. Needs ``tokens`` = ``target``.
        settle: if not 0, each edit is scaled by √(settle · s) when it is made, where s is the scale at which the first
            token of its target just takes (:mod:`remend.editors.strength_search`).
        gate: if not 0, edits act only on keys that answer to them with more than this (their own answer with 1): fewer
            neighbours change, but an edit is no low-rank change of weights any more, and cannot be merged, compressed
            or exported as an adapter. Needs ``contrast``.
        share: whether all edited matrices of one shape share an editor network (section 3.2); if not, each has its own.
            This and the following three are the paper's ablations (section 5.4, Table 6), there to be compared with.
        normalise: whether the networks read u and δ with zero mean and unit variance per dimension (section 3.2); if
            not, as they are, for which no one step size suits all models: ``relative`` helps.
        identity: whether U starts at zero, so that the networks start as the identity (appendix A); if not, it starts
            Xavier-uniform as V does.
        transforms: which of u and δ the networks read and transform: ``both``, ``u``, ``delta``, or ``smaller``, for
            each matrix the one of fewer dimensions (u, if they have as many). The other one makes up the edit as it
            is: not normalised, but whitened, limited or aimed by contrast where the settings above say so.
        aggregate: how several requests become one edit: ``sum`` (section 3.1), or ``least-squares``, after which each
            still acts at its own tokens as if it were alone (:mod:`remend.core.least_squares`).
    """

    rank: PositiveInt = 1920
    alpha: PositiveFloat = 1e-4
    ridge: NonNegativeFloat = 0.0
    relative: bool = False
    outputs_only: bool = False
    tokens: Literal["all", "target"] = "all"
    limit: NonNegativeFloat = 0.0
    contrast: NonNegativeFloat = 0.0
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
            raise ConfigError("a gate needs keys that answer to their own edit with 1: give contrast too")
        if self.contrast and self.tokens != "target":
            raise ConfigError(
                "contrast compares the keys of the tokens that predict a target: give tokens='target' too"
            )
