"""Running mean and variance: batching, counts and the floor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remend.core.running_statistics import RELATIVE_FLOOR, RunningStatistics


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(1e-6, 1e6))
def test_statistics_do_not_depend_on_how_rows_are_batched(sizes, scale):
    torch.manual_seed(sum(sizes))
    rows = torch.randn(sum(sizes), 3) * scale + 5 * scale
    statistics = RunningStatistics(2, 3)
    for part in rows.split(sizes):
        statistics.update(part, 1)
    assert statistics.count.tolist() == [0, len(rows)]
    torch.testing.assert_close(statistics.mean[1], rows.mean(0), rtol=1e-4, atol=1e-4 * scale)
    if len(rows) > 1:
        torch.testing.assert_close(statistics.deviation()[1], rows.std(0), rtol=1e-2, atol=1e-3 * scale)
    assert torch.equal(statistics.deviation()[0], torch.ones(3)), "an unseen matrix is left as it is"


def test_one_row_is_not_nan_and_a_constant_dimension_has_a_floor():
    statistics = RunningStatistics(1, 2)
    statistics.update(torch.tensor([[3.0, 4.0]]), 0)
    assert torch.equal(statistics.deviation(), torch.ones(1, 2))
    statistics.update(torch.tensor([[3.0, 4e-6]]), 0)
    constant, moving = statistics.deviation()[0]
    assert constant == pytest.approx(RELATIVE_FLOOR * float(moving) / 2**0.5, rel=1e-3)


def test_the_count_goes_past_what_float32_can_count():
    statistics = RunningStatistics(1, 1)
    statistics.count.fill_(2**24)
    statistics.update(torch.zeros(1, 1), 0)
    assert int(statistics.count) == 2**24 + 1
