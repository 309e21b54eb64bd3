"""Inputs that are tensors, hashable by their content, so that examples are compared and cached as those of text are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor


class TensorInput:
    """A tensor as the input of an :class:`remend.tasks.Example`.

    It is compared, hashed and iterated by the digest of its content, which stands for it where an input of tokens is
    identified by its tokens.

    Args:
        tensor: the input of one example, without an axis for the batch.
    """

    def __init__(self, tensor: Float[Tensor, "*shape"]) -> None:
        self.tensor = tensor.detach().to("cpu", torch.float32).contiguous()
        content = self.tensor.numpy().tobytes() + repr(tuple(tensor.shape)).encode()
        digest = hashlib.sha256(content).digest()
        self.digest = tuple(int.from_bytes(digest[start : start + 8], "big", signed=True) for start in range(0, 32, 8))

    def __iter__(self) -> Iterator[int]:
        return iter(self.digest)

    def __len__(self) -> int:
        return len(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorInput) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)
