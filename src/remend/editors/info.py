"""What every editor says of itself, and checks before it edits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from remend.errors import ConfigError, RequestError
from remend.fingerprint import ModelFingerprint
from remend.request import EditRequest


@dataclass(frozen=True)
class EditorInfo:
    """What an editor needs before its first edit, and what its edits are.

    Attributes:
        name: how it is called on the command line and in files.
        source: the paper that it is from.
        needs: ``nothing``; ``text`` (statistics of some text); or ``training`` (on requests of other subjects).
        result: what an edit of it is: ``low-rank``; ``dense`` (a whole matrix's change, kept as factors of full rank,
            so that it is applied, reverted, saved and merged like any other); or ``outside`` (no change of a weight).
        batches: whether several requests can be more than the sum of their edits: made true together.
        sequences: whether an edit can be added to an earlier one of another request; if not, both are one edit's.
    """

    name: str
    source: str
    needs: str
    result: str = "low-rank"
    batches: bool = False
    sequences: bool = True


def checked(
    base: ModelFingerprint, model: PreTrainedModel, requests: Sequence[EditRequest], trained: bool = True
) -> ModelFingerprint:
    """The identity of ``model`` for an edit, after checking that an editor for ``base`` may edit it.

    Args:
        base: the model that the editor is for.
        model: the one that it is given.
        requests: what it is asked to do.
        trained: whether it was trained for that model's weights or measured them, and does worse with others.

    Raises:
        RequestError: there is no request.
        WrongBaseError: the model is of another kind.
    """
    if not requests or isinstance(requests, EditRequest) or not all(isinstance(r, EditRequest) for r in requests):
        raise RequestError("give a list of at least one EditRequest(prompt=…, target=…)")
    base.check_architecture(model, "this editor")
    found = base.recomputed_for(model)
    if trained and found.weights != base.weights:
        warnings.warn(
            f"this editor was trained for {base.name!r}, or measured it, with other weights than this model has; "
            "its edits may be worse: evaluate them",
            stacklevel=4,
        )
    return found


def refuse_unused(name: str, **options: object) -> None:
    """Refuse options of ``create`` that an editor has no use for.

    Raises:
        ConfigError: one was given.
    """
    if given := [option for option, value in options.items() if value]:
        raise ConfigError(f"{name} takes no {' and no '.join(given)}")
