"""Loading a base model and its processor: one that ships with remend, a local folder, a GGUF file, or a hub id."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TorchAoConfig,
)
from transformers.utils.import_utils import (
    is_accelerate_available,
    is_bitsandbytes_available,
    is_gguf_available,
    is_torchao_available,
)

from remend.assets import BUILT_IN_MODELS, model_folder
from remend.core.layers import is_editable, is_quantized
from remend.errors import ConfigError, ModelError, nearest
from remend.hub_lookup import check_on_hub
from remend.models.checkpoint_checks import check_folder, check_loaded, check_room, check_settings, check_sizes
from remend.models.gguf_files import check_gguf, check_rotary_scaling, is_gguf, plain_model

MAP = "map"
"""The device name for all devices: Accelerate fills one after the other, then the memory, then the disk."""
QUANTISATIONS = ("bnb-4bit", "bnb-8bit", "torchao-int8")
"""The ways to quantize a model while it is loaded."""
AVAILABLE = {
    "accelerate": is_accelerate_available,
    "bitsandbytes": is_bitsandbytes_available,
    "gguf": is_gguf_available,
    "torchao": is_torchao_available,
}
"""For each optional package, the function of transformers that tells whether it is installed and recent enough."""


def choose_device(device: str) -> torch.device:
    """Return the named device; for ``auto``, a GPU if there is one. With several processes, each gets another GPU.

    Raises:
        ModelError: the device cannot be used here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}); try --device cpu"
        ) from None
    return chosen


