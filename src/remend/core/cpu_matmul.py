"""Products of float32 matrices, by the faster of the two libraries that torch has for them on a CPU.

Torch multiplies float32 matrices with MKL, which reaches half of an AMD processor's speed. oneDNN, which torch uses for
other operations, does not have that problem, so here it is called by name. The results differ by rounding only, and the
choice of library depends on the processor and the sizes only, so a run gives the same bits each time.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

ONEDNN_MIN_MULTIPLICATIONS = 1 << 21
"""The smallest product for oneDNN; for smaller ones the call takes longer than the product (measured on Zen 5)."""

SIZE_BITS = 4
"""The significant binary digits of a padded row count."""

ONEDNN_ROW_BLOCK = 256
"""How many rows oneDNN computes at a time when the result goes to ``out``."""


def matmul(
    a: Float[Tensor, "row inner"],
    b: Float[Tensor, "inner column"],
    dtype: torch.dtype = torch.float32,
    out: Float[Tensor, "row column"] | None = None,
) -> Float[Tensor, "row column"]:
    """Compute ``a @ b`` in ``dtype`` and return it as float32, in ``out`` if given; not differentiable."""
    if dtype != torch.float32:
        result = a.to(dtype) @ b.to(dtype)
        return result.float() if out is None else out.copy_(result)
    if not _is_faster_by_onednn(a, b):
        return torch.mm(a, b, out=out)
    if out is None:
        return _onednn(a, b)
    # oneDNN allocates its result. In blocks, it is still in the processor's cache when it is copied to `out`.
    for start in range(0, a.shape[0], ONEDNN_ROW_BLOCK):
        out[start : start + ONEDNN_ROW_BLOCK] = _onednn(a[start : start + ONEDNN_ROW_BLOCK], b)
    return out


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
    return result


def padded_row_count(rows: int, device: torch.device) -> int:
    """Return ``rows`` or a little more: how many rows to multiply, the last ones zero, so that few sizes occur."""
    if device.type != "cpu" or not _mkl_is_slow():
        return rows
    # For every new size oneDNN compiles a program, which takes a millisecond and half a megabyte that is never freed.
    # Numbers of four significant binary digits are at most an eighth apart, so this adds 2 % to 12 % of rows.
    step = 1 << max(rows.bit_length() - SIZE_BITS, 0)
    return -(-rows // step) * step


def _is_faster_by_onednn(a: Tensor, b: Tensor) -> bool:
    """Return whether oneDNN takes half the time for a product."""
    large = a.shape[0] * a.shape[1] * b.shape[1] >= ONEDNN_MIN_MULTIPLICATIONS
    plain = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    return large and plain and bool(torch.backends.mkldnn.enabled) and _mkl_is_slow()


@cache
def _mkl_is_slow() -> bool:
    """Return whether the processor is AMD's, and torch multiplies by MKL and has oneDNN too."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and hasattr(torch.ops.mkldnn, "_linear_pointwise") and "AuthenticAMD" in _processor()


def _processor() -> str:
    """Return the system's description of its processors."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
