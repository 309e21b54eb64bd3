"""What the benchmarks share: arguments, the clock, child processes, random models and requests of random words."""

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
from remend.evaluation.reports import report
from remend.request import EditRequest, Probe
from remend.serialization import write_json
from remend.tasks import wrap
from remend.training import PRESETS, Resources, Trainer
from remend.training.calibration import calibrate

HERE = Path(__file__).parent
CALIBRATION_EXAMPLES = 16
"""Enough for statistics of random examples; calibration is not what these benchmarks time."""

T = TypeVar("T")


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The arguments of every benchmark: where its configuration is and where its result goes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--config", type=Path, default=HERE / "configs" / f"{name}.json")
    made.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.json")
    return made


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """One thread from here on; returns the configuration."""
    torch.set_num_threads(1)
    config: dict[str, Any] = json.loads(arguments.config.read_text())
    return config


def write(out: Path, config: Mapping[str, Any], found: Mapping[str, Any], device: str = "cpu") -> None:
    """Write a result with its configuration and what it was measured on."""
    write_json(out, {"config": config, **found, "environment": environment(torch.device(device))})


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: versions, threads, the processor's or GPU's name."""
    return {**report.environment(device), "cpu": processor(), "cores": os.cpu_count()}


def processor() -> str:
    """The processor's name, as the system tells it."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds(action: Callable[[], object]) -> float:
    """CPU seconds of this process for one call."""
    began = time.process_time()
    action()
    return time.process_time() - began


def in_a_child(function: Callable[..., T], *arguments: Any) -> T:
    """What ``function`` returns, called in a fresh process: its peak memory is then its own.

    Where the system can, processes are forked from one that did nothing but import the libraries, once.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        context: multiprocessing.context.BaseContext = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["remend.training", "transformers.models.gpt2.modeling_gpt2"])
    else:
        context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as child:
        return child.submit(function, *arguments).result()


def peak_memory() -> int | None:
    """The most memory that this process has held, in bytes.

    On Linux, what ``getrusage`` tells begins with the memory of the process that started this one.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    own = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return own[0] if own else report.peak_memory()


# -- random models and requests ------------------------------------------------------------------------------------


def words(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of which every word is one token, so that lengths in the configuration are exact."""
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=f"w{size - 1}")


def random_requests(config: Mapping[str, Any], count: int) -> list[EditRequest]:
    """Requests of random words: one paraphrase and one locality example, all ``tokens`` long; no two are alike.

    The end token is one of the ``target_tokens``.
    """
    draw = random.Random(config["seed"])

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(config['model']['vocab_size'] - 1)}" for _ in range(length))

    prompt, target = config["tokens"] - config["target_tokens"], config["target_tokens"] - 1
    return [
        EditRequest(
            prompt=text(prompt),
            target=text(target),
            paraphrases=(text(prompt),),
            locality=(Probe(prompt=text(prompt), target=text(target)),),
        )
        for _ in range(count)
    ]


def random_model(
    settings: Mapping[str, Any], seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model with random weights, made where it is used; ``settings`` are its configuration's, GPT-2's by default."""
    torch.manual_seed(seed)
    end = settings["vocab_size"] - 1
    config = AutoConfig.for_model(**{"model_type": "gpt2", "bos_token_id": end, "eos_token_id": end, **settings})
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device(device):
        made: PreTrainedModel = kind.from_config(config, dtype=dtype)
    return made.eval()


def random_trainer(
    config: Mapping[str, Any],
    count: int,
    resources: Resources,
    blocks: int | None = None,
    model: PreTrainedModel | None = None,
    rank: int | None = None,
    batch_size: int | None = None,
) -> Trainer:
    """A trainer of the configuration's preset on ``count`` random requests, calibrated, with empty stores.

    Args:
        config: the benchmark's configuration: ``model``, ``preset``, ``tokens``, ``target_tokens`` and ``seed``.
        count: how many requests.
        resources: how memory is used.
        blocks: the MLPs of how many blocks, the last ones, are edited; the package's default without it.
        model: the base model; by default made as configured.
        rank: of the editor networks, instead of the preset's.
        batch_size: episodes a step, instead of the preset's.
    """
    if model is None:
        model = random_model(config["model"], config["seed"])
    network, settings = PRESETS[config["preset"]]
    network = replace(network, rank=rank or network.rank)
    settings = replace(settings, seed=config["seed"], batch_size=batch_size or settings.batch_size)
    depth = model.config.num_hidden_layers
    modules = [f"*.{block}.mlp.*" for block in range(depth - blocks, depth)] if blocks else []
    task = wrap(model, words(config["model"]["vocab_size"])).with_autocast(resources.autocast)
    editor = Mend.create(task, network, modules=modules, seed=config["seed"])
    trainer = Trainer(task, editor, random_requests(config, count), settings, resources)
    calibrate(editor, trainer.constants, trainer.episodes.edits(CALIBRATION_EXAMPLES, 8), trainer.workers)
    forget(trainer)
    return trainer


def forget(trainer: Trainer) -> None:
    """Empty a trainer's stores: every example is new to it again."""
    trainer.constants = trainer._constants()
