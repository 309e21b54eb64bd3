"""An import hook for tests that checks annotations at every call: types, and shapes where there are any."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

SHAPE = re.compile(r"\b(?:Bool|Float|Int|Shaped)\[")

_check_shapes = jaxtyping.jaxtyped
_check_types = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def install(modules):
    """Check the annotations of these modules, which must not be imported yet."""
    jaxtyping.jaxtyped = _checked  # the hook's decorator looks it up when a module is executed
    jaxtyping.install_import_hook(modules, "beartype.beartype")


def _checked(*, typechecker):
    """Return the decorator that takes the place of ``jaxtyping.jaxtyped``, which is slow.

    jaxtyping binds the arguments of each call to their names, which takes twenty times as long as beartype's check. So
    it is left to functions (and the ``__init__`` of dataclasses) in whose annotations there are shapes.
    """

    def decorate(annotated):
        if inspect.isclass(annotated):
            if dataclasses.is_dataclass(annotated):
                annotated.__init__ = decorate(annotated.__init__)
            return annotated
        # Annotations are texts: every module postpones their evaluation.
        if any(SHAPE.search(str(annotation)) for annotation in annotated.__annotations__.values()):
            return _check_shapes(annotated, typechecker=typechecker)
        return _check_types(_evaluated(annotated))

    return decorate


def _evaluated(function):
    """Evaluate the function's annotations; those that name what is imported for type checkers only are not checked."""
    for name, annotation in function.__annotations__.items():
        try:
            function.__annotations__[name] = eval(str(annotation), function.__globals__)
        except NameError:
            function.__annotations__[name] = Any
    return function
