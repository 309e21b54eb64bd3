"""What a training episode costs: a random model of distilGPT-2's size, six matrices, the paper's rank of 1920.

    python benchmarks/training_speed.py [--config benchmarks/configs/training_speed.json] [--out result.json]

One thread, CPU seconds of the process, the median of a few steps after one that warms up, for each batch size. Every
episode has an edit pair, a neighbour and a locality example of the same length, as random token ids.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from remend.editors import Mend
from remend.evaluation.report import environment, peak_memory
from remend.request import EditRequest, Probe
from remend.storage import write_json
from remend.tasks.causal_lm import CausalLM
from remend.training import PRESETS, Trainer

HERE = Path(__file__).parent


def words(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of which every word is one token, so that lengths in the configuration are exact."""
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=f"w{size - 1}")


def requests(config: dict, count: int) -> list[EditRequest]:
    """Requests of random words; the end token is one of the target's."""
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


def measure(config: dict, batch_size: int) -> dict[str, float]:
    """Seconds an episode at one batch size."""
    torch.manual_seed(config["seed"])
    end = config["model"]["vocab_size"] - 1
    model = GPT2LMHeadModel(GPT2Config(**config["model"], bos_token_id=end, eos_token_id=end)).eval()
    network, settings = PRESETS[config["preset"]]
    task = CausalLM(model, words(config["model"]["vocab_size"]))
    count = batch_size * (config["steps"] + 1)
    trainer = Trainer(
        task, Mend.for_model(model, network), requests(config, max(count, 4)), replace(settings, batch_size=batch_size)
    )
    trainer.calibrate()
    taken = []
    for _ in range(config["steps"] + 1):
        began = time.process_time()
        trainer.train_step()
        taken.append((time.process_time() - began) / batch_size)
    return {"batch_size": batch_size, "seconds_per_episode": statistics.median(taken[1:])}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "training_speed.json")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "training_speed.json")
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text())
    torch.set_num_threads(1)
    found = [measure(config, batch_size) for batch_size in config["batch_sizes"]]
    result = {
        "config": config,
        "results": found,
        "peak_memory_bytes": peak_memory(),
        "environment": environment(torch.device("cpu")),
    }
    print(json.dumps(result, indent=2))
    write_json(arguments.out, result)


if __name__ == "__main__":
    main()
