"""Phrasings that another model writes: a chat model of this machine, or one behind an OpenAI-compatible address.

What it writes is checked: it names the subject, holds neither answer, and the edited model itself takes a statement to
ask the same. Nothing is sent anywhere but to the address that was given.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, Protocol

from remend.data.edit_sets import SetItem
from remend.editors.locate_then_edit.common_questions import asks_the_same, text_of
from remend.errors import ConfigError, ModelError
from remend.expansion.premise import Premise
from remend.request import Chat
from remend.tasks.base import Task
from remend.tasks.endings import asks

KEY_VARIABLE = "REMEND_WRITER_KEY"
"""The environment variable with the key that a writer's address asks for; it is sent there only."""

TIMEOUT, MOST_TOKENS, MOST_BYTES = 120.0, 400, 1 << 20
"""Seconds until a writer must have answered, the tokens that it may write, and the bytes that are read of that."""

SURE = 0.8
"""How sure written phrasings are: nobody judged those of a writer that is not known."""

LONGEST = 3
"""How many times longer than the request's prompt a phrasing may be, in characters, with some to spare."""

_MARK = re.compile(r"^\s*(?:[-*•]|\(?\d{1,2}[.):])\s*")
_QUOTES = "\"'“”‘’`"


class Writer(Protocol):
    """A chat model that writes what it is asked for.

    Attributes:
        name: what it is called in sets.
    """

    name: str

    def write(self, instruction: str) -> str:
        """Return its answer.

        Raises:
            ModelError: it does not answer.
        """
        ...


class LocalWriter:
    """A chat model on this machine.

    Args:
        task: the model.
        name: what it is called in sets.

    Raises:
        ConfigError: it is no chat model.
    """

    def __init__(self, task: Task, name: str) -> None:
        if not task.causal or getattr(getattr(task, "tokenizer", None), "chat_template", None) is None:
            raise ConfigError(f"{name} is no chat model, so it cannot be asked to write: give one as --writer")
        self.task, self.name = task, name

    def write(self, instruction: str) -> str:
        """Return the model's answer, decoded greedily."""
        (answer,) = self.task.predict([Chat.of([{"role": "user", "content": instruction}])], MOST_TOKENS)
        return self.task.decode(answer)


class RemoteWriter:
    """A chat model behind an OpenAI-compatible address, such as ``http://127.0.0.1:8000/v1``.

    Args:
        address: the address, without ``/chat/completions``.
        model: the model's name there.
        key: the key that it asks for, if it does.
    """

    def __init__(self, address: str, model: str, key: str | None = None) -> None:
        self.address, self.name = address.rstrip("/"), model
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def write(self, instruction: str) -> str:
        """Return the model's answer."""
        content = {
            "model": self.name,
            "messages": [{"role": "user", "content": instruction}],
            "max_tokens": MOST_TOKENS,
            "temperature": 0,
        }
        place = f"{self.address}/chat/completions"
        headers = {"Content-Type": "application/json", **self._headers}
        try:
            request = urllib.request.Request(place, json.dumps(content).encode(), headers)
            with urllib.request.build_opener(_NoRedirection).open(request, timeout=TIMEOUT) as response:
                body = response.read(MOST_BYTES)
        except urllib.error.HTTPError as error:
            said = error.read(200).decode(errors="replace")
            raise ModelError(f"the writer at {place} answers {error.code}: {said!r}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:  # no connection, or no address
            reason = getattr(error, "reason", error)
            raise ModelError(f"the writer at {place} cannot be asked ({reason}): is it running, and there?") from None
        try:
            found: Any = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            found = None
        if not isinstance(found, str):
            said = body[:200].decode(errors="replace")
            raise ModelError(f"the writer at {place} answers with no chat completion: {said!r}")
        return found


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: the request, and the key, are for the address that was given only."""

    def redirect_request(self, *_: Any) -> None:
        return None


def remote_writer(address: str, model: str | None) -> RemoteWriter:
    """Return the writer at an address, with the key of :data:`KEY_VARIABLE`.

    Raises:
        ConfigError: no model is named.
    """
    if not model:
        raise ConfigError(f"name the model that writes at {address}: --writer-model NAME")
    return RemoteWriter(address, model, os.environ.get(KEY_VARIABLE))


def written_phrasings(premise: Premise, writer: Writer, most: int) -> Iterator[SetItem]:
    """Yield phrasings that a writer makes of a request's prompt, as far as they pass the checks.

    Args:
        premise: what is asked.
        writer: the writer.
        most: the most phrasings.

    Raises:
        ModelError: the writer does not answer.
    """
    text, subject = text_of(premise.request), premise.subject
    question = asks(premise.request.prompt)
    task_of_writer = (
        f"Here is a question: {text}\n\nWrite {most} other ways to ask exactly the same"
        if question
        else f"Here is the beginning of a sentence: {text} …\n\nWrite {most} other beginnings of sentences that the "
        "very same word would complete. End each where that word would follow, and leave it out"
    )
    lines = writer.write(f"{task_of_writer}. Name {subject} in each. Write one a line, and nothing else.").splitlines()
    found: list[str] = []
    for line in lines:
        phrasing = _MARK.sub("", line).strip().strip(_QUOTES).rstrip("… ").removesuffix("...").strip()
        if phrasing != text and phrasing not in found and _passes(premise, phrasing, question):
            found.append(phrasing)
    for phrasing in found[:most]:
        yield SetItem(
            item="phrasing",
            kind="written",
            made=f"written by {writer.name}",
            sure=SURE,
            prompt=premise.in_form(phrasing),
        )


def _passes(premise: Premise, phrasing: str, question: bool) -> bool:
    """Tell whether a line that was written may ask the same as a request."""
    text, subject = text_of(premise.request), premise.subject
    answers = [premise.request.target, *([premise.old] if premise.old else [])]
    if subject.casefold() not in phrasing.casefold() or len(phrasing) > LONGEST * len(text) + 20:
        return False
    if any(answer.casefold() in phrasing.casefold() for answer in answers if answer.casefold() not in text.casefold()):
        return False
    if question or phrasing[-1] in ".?!:;,":
        return question and phrasing.endswith("?")
    template = re.sub(re.escape(subject), "{}", phrasing, flags=re.IGNORECASE)
    own = re.sub(re.escape(subject), "{}", text, flags=re.IGNORECASE)
    return asks_the_same(premise.task, own, template)
