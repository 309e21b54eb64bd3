"""What to change: an edit request, what it asks (a text or a conversation), and JSON-lines files of them."""

from __future__ import annotations

import difflib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from remend.errors import RequestError
from remend.serialization import write_text

MESSAGES = "messages"
"""The key under which a conversation stands in place of a prompt."""
KIND = "kind"
"""The key under which a probe says of what kind it is; each kind is measured."""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


@dataclass(frozen=True)
class Message:
    """One message of a conversation: whose it is (``system``, ``user``, ``assistant``), and its text."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation that is to be answered: what a chat model is asked instead of a text.

    ``str`` of it is for people to read; the model reads what its tokenizer's chat template makes of it.

    Attributes:
        messages: what was said so far; the last message is the user's.
    """

    messages: tuple[Message, ...]

    @staticmethod
    def of(messages: object) -> Chat:
        """The conversation of a list of ``{"role": …, "content": …}``.

        Raises:
            RequestError: it is no such list, or does not end with a message of the user's.
        """
        if not isinstance(messages, list | tuple) or not messages:
            raise RequestError(
                'should be a text, or a list of messages such as [{"role": "user", "content": "…"}], '
                f"not {_short(messages)}"
            )
        for number, message in enumerate(messages, start=1):
            if (
                not isinstance(message, Mapping)
                or message.keys() != {"role", "content"}
                or not all(isinstance(part, str) for part in message.values())
            ):
                raise RequestError(
                    f'message {number} should be {{"role": "…", "content": "…"}}, both texts, not {_short(message)}'
                )
        last = messages[-1]
        if last["role"] != "user" or not last["content"].strip():
            raise RequestError(
                f"the last message should be the user's, not empty, for the target to answer it; it is {_short(last)}"
            )
        return Chat(tuple(Message(**message) for message in messages))

    def asking(self, text: str) -> Chat:
        """The same conversation with ``text`` as its last message."""
        return Chat((*self.messages[:-1], Message("user", text)))

    def to_json(self) -> list[dict[str, str]]:
        """The list of messages that :meth:`of` reads."""
        return [asdict(message) for message in self.messages]

    def __str__(self) -> str:
        return "\n".join(f"{message.role}: {message.content}" for message in self.messages)


@dataclass(frozen=True)
class TextPair:
    """Two texts that a classifier is shown together, as a premise and a hypothesis: in JSON, a list of both."""

    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.first} / {self.second}"


def _short(value: object) -> str:
    return text if len(text := repr(value)) <= 80 else f"{text[:79]}…"


def as_prompt(value: object) -> str | Chat | TextPair:
    """What a prompt is, as a request gives it: a text, a list of two, or a list of messages.

    Raises:
        ValueError: a text is empty.
        RequestError: it is none of these.
    """
    if isinstance(value, str):
        return _not_blank(value)
    if isinstance(value, list | tuple) and value and all(isinstance(text, str) for text in value):
        if len(value) != 2:
            raise RequestError(f"should be one text, or a list of two for a classifier; this list has {len(value)}")
        return TextPair(*map(_not_blank, value))
    return value if isinstance(value, Chat | TextPair) else Chat.of(value)


def _written(prompt: str | Chat | TextPair) -> str | list[str] | list[dict[str, str]]:
    if isinstance(prompt, TextPair):
        return [prompt.first, prompt.second]
    return prompt.to_json() if isinstance(prompt, Chat) else prompt


Text = Annotated[str, AfterValidator(_not_blank)]
Prompt = Annotated[str | Chat | TextPair, PlainValidator(as_prompt), PlainSerializer(_written)]
"""What a model is asked: a text that it goes on with or judges, a conversation that it answers, two texts to judge."""


