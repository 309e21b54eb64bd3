"""The errors that remend raises on purpose, and helpers for their messages.

    RemendError
    ├── RequestError          an edit request or a data file that cannot be read
    ├── ConfigError           a configuration with an unknown key or a value out of range
    │   └── RegistryError      ... or a name that is not registered, registered twice, or cannot be imported
    ├── ModelError            a model that cannot be loaded or edited
    │   └── NonFiniteError    NaN or infinity in weights, activations, statistics or losses
    ├── EditError             an edit that cannot be applied, merged or reverted
    │   ├── WrongBaseError    ... because it was made for another model
    │   └── PrecisionError    ... because the weights would round it away, or are quantized
    ├── FileError             a saved edit or editor that is damaged, altered, unknown, or cannot be written
    └── TrainingError         a training run that cannot learn (no gradient, no data, shared subjects)

A message says what arrived, what was allowed and what to do next. Any other error (``KeyError``, ``RuntimeError`` from
torch) is a defect of remend.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class RemendError(Exception):
    """The root: catch it to catch all errors that remend raises on purpose."""


class RequestError(RemendError, ValueError):
    """An edit request, or the file that holds it, is malformed."""


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
    """The edit or the editor was made for another model."""


class PrecisionError(EditError):
    """The weights cannot hold the merged edit: their dtype would round it away, or they are quantized."""


class FileError(RemendError, ValueError):
    """A saved edit or editor is damaged, altered, of an unknown version, or cannot be written."""


class TrainingError(RemendError):
    """A training run cannot learn, and was stopped."""


MAX_LISTED_NAMES = 20
"""How many of the known names a message lists."""
MAX_LENGTH_DIFFERENCE, MIN_MISSPELT_LENGTH = 2, 4
"""How many letters a misspelt name may have more or less, and how many at least: ``idx`` is no misspelt ``id``."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a clause that suggests the known name closest to ``name``, or lists the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" … ({len(names)} in all)" if len(names) > MAX_LISTED_NAMES else ""
    return "known: " + (", ".join(names[:MAX_LISTED_NAMES]) + more if names else "none")


# Cached, since many requests have the same keys.
@functools.lru_cache(maxsize=1024)
def intended_name(name: str, known: tuple[str, ...]) -> str | None:
    """Return the known name of which another is a misspelling: other case, two letters more or less, or rearranged."""
    plain = name.casefold()
    near = [other for other in known if abs(len(other) - len(plain)) <= MAX_LENGTH_DIFFERENCE]
    matches = [other for other in known if other == plain]
    if len(plain) >= MIN_MISSPELT_LENGTH:
        matches += [other for other in near if sorted(other) == sorted(plain)]
        matches += difflib.get_close_matches(plain, near, n=1, cutoff=0.8)
    return next(iter(matches), None)


@contextmanager
def prefix_request_errors(what: str) -> Iterator[None]:
    """Prefix the message of a :class:`RequestError` that is raised within the context with ``what``, the request."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{what}: {error}") from None


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Let every error of remend that is raised within say of which file or folder it speaks."""
    try:
        yield
    except RemendError as error:
        if str(path) not in str(error):
            error.args = (f"{path}: {error}",)
        raise
