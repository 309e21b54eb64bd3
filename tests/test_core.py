"""Statistics, the editor network and the losses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from remend.core.editor_network import EditorNetwork
from remend.core.losses import locality_loss, target_loss
from remend.core.running_statistics import RELATIVE_FLOOR, RunningStatistics
from remend.core.whitening import SecondMoment


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


@given(st.integers(2, 6), st.floats(1e-6, 1e-4))
def test_whitened_inputs_have_no_direction_in_common(d, ridge):
    torch.manual_seed(d)
    u = torch.randn(400, 5, d) @ torch.randn(d, d) + 5
    tokens = torch.ones(400, 5, dtype=torch.bool)
    tokens[:, 4:] = False
    moment = SecondMoment(d, torch.device("cpu"))
    for part, mask in zip(u.split(8), tokens.split(8), strict=True):
        moment.update(part, mask)
    before = u[tokens]
    after = moment.whitener(ridge)(before)
    torch.testing.assert_close(after.square().mean(), before.square().mean(), rtol=1e-3, atol=0)
    spread = [torch.linalg.eigvalsh(rows.T @ rows) for rows in (before.double(), after.double())]
    assert spread[1][-1] / spread[1][0] < spread[0][-1] / spread[0][0]
    assert spread[1][-1] / spread[1].mean() < 2, "no direction dominates"


def test_few_prompts_do_not_blow_up_what_they_did_not_show():
    torch.manual_seed(0)
    moments = {}
    for prompts in (4, 4000):
        moments[prompts] = SecondMoment(60, torch.device("cpu"))
        u = torch.cat([torch.randn(prompts, 3, 20), 0.1 * torch.randn(prompts, 3, 40)], -1)
        u[0, :, 59] = 0.0
        moments[prompts].update(u, torch.ones(prompts, 3, dtype=torch.bool))
    gains = {prompts: torch.linalg.svdvals(moment.whitener(1e-4).inner) for prompts, moment in moments.items()}
    assert gains[4].max() / gains[4].min() < 10
    assert gains[4000].max() / gains[4000].min() > gains[4].max() / gains[4].min(), "with enough of them it whitens"


def test_a_layer_that_is_always_zero_can_be_whitened():
    moment = SecondMoment(3, torch.device("cpu"))
    assert torch.equal(moment.whitener(1e-4).inner, torch.eye(3))


def network():
    torch.manual_seed(0)
    made = EditorNetwork(5, 3, matrices=2, rank=4)
    for matrix in range(2):
        made.u_statistics.update(torch.randn(20, 5) * 3 + matrix, matrix)
        made.delta_statistics.update(torch.randn(20, 3) * 1e-5, matrix)
    return made


def both(g, u, delta):
    """All of six tokens, the first four of matrix 0."""
    (first_u, first_delta), (second_u, second_delta) = g(u.split((4, 2)), delta.split((4, 2)))
    return torch.cat((first_u, second_u)), torch.cat((first_delta, second_delta))


def test_it_starts_as_the_identity_on_normalised_inputs():
    g = network()
    u, delta = torch.randn(6, 5), torch.randn(6, 3) * 1e-5
    matrix = torch.tensor([0, 0, 0, 0, 1, 1])
    new_u, new_delta = both(g, u, delta)
    expected = (u - g.u_statistics.mean[matrix]) / g.u_statistics.deviation()[matrix]
    torch.testing.assert_close(new_u, expected)
    assert 0.3 < new_delta.abs().mean() < 3, "deltas of any size come out near one"


def test_every_parameter_learns_within_two_steps():
    g = network()
    u, delta = torch.randn(6, 5), torch.randn(6, 3) * 1e-5
    optimizer = torch.optim.SGD(g.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        new_u, new_delta = both(g, u, delta)
        (new_u.sum() - new_delta.square().sum()).backward()
        optimizer.step()
    assert all(bool(p.grad.any()) for p in g.parameters())


def test_matrices_share_weights_but_not_scale_and_offset():
    g = network()
    assert g.first.scale.shape == (2, 8)
    assert g.first.down.shape == (4, 8)
    with torch.no_grad():
        g.first.offset[1] += 1
    u, delta = torch.randn(1, 5), torch.randn(1, 3) * 1e-5
    (first, _), (second, _) = g([u, u], [delta, delta])
    shift = (g.u_statistics.mean / g.u_statistics.deviation()).detach()
    assert not torch.allclose(first + shift[0], second + shift[1])


def test_a_loss_whose_backward_pass_is_asked_for_twice_refuses():
    """Its gradient is scaled in place."""
    logits = torch.randn(3, 5, requires_grad=True)
    loss = target_loss(logits, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_losses_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]))
    row, target = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    expected = torch.tensor([-(torch.tensor(0.5).log() + torch.tensor(0.75).log()) / 2, -torch.tensor(0.1).log()])
    torch.testing.assert_close(target_loss(logits, target, row, 2), expected)
    other = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]))
    kl = [0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()]
    kl += [0.9 * torch.tensor(1.8).log() + 0.1 * torch.tensor(0.2).log()]
    torch.testing.assert_close(locality_loss(logits, other, row, 2), torch.stack([kl[0] / 2, kl[1]]))
    assert not locality_loss(logits, logits, row, 2).any()
