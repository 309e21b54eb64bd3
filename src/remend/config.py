"""Reading and writing configurations: frozen dataclasses as versioned JSON objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, TypeVar

from remend.errors import ConfigError, nearest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Config = TypeVar("Config", bound=DataclassInstance)

VERSION = 1


def to_json(config: DataclassInstance) -> dict[str, Any]:
    """The configuration as a JSON object with its version."""
    return {"version": VERSION, **asdict(config)}


def from_json(kind: type[Config], content: Mapping[str, Any]) -> Config:
    """A configuration of class ``kind`` from what :func:`to_json` gave.

    Raises:
        ConfigError: the version is unknown, a key is (the nearest known one is named), or a value is of another type.
    """
    values = dict(content)
    version = values.pop("version", None)
    if version != VERSION:
        raise ConfigError(f"{kind.__name__}: version {version!r} is not known to this release, which reads {VERSION}")
    known = {field.name: field for field in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{kind.__name__} has no setting {key!r}; {nearest(key, known)}")
        expected = known[key].type
        if not isinstance(value, bool) and expected == "float" and isinstance(value, int):
            values[key] = float(value)
        elif type(value).__name__ != expected:
            raise ConfigError(f"{kind.__name__}.{key} should be {expected}, it is {value!r}")
    return kind(**values)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the keys whose values differ between two JSON objects, those of nested objects as ``outer.inner``."""
    names = []
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names += [f"{key}.{inner}" for inner in differences(old, new)]
        elif old != new:
            names.append(key)
    return names
