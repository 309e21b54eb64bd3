"""What to change: an edit request, what it asks (a text or a conversation), and JSON-lines files of them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

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

from remend.errors import RequestError, intended_name
from remend.registries import TASKS
from remend.saved_folders import write_text

MESSAGES = "messages"
"""The key that holds a conversation, in place of ``prompt``."""
KIND = "kind"
"""The key of a probe's kind; each kind is measured separately."""
SAVED = {"saved": True}
"""The pydantic context in which saved requests and probes are read: earlier releases took any key, so all are kept."""


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
    """A conversation that a chat model answers, in place of a text.

    ``str`` of it is for people to read; the model reads what its tokenizer's chat template makes of it.

    Attributes:
        messages: the messages so far; the last one is the user's.
    """

    messages: tuple[Message, ...]

    @staticmethod
    def of(messages: object) -> Chat:
        """Make a conversation of a list of ``{"role": …, "content": …}``.

        Raises:
            RequestError: it is not such a list, or its last message is not a user's.
        """
        if not isinstance(messages, list | tuple) or not messages:
            raise RequestError(
                'should be a text, or a list of messages such as [{"role": "user", "content": "…"}], '
                f"not {_truncated(messages)}"
            )
        for number, message in enumerate(messages, start=1):
            if (
                not isinstance(message, Mapping)
                or message.keys() != {"role", "content"}
                or not all(isinstance(part, str) for part in message.values())
            ):
                raise RequestError(
                    f'message {number} should be {{"role": "…", "content": "…"}}, both texts, not {_truncated(message)}'
                )
        last = messages[-1]
        if last["role"] != "user" or not last["content"].strip():
            raise RequestError(
                f"the last message should be the user's, not empty, for the target to answer it, not {_truncated(last)}"
            )
        return Chat(tuple(Message(**message) for message in messages))

    def with_last_message(self, text: str) -> Chat:
        """Return the same conversation with ``text`` as the user's last message."""
        return Chat((*self.messages[:-1], Message("user", text)))

    def to_json(self) -> list[dict[str, str]]:
        """Return the list of messages that :meth:`of` reads."""
        return [asdict(message) for message in self.messages]

    def __str__(self) -> str:
        return "\n".join(f"{message.role}: {message.content}" for message in self.messages)


@dataclass(frozen=True)
class TextPair:
    """Two texts that a classifier reads together, such as a premise and a hypothesis; in JSON, a list of two."""

    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.first} / {self.second}"


class Input(ABC):
    """An input that is not a text: an image, an observation. It stands in requests under a key of its own.

    A kind of input is a frozen dataclass, so that inputs can be compared and hashed; ``str`` of one is for people. Its
    key is declared with its task in :data:`remend.registries.TASKS`.

    Attributes:
        key: the key of a request or a probe that holds the input, in place of ``prompt``.
    """

    key: ClassVar[str]

    @classmethod
    @abstractmethod
    def from_json(cls, value: object) -> Input:
        """Make the input of its JSON value.

        Raises:
            ValueError: the value is not one of this kind; the message says what is.
        """

    @abstractmethod
    def to_json(self) -> Any:
        """Return the JSON value that :meth:`from_json` reads."""


def _truncated(value: object) -> str:
    """Return the ``repr`` of a value, at most 80 characters long."""
    return text if len(text := repr(value)) <= 80 else f"{text[:79]}…"


def as_prompt(value: object) -> str | Chat | TextPair | Input:
    """Return a request's JSON value of a prompt (a text, a list of two texts, or a list of messages) as a prompt.

    Raises:
        ValueError: a text is empty.
        RequestError: the value is none of these.
    """
    if isinstance(value, str):
        return _not_blank(value)
    if isinstance(value, list | tuple) and value and all(isinstance(text, str) for text in value):
        if len(value) != 2:
            raise RequestError(f"should be one text, or a list of two for a classifier; this list has {len(value)}")
        return TextPair(*map(_not_blank, value))
    return value if isinstance(value, Chat | TextPair | Input) else Chat.of(value)


def _prompt_to_json(prompt: str | Chat | TextPair | Input) -> Any:
    """Return the JSON value that :func:`as_prompt` reads."""
    if isinstance(prompt, Input):
        return {prompt.key: prompt.to_json()}
    if isinstance(prompt, TextPair):
        return [prompt.first, prompt.second]
    return prompt.to_json() if isinstance(prompt, Chat) else prompt


