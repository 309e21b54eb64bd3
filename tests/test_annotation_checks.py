"""That tests check annotations: a wrong type or shape in a call of the package is an error."""

import pytest
import torch
from jaxtyping import TypeCheckError

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
