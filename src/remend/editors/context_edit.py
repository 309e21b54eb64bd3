"""``ContextEdit``: an edit that puts facts before prompts, and changes no weight."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from torch import nn

from remend.errors import EditError
from remend.fingerprint import HasModel, module_of
from remend.request import Chat, EditRequest, Message, Prompt, TextPair, as_completion, parse_request
from remend.saved_folders import get_field, read_folder, write_folder
from remend.tasks.base import Task

CONTEXT_EDIT_FORMAT = "remend.context/1"
"""The format in the manifest of a saved in-context edit."""


@dataclass(frozen=True, eq=False)
class ContextEdit:
    """Facts that are put before each prompt. The model stays as it is, so there is nothing to apply to it.

    Attributes:
        requests: the facts.
    """

    requests: tuple[EditRequest, ...]

    def with_facts(self, task: Task, prompt: Prompt, max_new_tokens: int) -> Prompt | None:
        """Return a prompt with the facts before it; None where the context does not hold both and the answer.

        Args:
            task: the model.
            prompt: the prompt.
            max_new_tokens: the tokens of the context that the answer may take.
        """
        longer: Prompt | None = prompt
        for request in reversed(self.requests):
            if isinstance(longer, str) and longer.startswith(str(prepend_fact(request, ""))):
                return None  # the prompt states the fact itself
            longer = None if longer is None else prepend_fact(request, longer)
        return fit_context(task, longer, max_new_tokens)

    def apply(self, model: nn.Module | HasModel) -> NoReturn:
        """Refuse, because there is nothing to put on a model.

        Raises:
            EditError: always.
        """
        raise EditError(
            "an in-context edit changes prompts, not the model: give the model what with_facts() makes of a prompt, or "
            "choose an editor that changes the model"
        )

    @contextmanager
    def applied(self, model: nn.Module | HasModel) -> Iterator[nn.Module]:
        """Refuse as :meth:`apply` does."""
        self.apply(model)
        yield module_of(model)

    def __add__(self, other: ContextEdit) -> ContextEdit:
        """Return one edit with the facts of both."""
        if not isinstance(other, ContextEdit):
            return NotImplemented
        return replace(self, requests=self.requests + other.requests)

    def save(self, path: str | Path) -> Path:
        """Write the facts to a folder and return it."""
        requests = [request.to_json() for request in self.requests]
        return write_folder(path, CONTEXT_EDIT_FORMAT, {"requests": requests}, {})

    @staticmethod
    def load(path: str | Path) -> ContextEdit:
        """Read an edit that :meth:`save` wrote.

        Raises:
            FileError: it is missing, damaged, altered, or of a version that this release does not know.
            RequestError: a request is malformed.
        """
        manifest, _ = read_folder(path, CONTEXT_EDIT_FORMAT)
        requests = get_field(manifest, "requests", list, path)
        return ContextEdit(
            tuple(
                parse_request(json.dumps(request), f"{path}, request {number}", saved=True)
                for number, request in enumerate(requests, start=1)
            )
        )


def prepend_fact(request: EditRequest, prompt: Prompt) -> Prompt | None:
    """Return a prompt with the request's prompt and target before it; None where the prompts are of different kinds."""
    fact, target = request.prompt, request.target
    if isinstance(fact, Chat) and isinstance(prompt, Chat):
        return Chat((*fact.messages, Message("assistant", target), prompt.messages[-1]))
    if isinstance(fact, TextPair) and isinstance(prompt, TextPair):
        return TextPair(f"{fact.first} {fact.second} {target}. {prompt.first}", prompt.second)
    if isinstance(fact, str) and isinstance(prompt, str):
        separator, own = (getattr(text, "separator", None) for text in (fact, prompt))
        return as_completion(f"{fact}{' ' if separator is None else separator}{target}. {prompt}", own)
    return None


def fit_context(task: Task, prompt: Prompt | None, max_new_tokens: int) -> Prompt | None:
    """Return the prompt if the model's context holds it and an answer of ``max_new_tokens`` tokens, else None."""
    if prompt is None or task.context is None:
        return prompt
    return prompt if len(task.encode_input(prompt)) + max_new_tokens <= task.context else None
