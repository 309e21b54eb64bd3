"""The kinds of models that can be edited: how each is given inputs, scored, and asked for answers."""

from remend.tasks.base import Answer, Batch, Example, Task
from remend.tasks.own_words import as_the_model_says
from remend.tasks.wrapping import answers, load, wrap

__all__ = ["Answer", "Batch", "Example", "Task", "answers", "as_the_model_says", "load", "wrap"]
