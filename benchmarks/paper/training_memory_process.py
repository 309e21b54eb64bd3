"""Train an editor of a random GPT-2 for two steps, and print the resident memory before and at the peak as JSON.

    python -P training_memory_process.py METHOD WIDTH

It is run by ``training_memory.py``.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from dataclasses import replace

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from remend.editors import trainable_class
from remend.request import EditRequest, Probe
from remend.tasks import wrap
from remend.training import PRESETS, train

WORDS = 4000


def main(method: str, width: int) -> None:
    """Train the editor ``method`` of a model with hidden states of ``width``, and print what it took."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    task = wrap(random_model(width), word_tokenizer())
    requests = [random_request(first) for first in range(0, 1200, 60)]
    # Resident memory now, not its peak so far: imports may have taken more for a moment.
    before = psutil.Process().memory_info().rss
    settings = replace(PRESETS["paper"][1], max_steps=2, validate_every=2, validation_size=2)
    editor = trainable_class(method).create(task)
    train(task, requests[:16], requests[16:], config=settings, editor=editor)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    print(json.dumps({"parameters": parameters, "before": before, "peak": peak}))


def random_model(width: int) -> PreTrainedModel:
    """Return a GPT-2 of eight blocks with random weights."""
    config = GPT2Config(
        vocab_size=WORDS + 1, n_positions=64, n_embd=width, n_layer=8, n_head=max(1, width // 64),
        bos_token_id=WORDS, eos_token_id=WORDS,
    )  # fmt: skip
    model: PreTrainedModel = GPT2LMHeadModel(config)
    model.eval()
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each of the words ``w0``, ``w1`` and so on."""
    vocabulary = {f"w{number}": number for number in range(WORDS)} | {"<end>": WORDS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def random_request(first: int) -> EditRequest:
    """Return a request of 24 words with two paraphrases and an unrelated prompt; ``first`` makes it differ."""
    return EditRequest(
        prompt=text(*range(first, first + 24)),
        target=text(first + 40, first + 41),
        subject=f"s{first}",
        paraphrases=(text(*range(first + 1, first + 24)), text(*range(first + 2, first + 24))),
        locality=(Probe(prompt=text(*range(first + 100, first + 124)), target=text(first + 60)),),
    )


def text(*numbers: int) -> str:
    """Return the words of these numbers."""
    return " ".join(f"w{number % WORDS}" for number in numbers)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
