"""Every error that remend raises on purpose.

    RemendError
    ├── RequestError          an edit request or a data file that cannot be read
    ├── ConfigError           a configuration with an unknown key or an impossible value
    │   └── RegistryError      ... or a name that is not registered, registered twice, or cannot be imported
    ├── ModelError            a model that cannot be loaded or edited
    │   └── NonFiniteError    NaN or infinity in weights, activations, statistics or losses
    ├── EditError             an edit that cannot be applied, merged or reverted
    │   ├── WrongBaseError    ... because it was made for another model
    │   └── PrecisionError    ... because the weights would round it away, or are quantised
    ├── FileError             a saved edit or editor that is damaged, altered, unknown, or cannot be written
    └── TrainingError         a training run that cannot learn (no gradient, no data, shared subjects)

A message says what arrived, what was allowed and what to do next. What is not listed here (``KeyError``,
``RuntimeError`` from torch) is a defect of remend.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class RemendError(Exception):
    """The root: catch this to catch everything remend raises on purpose."""


class RequestError(RemendError, ValueError):
    """An edit request, or the file it stands in, is not what it should be."""


class ConfigError(RemendError, ValueError):
    """A configuration has an unknown key or a value outside its range."""


class RegistryError(ConfigError):
    """A name is not registered, is registered twice, or what it stands for cannot be imported."""


class ModelError(RemendError):
    """The model cannot be loaded, or has nothing that can be edited."""


class NonFiniteError(ModelError, ArithmeticError):
    """NaN or infinity appeared; the message names the layer and the batch."""


class EditError(RemendError):
    """An edit cannot be applied, merged or reverted."""


class WrongBaseError(EditError):
    """The edit, or the editor, was made for another model."""


class PrecisionError(EditError):
    """The weights are too coarse to hold the merged edit: their dtype would round it away, or they are quantised."""


class FileError(RemendError, ValueError):
    """A saved edit or editor is damaged, altered, of an unknown version, or cannot be written."""


class TrainingError(RemendError):
    """A training run cannot learn, and stopped instead of pretending to."""


MOST_NAMED = 20
"""Of long lists of known names, so many are named."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names the known word closest to ``name``, or lists what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" … ({len(names)} in all)" if len(names) > MOST_NAMED else ""
    return "known: " + (", ".join(names[:MOST_NAMED]) + more if names else "none")


@contextmanager
def prefix_request_errors(what: str) -> Iterator[None]:
    """Within it, a :class:`RequestError` says which request it is about."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{what}: {error}") from None
