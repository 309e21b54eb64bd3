"""How many tokens a model can read: as many as its tables of positions hold, or as its configuration says."""

from __future__ import annotations

from typing import Any

from torch import nn


def context_length(model: nn.Module, part: nn.Module | None = None) -> int | None:
    """Return the largest number of tokens, or None where nothing bounds it, as with relative positions.

    Args:
        model: the model, for its configuration.
        part: of an encoder-decoder, the encoder or the decoder; by default all of the model.
    """
    lengths = [
        _positions(module)
        for name, module in (part or model).named_modules()
        if isinstance(module, nn.Embedding) and _holds_positions(name)
    ]
    configured = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(configured, int) and configured > 0:
        lengths.append(configured)
    return min(lengths, default=None)


def _holds_positions(name: str) -> bool:
    """Tell from its name whether an embedding is looked up by absolute position."""
    own = name.rpartition(".")[2]
    return own == "wpe" or ("pos" in own and "relative" not in own)


def _positions(table: Any) -> int:
    """Return the number of positions of a table without the entries that stand before the first position."""
    offset = getattr(table, "offset", 0)  # OPT and BART keep two
    padding = table.padding_idx  # RoBERTa counts on from the padding token's number
    return (
        int(table.num_embeddings) - (offset if isinstance(offset, int) else 0) - (0 if padding is None else padding + 1)
    )
