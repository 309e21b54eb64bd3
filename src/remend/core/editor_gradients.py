"""Gradients of the editor's own weight matrices, kept as factors until the optimizer needs them.

For a product y = x Wᵀ over some rows, ∇W = gᵀ x, and the factors g and x are much smaller than W. Dense gradients are
formed one at a time, in one buffer that all matrices share.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.core.cpu_matmul import matmul


class FactoredGradients:
    """The factors of each matrix's gradient: written by an editor network's backward pass, read by the optimizer.

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
        """Return the matrices that have a gradient, in the order of :meth:`norm_bounds` and :meth:`norms`."""
        return list(self._factors)

    def norm_bounds(self) -> Float[Tensor, " weight"]:
        """Compute an upper bound of each matrix's gradient norm: ‖Σ_j g_j x_jᵀ‖ ≤ Σ_j ‖g_j‖ ‖x_j‖.

        It costs next to nothing compared with the norm, and where it is finite the gradient is.
        """
        bounds = []
        for factors in self._factors.values():
            bounds.append(torch.stack([(g.norm(dim=1) * x.norm(dim=1)).sum() for g, x in factors]).sum())
        return torch.stack(bounds) if bounds else torch.empty(0)

    def norms(self) -> Float[Tensor, " weight"]:
        """Compute the norm of each matrix's gradient."""
        norms = []
        for weight, factors in self._factors.items():
            g, x = (torch.cat(parts) for parts in zip(*factors, strict=True))
            # ‖Σ_j g_j x_jᵀ‖² = Σ_ij (g_i·g_j) (x_i·x_j), which is less work than the dense gradient where rows are few.
            if len(g) * (g.shape[1] + x.shape[1]) < weight.numel():
                grams = (matmul(rows, rows.mT, self.dtype) for rows in (g, x))
                norms.append(torch.mul(*grams).sum().clamp(min=0).sqrt())
            else:
                norms.append(self._dense(weight).norm())
        return torch.stack(norms) if norms else torch.empty(0)

    def gradients(self) -> Iterator[tuple[nn.Parameter, Float[Tensor, "d_out d_in"]]]:
        """Yield each matrix with its dense gradient, which is overwritten when the next one is yielded."""
        for weight in self._factors:
            yield weight, self._dense(weight)

    def clear(self) -> None:
        """Delete the factors; the buffer stays allocated."""
        self._factors.clear()

    def _dense(self, weight: nn.Parameter) -> Tensor:
        gradient = self._buffer_for(weight)
        (g, x), *remaining = self._factors[weight]
        matmul(g.mT, x, self.dtype, out=gradient)
        for g, x in remaining:
            gradient += matmul(g.mT, x, self.dtype)
        return gradient

    def _buffer_for(self, weight: nn.Parameter) -> Tensor:
        if self._buffer.numel() < weight.numel() or self._buffer.device != weight.device:
            self._buffer = torch.empty(weight.numel(), device=weight.device)
        return self._buffer[: weight.numel()].view(weight.shape)
