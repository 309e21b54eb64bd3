"""The low-rank algebra against dense matrices, on drawn shapes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from remend.core.low_rank import LowRank, add_up, concatenate, stack
from remend.core.response import Response

SIZES = st.integers(1, 7)


def drawn(rank, d_in, d_out, *episodes, seed=0):
    torch.manual_seed(seed)
    return LowRank(torch.randn(*episodes, rank, d_in), torch.randn(*episodes, rank, d_out))


@given(SIZES, SIZES, SIZES, SIZES)
def test_output_change_is_the_dense_product(rank, d_in, d_out, rows):
    change = drawn(rank, d_in, d_out)
    x = torch.randn(rows, 3, d_in)
    torch.testing.assert_close(change.output_change(x), x @ change.dense().T, rtol=1e-4, atol=1e-4)


@given(SIZES, SIZES, SIZES, st.integers(1, 4), st.integers(1, 3), SIZES)
def test_output_change_keeps_episodes_apart(rank, d_in, d_out, episodes, rows_each, tokens):
    change = drawn(rank, d_in, d_out, episodes)
    x = torch.randn(episodes * rows_each, tokens, d_in)
    expected = torch.cat([x[e * rows_each : (e + 1) * rows_each] @ change.dense()[e].T for e in range(episodes)])
    torch.testing.assert_close(change.output_change(x), expected, rtol=1e-4, atol=1e-4)
    flattened = change.output_change(x.reshape(-1, d_in))  # as models that flatten rows and tokens call their layers
    torch.testing.assert_close(flattened, expected.reshape(-1, d_out), rtol=1e-4, atol=1e-4)


@given(SIZES, SIZES, SIZES, SIZES)
def test_sums_stacks_and_norms(first, second, d_in, d_out):
    a, b = drawn(first, d_in, d_out, seed=1), drawn(second, d_in, d_out, seed=2)
    torch.testing.assert_close(concatenate([a, b]).dense(), a.dense() + b.dense(), rtol=1e-4, atol=1e-4)
    stacked = stack([a, b])
    torch.testing.assert_close(stacked.dense(), torch.stack([a.dense(), b.dense()]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stacked.select(torch.tensor([1])).dense()[0], b.dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.norm(), a.dense().norm(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a.scaled(-2.5).dense(), -2.5 * a.dense(), rtol=1e-4, atol=1e-4)


@given(SIZES, SIZES, SIZES)
def test_recompression_is_the_best_of_its_rank(rank, d_in, d_out):
    change = drawn(rank, d_in, d_out)
    whole = change.recompress(min(rank, d_in, d_out))
    torch.testing.assert_close(whole.dense(), change.dense(), rtol=1e-3, atol=1e-4)
    compressed = change.recompress(1)
    values = torch.linalg.svdvals(change.dense())
    assert compressed.rank == 1
    torch.testing.assert_close((compressed.dense() - change.dense()).norm(), values[1:].norm(), rtol=1e-3, atol=1e-3)


def test_norms_do_not_overflow_in_half_precision():
    change = LowRank(torch.full((2, 3), 300.0), torch.full((2, 3), 300.0))
    assert change.to("cpu", torch.float16).norm().isfinite()
    torch.testing.assert_close(change.to("cpu", torch.float16).norm(), change.norm())


def test_the_norm_of_a_change_of_many_factors_takes_no_more_memory_than_they_do():
    """A product of rank × rank would take 15 GB here."""
    u = torch.ones(60_000, 2)
    torch.testing.assert_close(LowRank(u, u).norm(), torch.tensor(120_000.0))
    experts = torch.arange(60_000) % 2
    torch.testing.assert_close(LowRank(u, u, experts=experts).norm(), torch.tensor(120_000.0 / 2**0.5))


def test_changes_are_compared_by_identity():
    """Factors that are equal element by element have no one truth value, and the same change has many factors."""
    change = drawn(2, 3, 4)
    assert change == change
    assert change != drawn(2, 3, 4)
    assert change in [drawn(2, 3, 4), change]
    assert len({change, change.detach()}) == 2


def keyed(seed, pairs, d=24, response=None):
    """A change whose pairs answer their own keys with 1, and those of others with a part of it."""
    torch.manual_seed(seed)
    keys = torch.randn(pairs, d) + 1.0
    u = keys / keys.square().sum(1, keepdim=True)
    return LowRank(u, torch.randn(pairs, 5), response or Response(), keys=keys)


@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), st.booleans())
def test_a_sum_adds_at_each_key_what_the_change_adds_by_itself(sizes, units):
    response = Response("silu", gated=True, beta=20.0, threshold=0.2) if units else None
    changes = [keyed(seed, pairs, response=response) for seed, pairs in enumerate(sizes)]
    total = add_up(changes)
    assert total.rank == sum(sizes)
    keys, own = torch.cat([c.keys for c in changes]), torch.cat([c.output_change(c.keys) for c in changes])
    apart = sum(change.output_change(keys) for change in changes)
    error = (total.output_change(keys) - own).norm() / own.norm()
    assert error < 0.1  # of the ridge
    assert error < 0.3 * (apart - own).norm() / own.norm()
    # The same in two steps, and bit for bit the same again.
    torch.testing.assert_close(add_up([add_up(changes[:-1]), changes[-1]]).delta, total.delta, rtol=1e-3, atol=1e-4)
    assert torch.equal(add_up(changes).delta, total.delta)


def test_of_one_subject_both_changes_act():
    one, other = keyed(0, 1), keyed(1, 1)
    again = LowRank(one.u, other.delta, keys=one.keys * 1.01)
    total = add_up([one, again, other])
    added = total.output_change(one.keys)
    torch.testing.assert_close(added, one.delta + other.delta, rtol=0.05, atol=0.05)


def test_a_sum_of_changes_without_keys_is_that_of_their_factors():
    one, other = keyed(0, 2), drawn(2, 24, 5)
    total = add_up([one, other])
    assert total.keys is None
    assert torch.equal(total.delta, torch.cat([one.delta, other.delta]))
