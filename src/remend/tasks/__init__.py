"""What a request means for a model: which tokens go in, which logits are asked for, how an answer is decoded."""

from remend.tasks.causal_lm import answers

__all__ = ["answers"]
