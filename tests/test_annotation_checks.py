"""That tests check annotations: a wrong type or shape in a call of the package is an error."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from remend.core import losses
from remend.core.low_rank import LowRank
from remend.tasks.base import Example, in_batches


def test_shapes():
    with pytest.raises(TypeCheckError, match="row"):
        losses.row_mean(torch.ones(3), torch.zeros(2, dtype=torch.long), 1)
    with pytest.raises(TypeCheckError, match="rank"):
        LowRank(torch.ones(2, 3), torch.ones(1, 3))


def test_types_where_there_are_no_shapes():
    with pytest.raises(TypeCheckError, match="int"):
        next(in_batches(7))
    with pytest.raises(TypeCheckError, match="target"):
        Example((1, 2), "Paris")


def make(sizes):
    def cut(matrix: Float[Tensor, "row column"], times: int = 1) -> Float[Tensor, "column row"]:
        return torch.zeros(sizes[:times])

    def name(number: int) -> str:
        return sizes[number]

    return tuple(jaxtyping.jaxtyped(typechecker=None)(function) for function in (cut, name))


def test_functions_that_a_call_makes_anew():
    (cut, name), (cut_wrongly, _) = make((3, 2)), make((2, 3))
    for _ in range(2):
        assert cut(torch.ones(2, 3), times=2).shape == (3, 2)
        for wrong in (lambda: cut_wrongly(torch.ones(2, 3), 2), lambda: cut(torch.ones(2, 3)), lambda: cut([[1.0]])):
            with pytest.raises(TypeCheckError, match="Tensor"):
                wrong()
        for number in (0, "0"):
            with pytest.raises(TypeCheckError, match="type hint"):
                name(number)
