"""Image classifiers: an image, and its label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remend.core.low_rank_hooks import frozen
from remend.errors import ConfigError, ModelError, RequestError
from remend.request import Input, Prompt
from remend.tasks.base import Answer, Batch, Example, Task
from remend.tasks.class_labels import label_names, label_number
from remend.tasks.hashable_tensor import TensorInput

RANDOM_IMAGE_SIZE = 224
"""The height and width of random images for models whose configuration names no size, in pixels."""


@dataclass(frozen=True)
class Image(Input):
    """An image file, under the key ``image`` of a request.

    Attributes:
        path: the file.
    """

    key: ClassVar[str] = "image"
    path: str

    @classmethod
    def from_json(cls, value: object) -> Image:
        """Make the input of a file's path."""
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"should be the path of an image file, not {value!r}")
        return cls(value)

    def to_json(self) -> str:
        """Return the path."""
        return self.path

    def __str__(self) -> str:
        return self.path


class ImageClassification(Task):
    """An image classifier, whose targets are labels.

    The processor is an image processor of transformers, or a function that makes the tensor [channel, height, width] of
    a PIL image.

    Attributes:
        labels: the labels' names, by number.
    """

    kind = "image-classification"

    @classmethod
    def accepts(cls, model: nn.Module, processor: Any) -> bool:
        """Accept models that transformers documents as reading pixels and that have labels."""
        return getattr(model, "main_input_name", None) == "pixel_values" and bool(
            label_names(getattr(model, "config", None))
        )

    def __init__(self, model: nn.Module, processor: Any, autocast: torch.dtype | None = None) -> None:
        super().__init__(model, processor, autocast)
        if processor is None:
            raise ModelError(f"{type(model).__name__} classifies images: give its image processor, or a transform")
        self.context = None  # positions are those of an image, whatever a configuration says of texts
        self.labels = label_names(self.model.config)

    # -- encoding ------------------------------------------------------------------------------------------------

    def encode_input(self, prompt: Prompt) -> TensorInput:
        """Read an image file and process it.

        Raises:
            RequestError: the input is not an image, or the file cannot be read.
        """
        if not isinstance(prompt, Image):
            raise RequestError(
                f'{type(self.model).__name__} classifies images: give {{"image": "file"}}, not {str(prompt)[:40]!r}'
            )
        try:
            from PIL import Image as PillowImage
            from PIL import UnidentifiedImageError
        except ImportError:
            raise ConfigError("reading images needs Pillow: pip install 'remend[images]'") from None
        try:
            with PillowImage.open(Path(prompt.path)) as file:
                picture = file.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise RequestError(f"cannot read the image {prompt.path}: {error}") from None
        return TensorInput(self._pixels(picture))

    def _pixels(self, picture: Any) -> Float[Tensor, "channel height width"]:
        if hasattr(self.processor, "image_processor_type") or hasattr(self.processor, "preprocess"):
            pixels: Tensor = self.processor(images=picture, return_tensors="pt")["pixel_values"][0]
        else:
            pixels = self.processor(picture)
        return pixels

    def encode_target(self, encoded: TensorInput, prompt: Prompt, target: str) -> Answer:
        """Return the label's number."""
        return (label_number(target, self.labels),)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stack the images of ``examples``, which must have one size."""
        sizes = {tuple(example.input.tensor.shape) for example in examples}
        if len(sizes) > 1:
            raise RequestError(
                f"images of one batch have different sizes {sorted(sizes)}: use a processor that resizes"
            )
        pixels = torch.stack([example.input.tensor for example in examples])
        dtype = next(self.model.parameters()).dtype
        rows = len(examples)
        device = self.device
        return Batch(
            {"pixel_values": pixels.to(device, dtype)},
            torch.ones(rows, 1, dtype=torch.bool, device=device),
            torch.arange(rows, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.tensor([example.target[0] for example in examples], device=device),
        )

    def states_length(self, example: Example, stack: int) -> None:
        """Return None: all images have as many positions."""

    # -- running the model ---------------------------------------------------------------------------------------

    @property
    def output_size(self) -> int:
        """The number of labels."""
        return len(self.labels)

    @property
    def state_bytes(self) -> int:
        """About the bytes of the hidden states of one image: as many as of its pixels."""
        size = self._image_size()
        return size * size * self._channels() * int(next(self.model.parameters()).element_size())

    def outputs(self, batch: Batch) -> Float[Tensor, "target label"]:
        """Run the model; return the labels' logits of each image."""
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            logits: Tensor = self.model(**batch.inputs).logits
        return logits[batch.row]

    def predict(self, prompts: Sequence[Prompt], max_new_tokens: int = 32, batch_size: int = 64) -> list[Answer]:
        """Return the most probable label of each image."""
        examples = [Example(self.encode_input(prompt), (0,)) for prompt in prompts]
        answers: list[Answer] = []
        for start in range(0, len(examples), batch_size):
            with frozen(self.model), torch.no_grad():
                labels = self.outputs(self.collate(examples[start : start + batch_size])).argmax(-1)
            answers += [(label,) for label in labels.tolist()]
        return answers

    def decode(self, answer: Answer) -> str:
        """Return the label's name."""
        return self.labels[answer[0]]

    def ordinary_examples(self, text: Sequence[str] = (), seed: int = 0, count: int = 256) -> list[Example]:
        """Return images of Gaussian noise.

        Raises:
            ConfigError: a text was given.
        """
        if text:
            raise ConfigError("an image classifier reads no text: leave text (--statistics) out")
        size = self._image_size()
        noise = torch.randn(count, self._channels(), size, size, generator=torch.Generator().manual_seed(seed))
        return [Example(TensorInput(image), (0,)) for image in noise]

    def _image_size(self) -> int:
        size = getattr(self.model.config, "image_size", None)
        return size if isinstance(size, int) else RANDOM_IMAGE_SIZE

    def _channels(self) -> int:
        return int(getattr(self.model.config, "num_channels", 3))
