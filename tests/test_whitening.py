"""Whitening from the second moment of a layer's inputs."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from remend.core.whitening import SecondMoment


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
