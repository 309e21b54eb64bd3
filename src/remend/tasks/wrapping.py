"""From a model and its processor to a task, and from a task to answers in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from remend.core.exclusive_execution import unwrap
from remend.errors import ModelError, RequestError
from remend.models.checkpoint_checks import check_head
from remend.models.loading import load_pretrained
from remend.registries import TASKS
from remend.request import Prompt, as_prompt
from remend.tasks.base import Task
from remend.tasks.unknown_text import warn_of_unknown_text


def wrap(model: nn.Module, processor: Any = None) -> Task:
    """Make the task of a model that is at hand already; :func:`remend.load` loads one by name.

    Args:
        model: a transformers model, or any module that a task accepts; what ``torch.compile`` or data parallelism put
            around it is taken off.
        processor: its tokenizer, or what else turns its inputs into tensors.

    Raises:
        ModelError: no task accepts the model, or it is wrapped by something that hides its modules or weights.
    """
    model = unwrap(model)
    if hasattr(processor, "from_pretrained"):  # a tokenizer, or what reads images
        check_head(model, "this model")
    for name in TASKS.names():
        kind: type[Task] = TASKS.load(name)
        if kind.accepts(model, processor):
            return kind(model, processor)
    raise ModelError(
        f"no task accepts a {type(model).__name__} with {type(processor).__name__} as its processor: give a language "
        "model or a text classifier with its tokenizer, an image classifier with its image processor, or a policy "
        "with its action space"
    )


def load(
    model: str,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    quantise: str | None = None,
    trust_remote_code: bool = False,
    use_safetensors: bool = True,
) -> Task:
    """Load a language model, or a classifier of texts or images, with its processor, in evaluation mode.

    A checkpoint that is stored quantised is loaded as it is stored.

    Args:
        model: the name of a small model that ships with remend (``atlas``, ``questions``), a local folder, a hub id, or
            a GGUF file, whose weights become ordinary ones in float32 (with the extra ``gguf``).
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …, or ``map``: spread over all GPUs, the memory and the disk.
        dtype: of the weights; by default float32 on the CPU and the checkpoint's own (``auto``) elsewhere.
        quantise: store the blocks' matrices in fewer bits: ``bnb-4bit`` (NF4), ``bnb-8bit`` (LLM.int8()) or
            ``torchao-int8``.
        trust_remote_code: run code that the model's folder or repository holds, or names on the hub. It never runs
            otherwise, and nobody is asked.
        use_safetensors: read weights from safetensors files only. A ``pytorch_model.bin`` may hold code, from which
            torch's reader of weights protects.

    Raises:
        ModelError: there is no such model, it has no processor, weights are missing or do not fit its configuration,
            its head is for another task, or a package that the device map or the quantisation needs is missing.
        ConfigError: there is no such quantisation.
    """
    return wrap(*load_pretrained(model, device, dtype, quantise, trust_remote_code, use_safetensors))


def answers(task: Task, prompts: Sequence[Prompt | Sequence[Any]], max_new_tokens: int = 32) -> list[str]:
    """Return the model's own answers as text, greedy and up to its end token: what an applied edit does shows here.

    Args:
        task: the model.
        prompts: what to ask.
        max_new_tokens: the longest answer, in tokens.

    Raises:
        RequestError: ``prompts`` is not a list, or one of them is empty, or leaves no room for an answer.
    """
    if isinstance(prompts, str):
        raise RequestError(f"give a list of prompts, not one text: [{prompts[:40]!r}]")
    inputs: list[Prompt] = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            inputs.append(as_prompt(prompt))
        except ValueError as error:
            raise RequestError(f"prompt {number} {error}") from None
    warn_of_unknown_text(task, inputs, "the prompts")
    return [task.decode(answer) for answer in task.predict(inputs, max_new_tokens)]
