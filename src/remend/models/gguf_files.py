"""Model files of llama.cpp (GGUF): what their header says, and a plain model of the weights that they hold."""

from __future__ import annotations

import copy
import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from remend.errors import ModelError

SUFFIX = ".gguf"

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""The formats of the types of settings that are numbers, as ``struct`` names them."""
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
"""What the tensors' data are aligned to where the file does not say."""


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself before the data of its tensors.

    Attributes:
        settings: the settings that are numbers or texts. Lists (the vocabulary) are left out.
        tensors: the end of each tensor's data in the file if its type is known, by its name.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, int]


def is_gguf(source: str) -> bool:
    """Tell whether a model's name is that of a GGUF file that exists."""
    path = Path(source)
    return path.suffix == SUFFIX and path.is_file()


def check_gguf(file: Path) -> GgufHeader:
    """Read the header of a GGUF file and check that the file is whole and holds a model. Return the header.

    Raises:
        ModelError: it is no GGUF file, is cut off, or holds an adapter or only a part of a model.
    """
    header = read_header(file)
    kind = header.settings.get("general.type", "model")
    if kind != "model":
        raise ModelError(
            f"{file} holds {'an' if kind == 'adapter' else 'a file of the kind'} {kind}, not a model: give the GGUF "
            "file of the model itself"
        )
    if (parts := header.settings.get("split.count", 1)) > 1:
        raise ModelError(
            f"{file} is one of {parts} parts of a model, which transformers does not join: join them with llama.cpp "
            "(llama-gguf-split --merge), and give the whole file"
        )
    end, size = max(header.tensors.values(), default=0), file.stat().st_size
    if not header.tensors or end > size:
        raise ModelError(
            f"{file} is cut off: it has {size:,} bytes, and its tensors end at {end:,}. Fetch it again"
            if header.tensors
            else f"{file} holds no tensors, so it is no model (a vocabulary alone, perhaps): give the model's file"
        )
    return header


def check_rotary_scaling(header: GgufHeader, config: Any, file: Path) -> None:
    """Check that the rotary positions of the configuration are scaled if those of the file are.

    For some families transformers leaves this out, and the model would compute something else.

    Raises:
        ModelError: they are not.
    """
    named = [value for key, value in header.settings.items() if key.endswith("rope.scaling.type") and value != "none"]
    scaled = [*named, *(name for name in header.tensors if name.startswith("rope_"))]
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in (parameters, *parameters.values()) if isinstance(part, dict)}
    if scaled and kinds <= {"default"}:
        raise ModelError(
            f"{file} scales its rotary positions ({scaled[0]}), which transformers does not read from a GGUF file of "
            f"this family ({config.model_type}): the model would answer otherwise. Give the checkpoint that it was "
            "made of"
        )


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same weights that transformers takes for one that was never quantised.

    What was read from a GGUF file cannot be saved, though its weights are ordinary ones.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()  # assigned weights are no longer shared
    plain.generation_config = model.generation_config
    return plain


def read_header(file: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        ModelError: it is no GGUF file, or its header is cut off or damaged.
    """
    with _mapped(file) as data:
        if data[:4] != _MAGIC:
            raise ModelError(f"{file} is no GGUF file: it does not begin with {_MAGIC.decode()}")
        try:
            return _Reader(data).header()
        except (struct.error, UnicodeDecodeError, ValueError, OverflowError) as error:
            raise ModelError(
                f"the header of {file} is cut off or damaged ({str(error)[:80]}): fetch it again"
            ) from None


@contextmanager
def _mapped(file: Path) -> Iterator[mmap.mmap | bytes]:
    """Yield the bytes of a file without reading all of it."""
    with file.open("rb") as opened:
        if not file.stat().st_size:  # an empty file cannot be mapped
            yield b""
            return
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            yield mapped


class _Reader:
    """Reads a header from its beginning to its end; integers are little-endian, and texts begin with their length."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data, self.place = data, len(_MAGIC)

    def header(self) -> GgufHeader:
        version, tensor_count, setting_count = self.take("<I"), self.take("<Q"), self.take("<Q")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, and not {' or '.join(map(str, _VERSIONS))}")
        settings = {}
        for _ in range(setting_count):
            key = self.text()
            value = self.setting(self.take("<I"))
            if value is not None:
                settings[key] = value
        ends = {}
        for _ in range(tensor_count):
            name = self.text()
            shape = [self.take("<Q") for _ in range(self.take("<I"))]
            kind, offset = self.take("<I"), self.take("<Q")
            ends[name] = offset + _byte_count(kind, prod(shape))
        alignment = int(settings.get("general.alignment", _ALIGNMENT)) or _ALIGNMENT
        start = -(-self.place // alignment) * alignment
        return GgufHeader(settings, {name: start + end for name, end in ends.items()})

    def take(self, form: str) -> Any:
        """Return the next number, of a format of ``struct``."""
        (value,) = struct.unpack_from(form, self.data, self.place)
        self.place += struct.calcsize(form)
        return value

    def text(self) -> str:
        length = self.take("<Q")
        self.place += length
        if self.place > len(self.data):
            raise ValueError(f"a text of {length:,} bytes")
        return self.data[self.place - length : self.place].decode()

    def setting(self, kind: int) -> Any:
        """Return the next value, or None for a list, which is passed over."""
        if kind in _NUMBERS:
            return self.take(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a setting of the type {kind}")
        item, count = self.take("<I"), self.take("<Q")
        if item in _NUMBERS:
            self.place += count * struct.calcsize(_NUMBERS[item])
        elif item == _STRING:
            for _ in range(count):
                length = self.take("<Q")
                self.place += length
        else:
            raise ValueError(f"a list of the type {item}")
        return None


def _byte_count(kind: int, values: int) -> int:
    """Return how many bytes that many values take; 0 if the type is not known, which transformers then reports."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in set(GGMLQuantizationType):
        return 0
    values_per_block, bytes_per_block = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return values // values_per_block * bytes_per_block
