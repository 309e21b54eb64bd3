"""In-context editing: the fact stands in the prompt (Zheng et al., arXiv 2305.12740, without demonstrations)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NoReturn

from torch import nn

from remend.editors.info import EditorInfo, checked, refuse_unused
from remend.errors import EditError
from remend.fingerprint import HasModel, ModelFingerprint, module_of
from remend.models.structure import editable_modules
from remend.request import Chat, EditRequest, Message, Prompt, TextPair, parse_request
from remend.serialization import get_field, read_folder, write_folder
from remend.tasks.base import Task

FORMAT = "remend.context/1"


@dataclass(frozen=True, eq=False)
class ContextEdit:
    """Facts to be told before each prompt. The model stays as it is, so there is nothing to apply to it.

    Attributes:
        requests: the facts.
    """

    requests: tuple[EditRequest, ...]

    def told(self, task: Task, prompt: Prompt, room: int) -> Prompt | None:
        """A prompt with the facts before it; None where they do not fit in with ``room`` tokens of an answer."""
        found: Prompt | None = prompt
        for request in reversed(self.requests):
            if isinstance(found, str) and found.startswith(f"{request.prompt} {request.target}. "):
                return None  # the prompt tells the fact itself
            found = None if found is None else after_fact(request, found)
        return fitting(task, found, room)

    def apply(self, model: nn.Module | HasModel) -> NoReturn:
        """There is nothing to put on a model.

        Raises:
            EditError: always.
        """
        raise EditError(
            "an in-context edit changes prompts, not the model: ask the model what told() makes of a prompt, or choose "
            "an editor that changes the model"
        )

    @contextmanager
    def applied(self, model: nn.Module | HasModel) -> Iterator[nn.Module]:
        """As :meth:`apply`."""
        self.apply(model)
        yield module_of(model)

    def __add__(self, other: ContextEdit) -> ContextEdit:
        """All facts, one after the other."""
        return (
            replace(self, requests=self.requests + other.requests) if isinstance(other, ContextEdit) else NotImplemented
        )

    def save(self, path: str | Path) -> Path:
        """Write the facts to a folder."""
        return write_folder(path, FORMAT, {"requests": [request.to_json() for request in self.requests]}, {})

    @staticmethod
    def load(path: str | Path) -> ContextEdit:
        """Read what :meth:`save` wrote.

        Raises:
            FileError: it is missing, damaged, altered, or of a version that this release does not know.
            RequestError: a request is malformed.
        """
        manifest, _ = read_folder(path, FORMAT)
        listed = get_field(manifest, "requests", list, path)
        return ContextEdit(
            tuple(parse_request(json.dumps(own), f"{path}, request {n}") for n, own in enumerate(listed, start=1))
        )


class InContext:
    """Tells the model the fact, rather than editing it.

    Attributes:
        base: the kind of model it is for.
    """

    traits: ClassVar[EditorInfo] = EditorInfo(
        "in-context", "Zheng et al. (arXiv 2305.12740)", "nothing", "outside", True
    )

    def __init__(self, base: ModelFingerprint) -> None:
        self.base = base

    @classmethod
    def create(
        cls,
        task: Task,
        config: None = None,
        *,
        text: Sequence[str] = (),
        seed: int = 0,
        modules: Sequence[str] = (),
        layers: str | None = None,
    ) -> InContext:
        """The editor for ``model``."""
        refuse_unused(cls.traits.name, config=config, text=text, modules=modules, layers=layers)
        return cls(ModelFingerprint.of(task.model, editable_modules(task.model)))

    def edit(self, task: Task, requests: Sequence[EditRequest]) -> ContextEdit:
        """All facts together; they must fit into the model's context with the prompts that follow.

        Raises:
            RequestError: there is no request, or one does not fit the model's context.
            WrongBaseError: the editor is for another kind of model.
        """
        checked(self.base, task.model, requests, trained=False)
        for request in requests:
            task.encode(request.prompt, request.target)
        return ContextEdit(tuple(requests))

    def edit_each(self, task: Task, requests: Sequence[EditRequest]) -> list[ContextEdit]:
        """Each fact by itself. Errors as :meth:`edit`."""
        return [ContextEdit((request,)) for request in self.edit(task, requests).requests]


def after_fact(request: EditRequest, prompt: Prompt) -> Prompt | None:
    """A prompt with what the request says put before it; None where they are not of one kind."""
    said, target = request.prompt, request.target
    if isinstance(said, Chat) and isinstance(prompt, Chat):
        return Chat((*said.messages, Message("assistant", target), prompt.messages[-1]))
    if isinstance(said, TextPair) and isinstance(prompt, TextPair):
        return TextPair(f"{said.first} {said.second} {target}. {prompt.first}", prompt.second)
    if isinstance(said, str) and isinstance(prompt, str):
        return f"{said} {target}. {prompt}"
    return None


def fitting(task: Task, prompt: Prompt | None, room: int) -> Prompt | None:
    """A prompt, if the model's context holds it with ``room`` tokens of an answer."""
    if prompt is None or task.context is None:
        return prompt
    return prompt if len(task.encode_input(prompt)) + room <= task.context else None
