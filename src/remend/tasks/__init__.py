"""What a request means for a model: which tokens go in, which logits are asked for, how an answer is decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remend.request import Prompt
from remend.tasks.causal_lm import CausalLM
from remend.tasks.classification import Classification
from remend.tasks.seq2seq import Seq2SeqLM
from remend.tasks.task import Batch, Pair, Task

__all__ = ["Batch", "CausalLM", "Classification", "Pair", "Seq2SeqLM", "Task", "answers", "task_of"]


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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int = 32
) -> list[str]:
    """The model's free answers (greedy, to its own end token) as text: to see what an edit that is applied does.

    Raises:
        RequestError: a prompt is empty, or leaves no room for an answer.
    """
    task = task_of(model, tokenizer)
    return [task.text(answer) for answer in task.answers(prompts, max_new_tokens)]