class Completion(str):
    """A text to be continued, with what stands between it and its answer; equal to the text alone.

    What the model is asked is the same; only the answer's first token differs.

    Args:
        text: the text.
        separator: nothing, a space or a line break.
    """

    separator: str

    def __new__(cls, text: str, separator: str) -> Completion:
        """Make the text with its separator."""
        prompt = super().__new__(cls, text)
        prompt.separator = separator
        return prompt

    def __reduce__(self) -> tuple[type[Completion], tuple[str, str]]:  # for copies
        return Completion, (str(self), self.separator)


def as_completion(prompt: Prompt, separator: str | None) -> Prompt:
    """Return a prompt with what stands between it and its answer; as it is, where that is left to the model.

    Raises:
        ValueError: the prompt is no text.
    """
    if separator is None:
        return prompt
    if not isinstance(prompt, str):
        raise ValueError(
            "separator stands between a text and its continuation: leave it away where the prompt is a conversation "
            "(its template says what stands there), a pair of texts, or another input"
        )
    return Completion(prompt, separator)


Separator = Literal["", " ", "\n"]
SEPARATOR_NAMES = {"": "nothing", " ": "a space", "\n": "a line break"}
"""What stands between a prompt and its target, in words."""
Text = Annotated[str, AfterValidator(_not_blank)]
Prompt = Annotated[str | Chat | TextPair | Input, PlainValidator(as_prompt), PlainSerializer(_prompt_to_json)]
"""The input of a model: a text to continue or to classify, a conversation to answer, two texts to classify together, or
an input of another kind, such as an image."""


