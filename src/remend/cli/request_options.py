"""``read_edit_requests``: the requests of a command line, which are one prompt with its target or those of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remend.cli import options
from remend.errors import RequestError

if TYPE_CHECKING:
    from remend.request import EditRequest

SEPARATORS = {"none": "", "space": " ", "newline": "\n"}
"""What can be said to stand between a prompt and its target, by its name."""


def read_edit_requests(
    prompts: Sequence[str],
    target: str | None,
    file: Path | None,
    subject: str | None = None,
    separator: str | None = None,
    chat: bool = False,
    pair: bool = False,
) -> list[EditRequest]:
    """Return the requests of a command line.

    Args:
        prompts: the values of ``--prompt``; a pair of texts has two.
        target: the value of ``--target``.
        file: the value of ``--requests``.
        subject: the value of ``--subject``.
        separator: the value of ``--separator``, one of :data:`SEPARATORS`.
        chat: whether the prompt is a conversation.
        pair: whether it is a pair of texts.

    Raises:
        RequestError: the options do not make one request, or those of a file and of a prompt stand together.
    """
    from pydantic import ValidationError

    from remend.data.request_files import read_requests
    from remend.request import EditRequest

    if file is not None and not prompts and target is None:
        for option, used, instead in (
            ("--chat", chat, "messages in place of a prompt"),
            ("--pair", pair, "a list of two texts as prompt"),
            ("--separator", separator is not None, "separator in each request"),
            ("--subject", subject is not None, "subject in each request"),
        ):
            if used:
                raise RequestError(f"{option} belongs to --prompt; in a file, give {instead}")
        return read_requests(file)
    if not prompts or target is None or file is not None:
        raise RequestError("give --prompt and --target, or --requests FILE")
    parsed = options.parse_prompts(prompts, chat, pair)
    if len(parsed) > 1:
        raise RequestError(f"one edit at a time, not {len(parsed)}: give one prompt (for several, --requests FILE)")
    if subject is not None and not subject.strip():
        raise RequestError("--subject: must not be empty")
    if separator is not None and separator not in SEPARATORS:
        raise RequestError(f"--separator is none, space or newline, not {separator!r}")
    given: dict[str, Any] = {"prompt": parsed[0], "target": target, "subject": subject}
    if separator is not None:
        given["separator"] = SEPARATORS[separator]
    try:
        return [EditRequest.model_validate(given)]
    except ValidationError as error:
        first = error.errors()[0]
        name = f"--{first['loc'][0]}: " if first["loc"] else ""
        raise RequestError(f"{name}{first['msg'].removeprefix('Value error, ')}") from None
