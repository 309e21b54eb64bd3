"""Gradients of the editor's own matrices, kept as factors until the optimiser wants them.

What remend does to the base model's gradient it does to its own: for a product y = x Wᵀ over some rows, ∇W = gᵀ x, and
the factors g and x are much smaller than W. So all matrices share one buffer for their dense gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.core.matmul import matmul


class FactoredGradients:
    """The factors of each matrix's gradient, written by the backward pass of an editor network, read once.

    Attributes:
        dtype: in which the product gᵀ x is taken; the gradient itself is float32.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._factors: dict[nn.Parameter, list[tuple[Tensor, Tensor]]] = {}
        self._buffer = torch.empty(0)

    def add(self, weight: nn.Parameter, g: Float[Tensor, "row d_out"], x: Float[Tensor, "row d_in"]) -> None:
        """Add gᵀ x to the gradient of ``weight`` [d_out, d_in]."""
        self._factors.setdefault(weight, []).append((g.detach(), x.detach()))

    def weights(self) -> list[nn.Parameter]:
        """The matrices that have a gradient, in the order of :meth:`norm_bounds`."""
        return list(self._factors)

    def norm_bounds(self) -> Float[Tensor, " weight"]:
        """For each matrix a number that its gradient's norm does not exceed: ‖Σ_j g_j x_jᵀ‖ ≤ Σ_j ‖g_j‖ ‖x_j‖.

        It costs next to nothing, and where it is finite the gradient is.
        """
        found = []
        for factors in self._factors.values():
            found.append(torch.stack([(g.norm(dim=1) * x.norm(dim=1)).sum() for g, x in factors]).sum())
        return torch.stack(found) if found else torch.empty(0)

    def norms(self) -> Float[Tensor, " weight"]:
        """The norm of each matrix's gradient: ‖Σ_j g_j x_jᵀ‖² = Σ_ij (g_i·g_j) (x_i·x_j), where rows are few."""
        found = []
        for weight, factors in self._factors.items():
            g, x = (torch.cat(parts) for parts in zip(*factors, strict=True))
            if len(g) * (g.shape[1] + x.shape[1]) < weight.numel():
                grams = (matmul(rows, rows.mT, self.dtype) for rows in (g, x))
                found.append(torch.mul(*grams).sum().clamp(min=0).sqrt())
            else:
                found.append(self._dense(weight).norm())
        return torch.stack(found) if found else torch.empty(0)

    def gradients(self) -> Iterator[tuple[nn.Parameter, Float[Tensor, "d_out d_in"]]]:
        """Each matrix with its dense gradient, which lasts until the next one is asked for."""
        for weight in self._factors:
            yield weight, self._dense(weight)

    def clear(self) -> None:
        """Forget the factors; the buffer stays."""
        self._factors.clear()

    def _dense(self, weight: nn.Parameter) -> Tensor:
        gradient = self._room(weight)
        (g, x), *others = self._factors[weight]
        matmul(g.mT, x, self.dtype, out=gradient)
        for g, x in others:
            gradient += matmul(g.mT, x, self.dtype)
        return gradient

    def _room(self, weight: nn.Parameter) -> Tensor:
        if self._buffer.numel() < weight.numel() or self._buffer.device != weight.device:
            self._buffer = torch.empty(weight.numel(), device=weight.device)
        return self._buffer[: weight.numel()].view(weight.shape)
