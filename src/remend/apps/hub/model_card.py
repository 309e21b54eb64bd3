"""The card of an edit or an editor: a README that a person reads before using it, made of its manifest."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from remend.errors import FileError

if TYPE_CHECKING:
    import jinja2

SHOWN = 50
"""Requests that a card lists, at most."""


def card_of(
    manifest: Mapping[str, Any],
    repo: str,
    licence: str | None = None,
    base: str | None = None,
    evaluation: Sequence[tuple[str, str]] = (),
) -> str:
    """The card (Markdown with a YAML head) of what a manifest describes.

    Args:
        manifest: of an edit or an editor, as :func:`remend.serialization.read_manifest` gives it.
        repo: where it will be, ``owner/name``.
        licence: its licence, as the hub abbreviates it (``apache-2.0``).
        base: the base model's hub id; by default the name that the manifest has, if it can be one.
        evaluation: what was measured: a name and a figure in words, each.

    Raises:
        FileError: it is a manifest of something else.
    """
    kind = str(manifest.get("format")).partition("/")[0]
    if kind not in ("remend.edit", "remend.editor"):
        raise FileError(f"there is no card for a {manifest.get('format')!r}; edits and editors have one")
    import jinja2

    template = _environment().get_template(f"{kind.removeprefix('remend.')}.md.j2")
    try:
        own: Mapping[str, Any] = manifest["base"]
        requests = manifest.get("requests", [])
        named = str(base or own["name"])
        return template.render(
            manifest=manifest,
            repo=repo,
            licence=licence,
            base=named,
            on_hub=re.fullmatch(r"[\w.\-]+/[\w.\-]+", named) is not None,
            weights=own["weights"],
            config=own["config"],
            evaluation=evaluation,
            requests=[(_asked(request), request.get("target", "")) for request in requests[:SHOWN]],
            more=max(0, len(requests) - SHOWN),
            best=_best(manifest.get("trained") or {}),
        )
    except (KeyError, TypeError, AttributeError, ValueError, jinja2.UndefinedError) as error:
        raise FileError(f"the manifest lacks what a card tells of ({error}); it was altered") from None


def _asked(request: Mapping[str, Any]) -> str:
    """What a request asks, as a line."""
    prompt = request.get("prompt", request.get("messages", ""))
    if isinstance(prompt, list):
        return " / ".join(str(part.get("content", "")) if isinstance(part, dict) else str(part) for part in prompt)
    return str(prompt)


def _cell(text: object) -> str:
    """Text as it stands in a cell of a table: one line, and nothing that Markdown or HTML would take for its own."""
    line = " ".join(str(text).split())
    for special in "\\`*_{}[]<>|#":
        line = line.replace(special, f"\\{special}")
    return line


def _code(text: object) -> str:
    """Text as code in a line."""
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`"


@functools.cache
def _environment() -> jinja2.Environment:
    """Return what renders the cards' templates."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("remend.apps.hub", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    environment.filters |= {"cell": _cell, "code": _code}
    return environment


def _best(trained: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The validation of the state that training kept."""
    history = trained.get("history") or []
    return min(history, key=lambda entry: entry["loss"]) if history else None