class Probe(BaseModel):
    """A prompt and the answer that belongs to it. ``messages``, for a chat model, stand in place of the prompt.

    ``separator`` is what stands between a text and its continuation: nothing, a space or a line break. Without it, the
    model decides (:meth:`remend.tasks.Task.separator`).
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    _other_keys: ClassVar[tuple[str, ...]] = (KIND,)

    separator: Separator | None = None
    prompt: Prompt = Field(validation_alias=AliasChoices("prompt", MESSAGES))
    target: Text

    @field_validator("prompt")
    @classmethod
    def _prompt_with_separator(cls, prompt: Prompt, info: ValidationInfo) -> Prompt:
        return as_completion(prompt, info.data.get("separator"))

    @model_validator(mode="after")
    def _check_one_prompt(self) -> Probe:
        if MESSAGES in (self.model_extra or {}):
            raise ValueError("give prompt or messages, not both")
        return self

    @model_validator(mode="after")
    def _check_keys(self, info: ValidationInfo) -> Probe:
        known = (*type(self).model_fields, MESSAGES, *self._other_keys)
        for key in (self.model_extra or {}).keys() - set(known) if info.context != SAVED else ():
            if (meant := intended_name(key, known)) is not None:  # its value would be lost
                raise ValueError(
                    f"{key!r} is no key of a request; did you mean {meant!r}? Keys of your own are kept, but not one "
                    "so much like another: rename it"
                )
        return self

    @model_serializer(mode="wrap")
    def _serialize(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = write(self)
        if isinstance(self.prompt, Input):
            return {**fields.pop("prompt"), **fields}
        return {MESSAGES: fields.pop("prompt"), **fields} if isinstance(self.prompt, Chat) else fields


class EditRequest(Probe):
    """One prompt and its target, with prompts for training and evaluation (a line of a request file).

    The task adds what separates a target from its prompt, and the end token after it. Keys that are not listed here
    are kept and ignored, but one that looks like a misspelt one of these is an error. Where a request gives
    ``messages``, a text among its phrasings and probes stands for the same conversation with that text as its last
    message.

    Attributes:
        separator: what stands between the prompt (and its phrasings) and the target; by default the model decides.
        prompt: the text the model completes wrongly, or (given as ``messages``) the conversation it answers wrongly.
        target: what it should answer.
        subject: what the fact is about; splits keep a subject on one side.
        id: the caller's own name for the request.
        given_paraphrases: other phrasings of the prompt that are given to the editor with it, and never scored.
        given_near: prompts that are given to the editor as such whose answers must stay, and never scored.
        given_portability: prompts with answers that follow from the edit, given to the editor and never scored. One
            that does not name the request's subject has a ``subject`` of its own.
        paraphrases: other phrasings of the prompt, used in training and in evaluation.
        unseen_paraphrases: phrasings for evaluation only.
        locality: unrelated prompts whose answers must stay (far neighbours).
        near: related prompts whose answers must stay (another subject, or another relation of the same subject).
        portability: prompts whose answers follow from the edit; with a ``kind``, each kind is measured.
        outdated: prompts that the old fact answered; their targets, which it gave, must not be the answer any more.
        formats: the same request in another form: a question for a completion, a conversation for a text.
        negated: prompts that deny the fact ("The capital of Canada is not"), whose answer must not be the target.
        generation: prompts to be continued freely, for the fluency of what follows.
    """

    _other_keys: ClassVar[tuple[str, ...]] = ()

    subject: str | None = None
    id: str | int | None = None
    given_paraphrases: tuple[Prompt, ...] = ()
    given_near: tuple[Prompt, ...] = ()
    given_portability: tuple[Probe, ...] = ()
    paraphrases: tuple[Prompt, ...] = ()
    unseen_paraphrases: tuple[Prompt, ...] = ()
    locality: tuple[Probe, ...] = ()
    near: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    outdated: tuple[Probe, ...] = ()
    formats: tuple[Prompt, ...] = ()
    negated: tuple[Prompt, ...] = ()
    generation: tuple[Prompt, ...] = ()

    @field_validator("formats")
    @classmethod
    def _forms_with_separator(cls, forms: tuple[Prompt, ...], info: ValidationInfo) -> tuple[Prompt, ...]:
        separator = info.data.get("separator")  # for those forms that are texts: another may be a conversation
        return tuple(as_completion(form, separator) if isinstance(form, str) else form for form in forms)

    @field_validator("given_paraphrases", "given_near", "paraphrases", "unseen_paraphrases", "negated", "generation")
    @classmethod
    def _phrasings_in_conversation(cls, phrasings: tuple[Prompt, ...], info: ValidationInfo) -> tuple[Prompt, ...]:
        own_prompt, separator = info.data.get("prompt"), info.data.get("separator")
        return tuple(as_completion(in_form_of(own_prompt, prompt), separator) for prompt in phrasings)

    @field_validator("locality", "near", "portability", "outdated", "given_portability")
    @classmethod
    def _probes_in_conversation(cls, probes: tuple[Probe, ...], info: ValidationInfo) -> tuple[Probe, ...]:
        own_prompt = info.data.get("prompt")
        prompts = [in_form_of(own_prompt, probe.prompt) for probe in probes]
        return tuple(
            probe if prompt is probe.prompt else probe.model_copy(update={"prompt": prompt})
            for probe, prompt in zip(probes, prompts, strict=True)
        )

    @model_validator(mode="after")
    def _check_given(self) -> EditRequest:
        for name, scored in SCORED_LIKE_GIVEN.items():
            given = _prompts(getattr(self, name))
            for other in scored:
                if seen := given & _prompts(getattr(self, other)):
                    text = _truncated(str(min(seen, key=str)))
                    raise ValueError(
                        f"{text} is in {name} and in {other}, so it would be scored though the editor is given it: "
                        "leave it in one of them"
                    )
        if both := _prompts(self.given_near) & {self.prompt, *self.given_paraphrases}:
            text = _truncated(str(min(both, key=str)))
            raise ValueError(f"{text} asks for the target and is in given_near, where answers must stay: leave one")
        return self

    def to_json(self) -> dict[str, Any]:
        """Return the request as a JSON object without empty fields; NaN in a key of the caller becomes null."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @staticmethod
    def from_json(text: str, saved: bool = False) -> EditRequest:
        """Read a request from JSON.

        Args:
            text: the JSON object.
            saved: whether it is part of a saved edit, of which every key is kept.

        Raises:
            ValidationError: a key is missing, malformed or misspelt.
            JSONDecodeError: the text is not JSON.
            RequestError: an image, an observation or another input is not one of its kind.
        """
        context = SAVED if saved else None
        # Only inputs that are not texts take the way through Python objects: it reads JSON less strictly.
        if any(f'"{key}"' in text for key in input_types()):
            return EditRequest.model_validate(_with_inputs(json.loads(text)), strict=True, context=context)
        return EditRequest.model_validate_json(text, strict=True, context=context)

    @property
    def asking_prompts(self) -> tuple[Prompt, ...]:
        """All prompts that ask for the target: the request's own, its paraphrases and its other forms."""
        forms = ("given_paraphrases", *SCORED_FORMS)
        return (self.prompt, *(prompt for name in forms for prompt in getattr(self, name)))

    @property
    def key(self) -> str:
        """The key that splits must not share: the subject, or the prompt where no subject is named."""
        return (self.subject or str(self.prompt)).strip().casefold()


