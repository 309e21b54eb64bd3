"""An import hook for tests that checks annotations at every call: types, and shapes where there are any."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.door import die_if_unbearable

SHAPE = re.compile(r"\b(?:Bool|Float|Int|Shaped)\[")

CONFIGURATION = BeartypeConf(violation_type=jaxtyping.TypeCheckError)

_check_shapes = jaxtyping.jaxtyped
_check_types = beartype(conf=CONFIGURATION)


def install(modules):
    """Check the annotations of these modules, which must not be imported yet."""
    jaxtyping.jaxtyped = _checked  # the hook's decorator looks it up when a module is executed
    jaxtyping.install_import_hook(modules, "beartype.beartype")


def _checked(*, typechecker):
    """Return the decorator that takes the place of ``jaxtyping.jaxtyped``, which is slow.

    jaxtyping binds the arguments of each call to their names and checks them twice, which takes twenty times as long as
    beartype's check. So it is left to generators (and to context managers, which are made of them).
    """

    def decorate(annotated):
        if inspect.isclass(annotated):
            if dataclasses.is_dataclass(annotated):
                annotated.__init__ = decorate(annotated.__init__)
            return annotated
        # Annotations are texts: every module postpones their evaluation.
        shapes = any(SHAPE.search(str(annotation)) for annotation in annotated.__annotations__.values())
        if shapes and inspect.isgeneratorfunction(annotated):
            return _check_shapes(annotated, typechecker=typechecker)
        check = _check_inner if "<locals>" in annotated.__qualname__ else _check_types
        checked = check(_evaluated(annotated))
        return _with_sizes(checked) if shapes else checked

    return decorate


def _with_sizes(checked):
    """Let the names of axes stand for the same sizes in all arguments of a call and in its result."""

    @functools.wraps(checked)
    def call(*args, **kwargs):
        with _check_shapes("context"):
            return checked(*args, **kwargs)

    return call


def _check_inner(function):
    """Check a function that each call of another one makes anew.

    beartype would write and compile a check for each, which takes a thousand times as long as the call.
    """
    signature = _signature(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            die_if_unbearable(value, signature.parameters[name].annotation, conf=CONFIGURATION)
        result = function(*args, **kwargs)
        die_if_unbearable(result, signature.return_annotation, conf=CONFIGURATION)
        return result

    return call


_signatures = {}


def _signature(function):
    """Return the function's signature, made once of each definition."""
    if (known := _signatures.get(function.__code__)) is None:
        known = _signatures[function.__code__] = inspect.signature(function)
        assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in known.parameters.values())
    return known


def _evaluated(function):
    """Evaluate the function's annotations; those that name what is imported for type checkers only are not checked.

    The class around a method has no value yet: beartype looks its name up at the first call.
    """
    for name, annotation in function.__annotations__.items():
        try:
            function.__annotations__[name] = eval(str(annotation), function.__globals__)
        except NameError:
            if annotation != function.__qualname__.split(".")[0]:
                function.__annotations__[name] = Any
    return function
