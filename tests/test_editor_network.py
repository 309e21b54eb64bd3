"""MEND's editor network: how it starts, what learns, what matrices share."""

import torch

from remend.core.editor_network import EditorNetwork


def network():
    torch.manual_seed(0)
    g = EditorNetwork(5, 3, matrices=2, rank=4)
    for matrix in range(2):
        g.u_statistics.update(torch.randn(20, 5) * 3 + matrix, matrix)
        g.delta_statistics.update(torch.randn(20, 3) * 1e-5, matrix)
    return g


def both(g, u, delta):
    """Run six tokens through the network, the first four of matrix 0, and return all pseudo-factors."""
    (first_u, first_delta), (second_u, second_delta) = g(u.split((4, 2)), delta.split((4, 2)))
    return torch.cat((first_u, second_u)), torch.cat((first_delta, second_delta))


def test_the_network_starts_as_the_identity_on_normalized_inputs():
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