def in_form_of(own_prompt: Prompt | None, prompt: Prompt) -> Prompt:
    """Return a phrasing or a probe's prompt in the form of the request's prompt.

    If the request's prompt is a conversation, a text becomes that conversation's last message.

    Raises:
        ValueError: one is a text, the other a pair of texts.
    """
    if isinstance(own_prompt, Chat) and isinstance(prompt, str):
        return own_prompt.with_last_message(prompt)
    if isinstance(own_prompt, Input) and not isinstance(prompt, Input):
        return type(own_prompt).from_json(prompt)
    if own_prompt is not None and isinstance(own_prompt, TextPair) != isinstance(prompt, TextPair):
        kinds = ("a pair of texts", "one text") if isinstance(own_prompt, TextPair) else ("one text", "a pair of texts")
        raise ValueError(
            f"the request's prompt is {kinds[0]} and {str(prompt)[:40]!r} is {kinds[1]}: give the same kind"
        )
    return prompt


SCORED_FORMS = ("paraphrases", "unseen_paraphrases", "formats")
"""The fields whose prompts ask for the target and are scored."""
SCORED_LIKE_GIVEN = {
    "given_paraphrases": SCORED_FORMS,
    "given_near": ("near", "locality"),
    "given_portability": ("portability",),
}
"""What is given to an editor, and the fields with prompts of the same kind, which are scored."""
PROMPT_LISTS = ("given_paraphrases", "given_near", *SCORED_FORMS, "negated", "generation")
PROBE_LISTS = ("locality", "near", "portability", "outdated", "given_portability")


def _prompts(listed: Sequence[Prompt | Probe]) -> set[Prompt]:
    return {each.prompt if isinstance(each, Probe) else each for each in listed}


def input_types() -> dict[str, str]:
    """Return the keys of inputs that are not texts, each with the name of its task."""
    return {entry.input_key: entry.name for entry in TASKS if entry.input_key}


def _with_inputs(data: Any, kind: type[Input] | None = None) -> Any:
    """Replace the JSON values of inputs in a request or a probe by inputs, as :class:`EditRequest` takes them.

    Args:
        data: the JSON object.
        kind: of a probe, the kind of its request's input, as which a ``prompt`` is read.

    Raises:
        RequestError: there are several inputs, or a value is not one of its kind.
    """
    if not isinstance(data, dict):
        return data
    types = input_types()
    keys = [key for key in ("prompt", MESSAGES, *types) if key in data]
    if len(keys) > 1 and set(keys) & types.keys():
        raise RequestError(f"give {' or '.join(keys)}, not both")
    parsed = dict(data)
    if keys and keys[0] in types:
        kind = TASKS.load_input(types[keys[0]])
        parsed["prompt"] = _read_input(kind, keys[0], parsed.pop(keys[0]))
    elif kind is not None and "prompt" in data:
        parsed["prompt"] = _read_input(kind, "prompt", data["prompt"])
    if kind is None:
        return data
    for name in PROMPT_LISTS:
        if isinstance(data.get(name), list):
            parsed[name] = tuple(_read_input(kind, name, _unkeyed(kind, item)) for item in data[name])
    for name in PROBE_LISTS:
        if isinstance(data.get(name), list):
            parsed[name] = tuple(_with_inputs(probe, kind) for probe in data[name])
    return parsed


def _unkeyed(kind: type[Input], item: object) -> object:
    """Return the value of an input that was written with its key, as :meth:`EditRequest.to_json` does in lists."""
    return item[kind.key] if isinstance(item, dict) and item.keys() == {kind.key} else item


def _read_input(kind: type[Input], key: str, value: object) -> Input:
    try:
        return kind.from_json(value)
    except ValueError as error:
        raise RequestError(f"{key}: {error}") from None


def parse_request(line: str, where: str, saved: bool = False) -> EditRequest:
    """Parse one line of JSON as a request; of a saved one, every key is kept.

    Raises:
        RequestError: with ``where``, what arrived and what was allowed.
    """
    try:
        return EditRequest.from_json(line, saved)
    except json.JSONDecodeError as error:
        raise RequestError(f"{where}: {error}. A request is a JSON object in one line") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # "locality 1, target": places in lists are counted from 1.
        key = "".join(f" {part + 1}" if isinstance(part, int) else f", {part}" for part in first["loc"]).strip(" ,")
        message = first["msg"].removeprefix("Value error, ")
        what = f"{key}: {message}" if key else message
        raise RequestError(
            f'{where}: {what}. A request is an object such as {{"prompt": "The capital of Peru is", "target": "Cusco"}}'
        ) from None


def write_requests(path: str | Path, requests: list[EditRequest]) -> None:
    """Write requests as JSON lines, leaving out what is empty; the whole file, or nothing.

    Raises:
        FileError: it cannot be written there.
    """
    lines = [json.dumps(request.to_json(), ensure_ascii=False) for request in requests]
    write_text(path, "\n".join(lines) + "\n")
