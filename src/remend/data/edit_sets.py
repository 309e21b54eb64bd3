"""``EditSet``: a request with the prompts that should move with it, and those that should not, for people to edit.

A file of sets is JSON lines: each request is followed by the items of its set, one a line, so that a person can strike
one or mend a word. :func:`remend.read_requests` reads such a file as requests that give their sets to the editor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from remend.errors import RequestError, intended_name
from remend.request import MESSAGES, Chat, EditRequest, Probe, Prompt, Text, in_form_of
from remend.saved_folders import write_text

ITEM = "item"
"""The key that tells an item of a set from a request."""

Role = Literal["phrasing", "implication", "near"]
ROLES: tuple[Role, ...] = get_args(Role)

ALIAS = "alias"
"""The kind of an implication whose subject is another name of the request's."""

EXAMPLES = {
    "phrasing": '{"item": "phrasing", "prompt": "Peru is governed from"}',
    "implication": '{"item": "implication", "prompt": "Cusco is the capital of", "target": "Peru", "subject": "Cusco"}',
    "near": '{"item": "near", "prompt": "The capital of Chile is"}',
}


class SetItem(BaseModel):
    """One prompt of a set, which asks for the target, or for what follows from the edit, or keeps its answer.

    These are a *phrasing*, an *implication*, and what is *near*.

    Attributes:
        item: which of these it is.
        kind: what kind of phrasing, implication or neighbour.
        made: how it was made.
        sure: how sure it is that the item is what it should be, from 0 to 1.
        prompt: the prompt; ``messages``, for a chat model, stand in place of it.
        target: of an implication, the answer that follows.
        answer: what the unedited model says; for people to read.
        subject: what the prompt is about, where that is not the request's subject.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    item: Role
    kind: str = "given"
    made: str = "by hand"
    sure: float = Field(default=1.0, ge=0, le=1)
    prompt: Prompt = Field(validation_alias=AliasChoices("prompt", MESSAGES))
    target: Text | None = None
    answer: str | None = None
    subject: Text | None = None

    @model_validator(mode="after")
    def _check_target(self) -> SetItem:
        if (self.target is not None) != (self.item == "implication"):
            has = "has an answer of its own: give it as target" if self.target is None else "has no target of its own"
            raise ValueError(f"an item that is {_with_article(self.item)} {has}")
        if self.subject is not None and self.item != "implication":
            raise ValueError(f"only implications have a subject of their own, not {_with_article(self.item)}")
        return self

    @model_serializer(mode="wrap")
    def _serialize(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = {key: value for key, value in write(self).items() if value is not None}
        if isinstance(self.prompt, Chat):
            return {(MESSAGES if key == "prompt" else key): value for key, value in fields.items()}
        return fields


@dataclass(frozen=True)
class EditSet:
    """A request and the items of its set.

    Attributes:
        request: the request by itself.
        items: the items.
    """

    request: EditRequest
    items: tuple[SetItem, ...] = ()

    def of(self, item: Role) -> list[SetItem]:
        """Return the items of one role."""
        return [each for each in self.items if each.item == item]

    def as_request(self) -> EditRequest:
        """Return the request with its set, as editors take it.

        Raises:
            RequestError: what the set gives is also what the request is scored by, or it contradicts itself.
        """
        request = self.request
        try:
            in_form = {role: _without_twins(request, self.of(role)) for role in ROLES}
        except ValueError as error:
            raise RequestError(str(error)) from None
        probes = [
            Probe.model_validate({"prompt": each.prompt, "target": each.target, "kind": each.kind, **_subject_of(each)})
            for each in in_form["implication"]
        ]
        content = {
            **{name: getattr(request, name) for name in EditRequest.model_fields},
            **(request.model_extra or {}),
            "given_paraphrases": (*request.given_paraphrases, *(each.prompt for each in in_form["phrasing"])),
            "given_near": (*request.given_near, *(each.prompt for each in in_form["near"])),
            "given_portability": (*request.given_portability, *probes),
        }
        try:
            return EditRequest.model_validate(content)
        except ValidationError as error:
            raise RequestError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None

    def lines(self) -> list[str]:
        """Return the lines of a file: the request, then its items."""
        rows = [self.request.to_json(), *(each.model_dump(mode="json") for each in self.items)]
        return [json.dumps(row, ensure_ascii=False) for row in rows]


def write_edit_sets(path: str | Path, sets: Iterable[EditSet]) -> None:
    """Write sets as JSON lines; the whole file, or nothing.

    Raises:
        FileError: it cannot be written there.
    """
    write_text(path, "".join(f"{line}\n" for each in sets for line in each.lines()))


def is_item(row: dict[str, Any], where: str) -> bool:
    """Tell whether a row of a file is an item of a set; a request may have a key ``item`` of the caller's own.

    Raises:
        RequestError: its role looks like a misspelt one.
    """
    role = row.get(ITEM)
    if role in ROLES or not isinstance(role, str):
        return role in ROLES
    if (meant := intended_name(role, ROLES)) is not None:
        raise RequestError(f"{where}: an item of a set is {' or '.join(ROLES)}, not {role!r}; did you mean {meant!r}?")
    return False


def parse_item(row: dict[str, Any], where: str) -> SetItem:
    """Read one item of a set.

    Args:
        row: the object of its line.
        where: its place, for messages.

    Raises:
        RequestError: it is no item.
    """
    try:
        return SetItem.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ", ".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            meant = intended_name(key, tuple(SetItem.model_fields))
            message = "no key of an item" + (f"; did you mean {meant!r}?" if meant else "")
        what = f"{key}: {message}" if key else message
        example = EXAMPLES[row[ITEM]] if row.get(ITEM) in EXAMPLES else EXAMPLES["phrasing"]
        raise RequestError(f"{where}: {what}. An item of a set is an object such as {example}") from None


def _without_twins(request: EditRequest, items: Sequence[SetItem]) -> list[SetItem]:
    """Return items in the form of the request's prompt, each prompt once, and not the request's own."""
    found: dict[Prompt, SetItem] = {}
    for each in items:
        prompt = in_form_of(request.prompt, each.prompt)
        if prompt == request.prompt and each.item == "near":
            raise ValueError(
                f"{str(prompt)[:60]!r} is the request's own prompt, so its answer cannot stay: strike the item"
            )
        if prompt != request.prompt:
            found.setdefault(prompt, each.model_copy(update={"prompt": prompt}))
    return list(found.values())


def _subject_of(item: SetItem) -> dict[str, str]:
    return {} if item.subject is None else {"subject": item.subject}


def _with_article(role: Role) -> str:
    return {"phrasing": "a phrasing", "implication": "an implication", "near": "near"}[role]