def load_pretrained(
    model: str,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    quantise: str | None = None,
    trust_remote_code: bool = False,
    use_safetensors: bool = True,
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its processor, in evaluation mode. Arguments and errors are those of :func:`remend.load`."""
    if device == MAP and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ModelError(
            "device 'map' spreads one model over all GPUs, but here several processes would each do so: start one "
            "process, or have them share one model (accelerate launch --use_fsdp) with device 'cpu'"
        )
    if quantise and quantise not in QUANTISATIONS:
        raise ConfigError(f"there is no quantisation {quantise!r}; {nearest(quantise, QUANTISATIONS)}")
    target = choose_device("auto" if device == MAP else device)
    source = str(model_folder(model)) if model in BUILT_IN_MODELS else model
    if is_gguf(source):
        return _load_gguf(source, target, device == MAP, dtype, quantise)
    if os.path.exists(source):
        check_folder(Path(source))
    if not os.path.exists(source) and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ModelError(
            f"there is no folder {source}; MODEL is {', '.join(map(repr, BUILT_IN_MODELS))}, a folder or a hub id"
        )
    if device == MAP:
        _require("accelerate", "big", "device 'map'")
    with _explained(f"cannot load {model!r} ({_described(model, source)}) as a language model or classifier"):
        config = _read_config(source, trust_remote_code)
        saved_class = next(iter(config.architectures or ()), None)
        model_class, processor_class = auto_classes(config)
        if os.path.exists(source):
            check_room(model_class, config, Path(source), trust_remote_code)
        processor = processor_class.from_pretrained(source, trust_remote_code=trust_remote_code)
        placed = _placement(config, target, device == MAP, dtype, quantise)
        loaded, loading = model_class.from_pretrained(
            source,
            config=config,
            trust_remote_code=trust_remote_code,
            use_safetensors=True if use_safetensors else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # what does not fit is an error here, with all its names
            **placed,
        )
    check_loaded(loaded, saved_class, loading, model)
    loaded.config._name_or_path = _full_name(model)
    if "device_map" not in placed:  # else it lies where it belongs, and must not be moved
        torch.nn.Module.to(loaded, target)
    if quantise:
        _check_quantised(loaded, quantise)
    _keep_differentiable(loaded)
    return loaded.eval(), processor


def _load_gguf(
    source: str, target: torch.device, mapped: bool, dtype: torch.dtype | str | None, quantise: str | None
) -> tuple[PreTrainedModel, Any]:
    """Load a language model and its tokenizer from a GGUF file; its weights become ordinary ones, in float32."""
    if quantise or mapped:
        choice = f"quantise={quantise!r}" if quantise else f"device {MAP!r}"
        raise ModelError(
            f"a GGUF file cannot be loaded with {choice}: load it without, save it as a folder "
            "(task.model.save_pretrained and task.processor.save_pretrained), and load that"
        )
    for package in ("gguf", "accelerate"):
        _require(package, "gguf", "a GGUF file")
    file = Path(source)
    header = check_gguf(file)
    with _explained(f"cannot load {source!r} (a GGUF file) as a language model"):
        config = _read_config(source, False)
        check_rotary_scaling(header, config, file)
        model_class, processor_class = auto_classes(config)
        check_room(model_class, config, file, False)
        processor = processor_class.from_pretrained(file.parent, gguf_file=file.name)
        loaded, loading = model_class.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            dtype=torch.float32 if dtype in (None, "auto") else dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_loaded(loaded, None, loading, source)
    plain = plain_model(loaded)
    plain.config._name_or_path = _full_name(source)
    torch.nn.Module.to(plain, target)
    return plain.eval(), processor


def _read_config(source: str, trust_remote_code: bool) -> PreTrainedConfig:
    """Read and check a model's configuration."""
    if not os.path.exists(source):
        check_on_hub(source, "config.json")
    file = Path(source) if is_gguf(source) else None
    place = {"gguf_file": file.name} if file else {}
    settings = PreTrainedConfig.get_config_dict(file.parent if file else source, **place)[0]
    check_settings(settings, source, trust_remote_code)
    if file:  # not read a second time: the vocabulary in it takes seconds
        config = AutoConfig.for_model(**settings)
    else:
        # False, and not None: transformers would ask on the terminal whether to run a model's own code.
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    check_sizes(config, source)
    return config


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise a :class:`ModelError` that begins with ``what`` for any error within the context."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the files decide which code of transformers runs, so this may be any
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Errors about a setting name it in the first line, and say in the second one what is wrong with it.
        reason = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = (
                "it has code of its own, which would run here. Load it with trust_remote_code (remend "
                "--trust-remote-code …) if you trust it"
            )
        elif "no file named model.safetensors" in reason:
            reason += ". A pytorch_model.bin may hold code: use_safetensors=False (remend --allow-bin …) reads it"
        raise ModelError(f"{what}: {reason}") from error


def _described(model: str, source: str) -> str:
    """Return what a model's name was taken for, and what may have been meant."""
    where = "the folder" if os.path.exists(source) else "taken for a hub id, since no folder has this name"
    suggestions = get_close_matches(model, BUILT_IN_MODELS, n=1)
    return where + (f"; did you mean {suggestions[0]!r}?" if suggestions else "")


def skeleton(model: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a model without weights (on the device ``meta``) from its configuration: its modules and their shapes.

    Args:
        model: as for :func:`load`, or a ``config.json``.
        trust_remote_code: as for :func:`load`.

    Raises:
        ModelError: it is no configuration of a language model or classifier.
    """
    source = str(model_folder(model)) if model in BUILT_IN_MODELS else model
    with _explained(f"{model} is no configuration of a language model that transformers knows"):
        config = _read_config(source, trust_remote_code)
        with torch.device("meta"):
            built: PreTrainedModel = auto_classes(config)[0].from_config(config, trust_remote_code=trust_remote_code)
    built.config._name_or_path = _full_name(model)
    return built


def _full_name(model: str) -> str:
    """Return a model's name as given, or the absolute path of its folder, which is found from other folders too."""
    return model if model in BUILT_IN_MODELS or not os.path.exists(model) else str(Path(model).absolute())


HEADS: dict[str, tuple[Any, Any]] = {
    "ForSequenceClassification": (AutoModelForSequenceClassification, AutoTokenizer),
    "ForImageClassification": (AutoModelForImageClassification, AutoImageProcessor),
}
"""Auto classes of transformers for a model and its processor, by the end of the name of the class that was saved."""


def auto_classes(config: Any) -> tuple[Any, Any]:
    """Return the auto classes of a model and its processor, from the class that was saved and the structure."""
    for name in config.architectures or ():
        for head, classes in HEADS.items():
            if str(name).endswith(head):
                return classes
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM, AutoTokenizer


def _placement(
    config: Any, target: torch.device, mapped: bool, dtype: torch.dtype | str | None, quantise: str | None
) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that say where the weights go and how they are stored."""
    stored = getattr(config, "quantization_config", None) is not None
    if stored and quantise:
        raise ModelError(f"this checkpoint is quantised already and cannot be made {quantise}; leave quantise out")
    arguments: dict[str, Any] = {"dtype": dtype or (torch.float32 if target.type == "cpu" and not stored else "auto")}
    if quantise:
        compute_dtype = arguments["dtype"] if arguments["dtype"] != "auto" else config.dtype
        arguments["quantization_config"] = _quantisation(quantise, compute_dtype)
    if mapped:
        arguments["device_map"] = "auto"
    elif quantise or stored:  # weights are quantized on the device that will use them, and cannot be moved afterwards
        _require("accelerate", "quantised", "a quantised model")
        arguments["device_map"] = {"": str(target)}
    return arguments


def _quantisation(name: str, dtype: torch.dtype | None) -> BitsAndBytesConfig | TorchAoConfig:
    _require("torchao" if name == "torchao-int8" else "bitsandbytes", "quantised", f"quantisation {name!r}")
    if name == "bnb-4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if name == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _require(package: str, extra: str, what: str) -> None:
    if not AVAILABLE[package]():
        raise ModelError(f"{what} needs {package}, which is missing here or too old: pip install 'remend[{extra}]'")


def _check_quantised(model: PreTrainedModel, quantise: str) -> None:
    """Raise ModelError where nothing was quantized: torchao ignores ``Conv1D`` layers, of which GPT-2 consists."""
    if not any(is_editable(module) and is_quantized(module) for module in model.modules()):
        raise ModelError(f"{quantise} found nothing to quantise in a {type(model).__name__}; try bnb-8bit or bnb-4bit")


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in the first forward pass, as it does on CPUs with AVX512-BF16."""
    # Gradients do not pass through a repacked layer. Nothing would fail: the gradient through the residual connections
    # would be taken for the whole gradient.
    layer: Any  # a flag that torch's stubs do not know
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