class Probe(BaseModel):
    """A prompt and the answer that belongs to it. ``messages``, for a chat model, stand in place of the prompt."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    prompt: Prompt = Field(validation_alias=AliasChoices("prompt", MESSAGES))
    target: Text

    @model_validator(mode="after")
    def _asks_one_thing(self) -> Probe:
        if MESSAGES in (self.model_extra or {}):
            raise ValueError("give prompt or messages, not both")
        return self

    @model_serializer(mode="wrap")
    def _as_given(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = write(self)
        return {MESSAGES: found.pop("prompt"), **found} if isinstance(self.prompt, Chat) else found


class EditRequest(Probe):
    """One pair to edit, with what is known about its neighbourhood (a line of a request file).

    The separating space before a target and the end token after it are remend's business. Keys that are not listed
    here are kept and ignored. Where a request gives ``messages``, the texts among its phrasings and probes are asked in
    the same conversation, as its last message.

    Attributes:
        prompt: the text the model completes wrongly, or (given as ``messages``) the conversation it answers wrongly.
        target: what it should answer.
        subject: what the fact is about; splits keep a subject on one side.
        id: the caller's own name for the request.
        paraphrases: other phrasings of the prompt, used in training and in evaluation.
        unseen_paraphrases: phrasings for evaluation only.
        locality: unrelated prompts whose answers must stay (far neighbours).
        near: related prompts whose answers must stay (another subject, or another relation of the same subject).
        portability: prompts whose answers follow from the edit; with a ``kind``, each kind is measured.
        formats: the same request in another form: a question for a completion, a conversation for a text.
        negated: prompts that deny the fact ("The capital of Canada is not"), whose answer must not be the target.
        generation: prompts to be continued freely, for the fluency of what follows.
    """

    subject: str | None = None
    id: str | int | None = None
    paraphrases: tuple[Prompt, ...] = ()
    unseen_paraphrases: tuple[Prompt, ...] = ()
    locality: tuple[Probe, ...] = ()
    near: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    formats: tuple[Prompt, ...] = ()
    negated: tuple[Prompt, ...] = ()
    generation: tuple[Prompt, ...] = ()

    @field_validator("paraphrases", "unseen_paraphrases", "negated", "generation")
    @classmethod
    def _phrasings_in_conversation(cls, phrasings: tuple[Prompt, ...], info: ValidationInfo) -> tuple[Prompt, ...]:
        asked = info.data.get("prompt")
        return tuple(_within(asked, prompt) for prompt in phrasings)

    @field_validator("locality", "near", "portability")
    @classmethod
    def _probes_in_conversation(cls, probes: tuple[Probe, ...], info: ValidationInfo) -> tuple[Probe, ...]:
        asked = info.data.get("prompt")
        return tuple(probe.model_copy(update={"prompt": _within(asked, probe.prompt)}) for probe in probes)

    def to_json(self) -> dict[str, Any]:
        """The request as a JSON object, without what is empty; NaN in a key of the caller's own becomes null."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @property
    def key(self) -> str:
        """What a split must not share: the subject, or the prompt where no subject is named."""
        return (self.subject or str(self.prompt)).strip().casefold()


def _within(asked: Prompt | None, prompt: Prompt) -> Prompt:
    """What a prompt asks beside a request's own: in a conversation, a text is the last message.

    Raises:
        ValueError: one is a text, the other a pair of texts.
    """
    if isinstance(asked, Chat) and isinstance(prompt, str):
        return asked.asking(prompt)
    if asked is not None and isinstance(asked, TextPair) != isinstance(prompt, TextPair):
        kinds = ("a pair of texts", "one text") if isinstance(asked, TextPair) else ("one text", "a pair of texts")
        raise ValueError(
            f"the request's prompt is {kinds[0]} and {str(prompt)[:40]!r} is {kinds[1]}: give the same kind"
        )
    return prompt


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
    """Write requests as JSON lines, leaving out what is empty; the whole file, or nothing.

    Raises:
        FileError: it cannot be written there.
    """
    lines = [json.dumps(request.to_json(), ensure_ascii=False) for request in requests]
    write_text(path, "\n".join(lines) + "\n")


def _warn_of_misspelt_keys(path: Path, requests: list[EditRequest]) -> None:
    """Unknown keys are the caller's own, unless they look very much like known ones."""
    unknown = Counter(("key", key) for request in requests for key in request.model_extra or {})
    for request in requests:
        probes = (*request.locality, *request.near, *request.portability)
        unknown.update({("probes' key", key) for probe in probes for key in probe.model_extra or {} if key != KIND})
    for (whose, key), lines in unknown.items():
        known, cutoff = [*EditRequest.model_fields, MESSAGES], 0.8
        if whose != "key":
            known, cutoff = [*Probe.model_fields, MESSAGES, KIND], 0.7
        if meant := difflib.get_close_matches(key, known, n=1, cutoff=cutoff):
            warnings.warn(
                f"{path}: the {whose} {key!r} (in {lines} of {len(requests)} lines) is ignored; "
                f"did you mean {meant[0]!r}?",
                stacklevel=3,
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
