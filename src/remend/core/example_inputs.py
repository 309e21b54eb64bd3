"""An input on which a model can be run to find out how it computes, without a tokenizer or data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from remend.core.layers import execution_device
from remend.errors import ModelError

TOKENS = 8
"""The length of the example text."""


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return one row of arbitrary tokens, or one arbitrary image, on the model's device.

    Raises:
        ModelError: the model takes something else.
    """
    config: Any = getattr(model, "config", None)
    device = execution_device(model)
    taken = getattr(model, "main_input_name", None)
    find_embedding = getattr(model, "get_input_embeddings", None)
    if taken == "input_ids" and callable(find_embedding):
        vocabulary = find_embedding().weight.shape[0]
        ids = torch.arange(3, 3 + TOKENS, device=device)[None] % vocabulary
        end = getattr(config, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < vocabulary:
            ids[0, -1] = end  # BART's classifiers read the state of the end token
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
        return inputs
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if taken == "pixel_values" and size is not None and channels is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        return {"pixel_values": image.to(device, dtype)}
    raise ModelError(
        f"a {type(model).__name__} takes neither token ids nor images of a known size, so it cannot be run to find out "
        "how its MLPs compute: hidden units cannot be added to it. Use a change of low rank"
    )
