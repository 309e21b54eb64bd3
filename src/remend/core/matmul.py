"""Products of float32 matrices, by the faster of the two libraries that torch brings for them on a CPU.

Torch multiplies float32 matrices with MKL, which runs at half of an AMD processor's speed. oneDNN, which torch also
has and uses for other things, does not; there it is called by name. The results differ by rounding alone, and which
library multiplies depends on the processor and the sizes only, so a run gives the same bits each time.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

ONEDNN_MIN_MULTIPLICATIONS = 1 << 21
"""From so many multiplications on; for fewer, the call takes longer than the product (measured on a Zen 5 core)."""
SIZE_BITS = 4
ONEDNN_ROW_BLOCK = 256
"""oneDNN writes to memory of its own; so many rows of it are still in the processor's cache when they are copied."""


def matmul(
    a: Float[Tensor, "row inner"],
    b: Float[Tensor, "inner column"],
    dtype: torch.dtype = torch.float32,
    out: Float[Tensor, "row column"] | None = None,
) -> Float[Tensor, "row column"]:
    """``a @ b``, multiplied in ``dtype`` and returned as float32, in ``out`` if given; not differentiable."""
    if dtype != torch.float32:
        found = a.to(dtype) @ b.to(dtype)
        return found.float() if out is None else out.copy_(found)
    if not _by_onednn(a, b):
        return torch.mm(a, b, out=out)
    if out is None:
        return _onednn(a, b)
    for start in range(0, a.shape[0], ONEDNN_ROW_BLOCK):
        out[start : start + ONEDNN_ROW_BLOCK] = _onednn(a[start : start + ONEDNN_ROW_BLOCK], b)
    return out


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
    return found


def padded_row_count(rows: int, device: torch.device) -> int:
    """``rows``, or somewhat more: how many to multiply (the last ones zero), so that few sizes occur.

    For every size that it meets oneDNN makes a program, which takes a millisecond and half a megabyte, for ever.
    Numbers of four binary digits with zeros after them are at most an eighth apart, 2 % to 12 %.
    """
    if device.type != "cpu" or not _mkl_is_slow():
        return rows
    step = 1 << max(rows.bit_length() - SIZE_BITS, 0)
    return -(-rows // step) * step


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether a product is one of those that oneDNN takes half the time for."""
    large = a.shape[0] * a.shape[1] * b.shape[1] >= ONEDNN_MIN_MULTIPLICATIONS
    plain = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    return large and plain and bool(torch.backends.mkldnn.enabled) and _mkl_is_slow()


@cache
def _mkl_is_slow() -> bool:
    """Whether this is a processor that is not Intel's, with a torch that multiplies by MKL and has oneDNN too."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and hasattr(torch.ops.mkldnn, "_linear_pointwise") and "AuthenticAMD" in _processor()


def _processor() -> str:
    """What the system tells of its processors."""
    described = Path("/proc/cpuinfo")
    return described.read_text() if described.exists() else platform.processor()
