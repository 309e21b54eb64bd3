"""The target and locality losses against their formulas."""

import pytest
import torch

from remend.core.losses import locality_loss, target_loss


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
    uniform = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]))
    kl = [0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()]
    kl += [0.9 * torch.tensor(1.8).log() + 0.1 * torch.tensor(0.2).log()]
    torch.testing.assert_close(locality_loss(logits, uniform, row, 2), torch.stack([kl[0] / 2, kl[1]]))
    assert not locality_loss(logits, logits, row, 2).any()
