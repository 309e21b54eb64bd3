"""What a request means for a model: which tokens go in, which logits are asked for, how an answer is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.errors import RequestError
from remend.request import Prompt, as_prompt
from remend.tasks.base import Batch, Example, Task
from remend.tasks.causal_lm import CausalLM
from remend.tasks.seq2seq import Seq2SeqLM
from remend.tasks.text_classification import Classification

__all__ = ["Batch", "CausalLM", "Classification", "Example", "Seq2SeqLM", "Task", "answers", "task_of"]


def task_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None = None) -> Task:
    """The task that a model is for, by its structure.

    With an output layer over a vocabulary it is a language model, of one stack of blocks or of an encoder and a
    decoder; without, a classifier.
    """
    if not isinstance(model.get_output_embeddings(), nn.Module):
        return Classification(model, tokenizer, autocast)
    kind = Seq2SeqLM if getattr(model.config, "is_encoder_decoder", False) else CausalLM
    return kind(model, tokenizer, autocast)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | Sequence[Any]],
    max_new_tokens: int = 32,
) -> list[str]:
    """The model's free answers (greedy, to its own end token) as text: to see what an edit that is applied does.

    Raises:
        RequestError: ``prompts`` is no list, or one of them is empty, or leaves no room for an answer.
    """
    if isinstance(prompts, str):
        raise RequestError(f"give a list of prompts, not one text: [{prompts[:40]!r}]")
    try:
        asked = [as_prompt(prompt) for prompt in prompts]
    except ValueError as error:
        raise RequestError(f"a prompt {error}") from None
    task = task_of(model, tokenizer)
    return [task.text(answer) for answer in task.answers(asked, max_new_tokens)]
