"""The base class of configurations: frozen dataclasses that check their fields and are written as versioned JSON."""

from __future__ import annotations

import functools
import inspect
import json
import re
import reprlib
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import pydantic

from remend.errors import ConfigError, nearest

VERSION = 1
"""Written into every configuration, and the only one that is read."""

Factor = Annotated[float, pydantic.Field(ge=0, lt=1)]
"""A number from 0 to below 1."""
Share = Annotated[float, pydantic.Field(ge=0, le=1)]
"""A number from 0 to 1."""

AnyConfig = TypeVar("AnyConfig", bound="Config")


class Config:
    """A frozen dataclass whose annotations say which values each field takes.

    A subclass is a ``@dataclass(frozen=True)`` with annotations that pydantic knows: ``PositiveInt``, ``Literal["a",
    "b"]``, ``Annotated[float, Field(ge=0, lt=1)]``, ``… | None``. Values are checked strictly: ``1`` is no bool,
    ``"1"`` no number, and NaN and infinity are refused. An int is taken for a float. Rules about several fields go
    into the subclass' ``__post_init__``, after ``super().__post_init__()``. The docstring's ``Attributes:`` section
    describes every field (:func:`settings` reads it).

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __post_init__(self) -> None:
        for name, validator in _validators(type(self)).items():
            value = getattr(self, name)
            try:
                checked = validator.validate_python(value)
            except pydantic.ValidationError as error:
                raise _wrong_value(type(self), name, value, error) from None
            object.__setattr__(self, name, checked)  # what pydantic converted: an int for a float


@dataclass(frozen=True)
class Setting:
    """One field of a configuration, described for a command line or a form.

    Attributes:
        name: the field's.
        kind: the type of its value: ``int``, ``float``, ``bool``, ``str``, or another.
        default: its default; ``dataclasses.MISSING`` if it must be given.
        optional: whether None is allowed.
        choices: the allowed values, if they are few.
        allowed: what is allowed, in words, such as "a whole number of at least 1".
        help: what the field means, the text of the class' ``Attributes:`` section.
    """

    name: str
    kind: Any
    default: Any
    optional: bool
    choices: tuple[Any, ...]
    allowed: str
    help: str


def settings(kind: type[Config]) -> tuple[Setting, ...]:
    """Describe the fields of a configuration class, in their order."""
    hints, descriptions = get_type_hints(kind, include_extras=True), _descriptions(kind)
    described = []
    for field in fields(kind):
        value_type, constraints, optional = _parts(hints[field.name])
        choices = get_args(value_type) if get_origin(value_type) is Literal else ()
        described.append(
            Setting(
                field.name,
                type(choices[0]) if choices else value_type,
                _default(field),
                optional,
                choices,
                _allowed(value_type, constraints, optional),
                descriptions.get(field.name, ""),
            )
        )
    return tuple(described)


def to_json(config: Config) -> dict[str, Any]:
    """Return the configuration as a JSON object with its version."""
    validators = _validators(type(config))
    return {"version": VERSION} | {
        name: validator.dump_python(getattr(config, name), mode="json") for name, validator in validators.items()
    }


def from_json(kind: type[AnyConfig], content: Mapping[str, Any]) -> AnyConfig:
    """Build a configuration of class ``kind`` from what :func:`to_json` returned; missing keys get their defaults.

    Raises:
        ConfigError: the version is unknown, a key is (the message names the nearest known one), or a value is of the
            wrong type or out of range.
    """
    values = dict(content)
    version = values.pop("version", None)
    if version != VERSION:
        raise ConfigError(f"{kind.__name__}: version {version!r} is not known to this release, which reads {VERSION}")
    validators = _validators(kind)
    for name, value in values.items():
        if name not in validators:
            raise ConfigError(f"{kind.__name__} has no setting {name!r}; {nearest(name, validators)}")
        try:
            # JSON has no tuples and no paths: lists and strings are taken for them here, but not by the constructor.
            values[name] = validators[name].validate_json(json.dumps(value))
        except pydantic.ValidationError as error:
            raise _wrong_value(kind, name, value, error) from None
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


def _validators(kind: type[Config]) -> dict[str, pydantic.TypeAdapter[Any]]:
    """Return what checks each field's value."""
    key: Any = kind  # mypy takes no class with __hash__ for a hashable (python/mypy#11470)
    return _build_validators(key)


@functools.cache
def _build_validators(kind: type[Config]) -> dict[str, pydantic.TypeAdapter[Any]]:
    hints = get_type_hints(kind, include_extras=True)
    rules = pydantic.ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return {field.name: pydantic.TypeAdapter(hints[field.name], config=rules) for field in fields(kind)}


def _wrong_value(kind: type[Config], name: str, value: object, error: pydantic.ValidationError) -> ConfigError:
    """Return the error that says which field got what, and what is allowed."""
    # Values may come from a file and be of any size, so only the beginning is shown.
    allowed = next(setting.allowed for setting in settings(kind) if setting.name == name)
    return ConfigError(
        f"{kind.__name__}.{name} must be {allowed or error.errors()[0]['msg']}, not {reprlib.repr(value)}"
    )


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _parts(hint: Any) -> tuple[Any, list[Any], bool]:
    """Split a type hint into the type, the constraints on its values, and whether None is allowed."""
    if get_origin(hint) in (Union, types.UnionType):  # `Optional[Annotated[…]]` and `int | None` have different origins
        members = [member for member in get_args(hint) if member is not type(None)]
        optional = len(members) < len(get_args(hint))
        if len(members) == 1:
            return *_parts(members[0])[:2], optional
        return hint, [], optional
    if get_origin(hint) is Annotated:
        value_type, *extras = get_args(hint)
        constraints = []
        for extra in extras:
            constraints += extra.metadata if isinstance(extra, pydantic.fields.FieldInfo) else [extra]
        return value_type, constraints, False
    return hint, [], False


def _allowed(value_type: Any, constraints: list[Any], optional: bool) -> str:
    """Say which values a field takes; empty for types that this function does not know."""
    if get_origin(value_type) is Literal:
        words = "one of " + ", ".join(map(str, get_args(value_type)))
    elif value_type is bool:
        words = "true or false"
    elif value_type in (int, float):
        bounds = " and ".join(bound for constraint in constraints for bound in _bounds(value_type, constraint))
        words = "a whole number" if value_type is int else "a finite number"
        words += f" {bounds}" if bounds else ""
    else:
        words = {str: "a text", Path: "a Path"}.get(
            value_type, getattr(value_type, "__name__", "") if not constraints else ""
        )
    return f"{words} or None" if words and optional else words


def _bounds(value_type: type, constraint: object) -> Iterator[str]:
    """Word the limits in one of the constraints that pydantic keeps of ``Field(gt=…, ge=…, lt=…, le=…)``."""
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    for attribute, word in words.items():
        limit = getattr(constraint, attribute, None)
        if limit is not None and attribute == "gt" and value_type is int:
            yield f"of at least {limit + 1}"
        elif limit is not None:
            yield f"{word} {limit}"


def _descriptions(kind: type[Config]) -> dict[str, str]:
    """Read the ``Attributes:`` sections of a class and its bases: the text of each field, on one line."""
    described: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, section = (inspect.cleandoc(base.__doc__ or "")).partition("Attributes:\n")
        for name, text in re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", section, re.MULTILINE):
            described[name] = " ".join(text.split())
    return described
