"""Helpers of the benchmarks: arguments, timing, child processes, random models and requests of random words."""

from __future__ import annotations

import os

# Pages of 2 MB for large tensors: with the usual 4 KB, faults on fresh pages take a share of the time that depends on
# what else the machine does. Torch reads it when it is imported, so every benchmark sets it before that.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import json
import multiprocessing
import multiprocessing.context
import platform
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from remend.editors import Mend
from remend.editors.trainable import CalibrationData
from remend.evaluation.reports import report
from remend.request import EditRequest, Probe
from remend.saved_folders import write_json
from remend.tasks import wrap
from remend.training import PRESETS, Resources, Trainer

HERE = Path(__file__).parent
CALIBRATION_EXAMPLES = 16
"""Enough for statistics of random examples; calibration is not what these benchmarks time."""

T = TypeVar("T")


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark: ``--config`` and ``--out``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs" / f"{name}.json")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.json")
    return parser


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Limit torch to one thread and return the configuration."""
    torch.set_num_threads(1)
    config: dict[str, Any] = json.loads(arguments.config.read_text())
    return config


def write(out: Path, config: Mapping[str, Any], result: Mapping[str, Any], device: str = "cpu") -> None:
    """Write a result with its configuration and the environment it was measured in."""
    write_json(out, {"config": config, **result, "environment": environment(torch.device(device))})


def environment(device: torch.device) -> dict[str, Any]:
    """Return what figures depend on: versions, threads, the name of the processor or GPU."""
    return {**report.environment(device), "cpu": processor(), "cores": os.cpu_count()}


def processor() -> str:
    """Return the processor's name."""
    # On Linux, platform.processor() gives the architecture only, and psutil has no name.
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds(action: Callable[[], object]) -> float:
    """Measure one call in CPU seconds of this process."""
    start = time.process_time()
    action()
    return time.process_time() - start


def in_child_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call ``function`` in a new process, so that its peak memory is that of the call alone, and return its result."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        # Forked from a server that has only imported the libraries: importing torch anew takes seconds.
        context: multiprocessing.context.BaseContext = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["remend.training", "transformers.models.gpt2.modeling_gpt2"])
    else:
        context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as child:
        return child.submit(function, *arguments).result()


def peak_memory() -> int | None:
    """Return the peak of this process's resident memory, in bytes."""
    # VmHWM rather than getrusage, whose peak on Linux includes that of the process which started this one; psutil
    # has no peak on Linux.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return peaks[0] if peaks else report.peak_memory()


# -- random models and requests ------------------------------------------------------------------------------------


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each word, so that lengths in the configuration are exact."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"w{size - 1}")


def random_requests(config: Mapping[str, Any], count: int) -> list[EditRequest]:
    """Return requests of random words, each with one paraphrase and one locality example, all ``tokens`` long.

    The end token is one of the ``target_tokens``.
    """
    rng = random.Random(config["seed"])

    def text(length: int) -> str:
        return " ".join(f"w{rng.randrange(config['model']['vocab_size'] - 1)}" for _ in range(length))

    prompt_words, target_words = config["tokens"] - config["target_tokens"], config["target_tokens"] - 1
    return [
        EditRequest(
            prompt=text(prompt_words),
            target=text(target_words),
            paraphrases=(text(prompt_words),),
            locality=(Probe(prompt=text(prompt_words), target=text(target_words)),),
        )
        for _ in range(count)
    ]


def random_model(
    settings: Mapping[str, Any], seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a model with random weights, created on its device; ``settings`` change GPT-2's configuration."""
    torch.manual_seed(seed)
    end_token = settings["vocab_size"] - 1
    config = AutoConfig.for_model(
        **{"model_type": "gpt2", "bos_token_id": end_token, "eos_token_id": end_token, **settings}
    )
    model_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device(device):
        model: PreTrainedModel = model_class.from_config(config, dtype=dtype)
    return model.eval()


def random_trainer(
    config: Mapping[str, Any],
    count: int,
    resources: Resources,
    blocks: int | None = None,
    model: PreTrainedModel | None = None,
    rank: int | None = None,
    batch_size: int | None = None,
) -> Trainer:
    """Return a calibrated trainer of the configuration's preset on ``count`` random requests, with empty caches.

    Args:
        config: the benchmark's configuration: ``model``, ``preset``, ``tokens``, ``target_tokens`` and ``seed``.
        count: how many requests.
        resources: how memory is used.
        blocks: how many blocks, the last ones, have their MLPs edited; the package's default if it is None.
        model: the base model; by default a random one as configured.
        rank: the rank of the editor networks, in place of the preset's.
        batch_size: episodes a step, in place of the preset's.
    """
    if model is None:
        model = random_model(config["model"], config["seed"])
    network, settings = PRESETS[config["preset"]]
    network = replace(network, rank=rank or network.rank)
    settings = replace(settings, seed=config["seed"], batch_size=batch_size or settings.batch_size)
    depth = model.config.num_hidden_layers
    modules = [f"*.{block}.mlp.*" for block in range(depth - blocks, depth)] if blocks else []
    task = wrap(model, word_tokenizer(config["model"]["vocab_size"])).with_autocast(resources.autocast)
    editor = Mend.create(task, network, modules=modules, seed=config["seed"])
    trainer = Trainer(task, editor, random_requests(config, count), settings, resources)
    data = CalibrationData(trainer.episodes.edits(CALIBRATION_EXAMPLES, 8))
    editor.calibrate(trainer.activation_cache, data, trainer.process_group)
    empty_caches(trainer)
    return trainer


def empty_caches(trainer: Trainer) -> None:
    """Empty a trainer's caches, so that every example is new to it again."""
    trainer.empty_cache()
