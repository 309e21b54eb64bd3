"""What to change: an edit request, and JSON-lines files of them."""

from __future__ import annotations

import difflib
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from remend.errors import RequestError


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]


class Probe(BaseModel):
    """A prompt and the answer that belongs to it."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    prompt: Text
    target: Text


class EditRequest(Probe):
    """One pair to edit, with what is known about its neighbourhood (a line of a request file).

    The separating space before a target and the end token after it are remend's business. Keys that are not listed
    here are kept and ignored.

    Attributes:
        prompt: the text the model completes wrongly.
        target: what it should answer.
        subject: what the fact is about; splits keep a subject on one side.
        id: the caller's own name for the request.
        paraphrases: other phrasings of the prompt, used in training and in evaluation.
        unseen_paraphrases: phrasings for evaluation only.
        locality: unrelated prompts whose answers must stay (far neighbours).
        near: related prompts whose answers must stay (another subject, or another relation of the same subject).
        portability: prompts whose answers follow from the edit.
    """

    subject: str | None = None
    id: str | int | None = None
    paraphrases: tuple[Text, ...] = ()
    unseen_paraphrases: tuple[Text, ...] = ()
    locality: tuple[Probe, ...] = ()
    near: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The request as a JSON object, without what is empty; NaN in a key of the caller's own becomes null."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @property
    def key(self) -> str:
        """What a split must not share: the subject, or the prompt where no subject is named."""
        return (self.subject or self.prompt).strip().casefold()


def parse_request(line: str, where: str) -> EditRequest:
    """One request from a line of JSON.

    Raises:
        RequestError: with ``where``, what arrived and what was allowed.
    """
    try:
        return EditRequest.model_validate_json(line, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        what = f"{key}: {first['msg']}" if key else first["msg"]
        raise RequestError(
            f'{where}: {what}. A request is an object such as {{"prompt": "The capital of Peru is", "target": "Cusco"}}'
        ) from None


def read_requests(path: str | Path) -> list[EditRequest]:
    """All requests of a JSON-lines file (UTF-8, one object a line, blank lines skipped).

    Raises:
        RequestError: the file is missing, not UTF-8, has a malformed line (which is named) or no request at all.
    """
    path = Path(path)
    requests = [parse_request(text, f"{path}, line {number}") for number, text in _lines(path)]
    if not requests:
        raise RequestError(f"{path} holds no request: one JSON object a line was expected")
    _warn_of_misspelt_keys(path, requests)
    return requests


def write_requests(path: str | Path, requests: list[EditRequest]) -> None:
    """Write requests as JSON lines, leaving out what is empty."""
    lines = [json.dumps(request.to_json(), ensure_ascii=False) for request in requests]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _warn_of_misspelt_keys(path: Path, requests: list[EditRequest]) -> None:
    """Unknown keys are the caller's own, unless they look very much like known ones."""
    unknown = Counter(key for request in requests for key in request.model_extra or {})
    for key, lines in unknown.items():
        if meant := difflib.get_close_matches(key, EditRequest.model_fields, n=1, cutoff=0.8):
            warnings.warn(
                f"{path}: {lines} lines have the key {key!r}; did you mean {meant[0]!r}? It is ignored", stacklevel=3
            )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}; give a JSON-lines file of requests") from None
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise RequestError(
                f"{path}, line {number}: byte {error.start + 1} is not UTF-8 (0x{line[error.start]:02x}); "
                "save the file as UTF-8"
            ) from None
        if text:
            yield number, text
