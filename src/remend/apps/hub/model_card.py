"""Model cards of edits and editors: the README of a hub repository, rendered from a manifest."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from remend.errors import FileError

if TYPE_CHECKING:
    import jinja2

MAX_REQUESTS = 50
"""The most requests that a card lists."""


def render_model_card(
    manifest: Mapping[str, Any],
    repo: str,
    license_id: str | None = None,
    base: str | None = None,
    evaluation: Sequence[tuple[str, str]] = (),
) -> str:
    """Render the card (Markdown with a YAML head) of an edit or an editor.

    Args:
        manifest: the manifest, as :func:`remend.saved_folders.read_manifest` returns it.
        repo: the hub repository, ``owner/name``.
        license_id: the hub's identifier of the license (``apache-2.0``).
        base: the base model's hub id; by default the name in the manifest, if it can be a hub id.
        evaluation: the results to show, each as a name and a value in words.

    Raises:
        FileError: it is a manifest of something else, or it lacks something.
    """
    kind = str(manifest.get("format")).partition("/")[0]
    if kind not in ("remend.edit", "remend.editor"):
        raise FileError(f"there is no card for a {manifest.get('format')!r}; only edits and editors have cards")
    import jinja2

    template = _environment().get_template(f"{kind.removeprefix('remend.')}.md.j2")
    try:
        fingerprint: Mapping[str, Any] = manifest["base"]
        requests = manifest.get("requests", [])
        base_name = str(base or fingerprint["name"])
        return template.render(
            manifest=manifest,
            repo=repo,
            license=license_id,
            base=base_name,
            on_hub=re.fullmatch(r"[\w.\-]+/[\w.\-]+", base_name) is not None,
            weights=fingerprint["weights"],
            reads=manifest.get("reads", {}),
            config=fingerprint["config"],
            evaluation=evaluation,
            requests=[(_prompt_text(request), request.get("target", "")) for request in requests[:MAX_REQUESTS]],
            more=max(0, len(requests) - MAX_REQUESTS),
            best=_best_validation(manifest.get("trained") or {}),
        )
    except (KeyError, TypeError, AttributeError, ValueError, jinja2.UndefinedError) as error:
        raise FileError(f"the manifest lacks what a card shows ({error}); it was altered") from None


def _prompt_text(request: Mapping[str, Any]) -> str:
    """Return a request's prompt as text."""
    prompt = request.get("prompt", request.get("messages", ""))
    if isinstance(prompt, list):
        return " / ".join(str(part.get("content", "")) if isinstance(part, dict) else str(part) for part in prompt)
    return str(prompt)


def _escape_cell(text: object) -> str:
    """Return text for a table cell: one line, with the special characters of Markdown and HTML escaped."""
    line = " ".join(str(text).split())
    for special in "\\`*_{}[]<>|#":
        line = line.replace(special, f"\\{special}")
    return line


def _inline_code(text: object) -> str:
    """Return text as inline code."""
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`"


@functools.cache
def _environment() -> jinja2.Environment:
    """Return the jinja2 environment of the card templates."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("remend.apps.hub", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    environment.filters |= {"cell": _escape_cell, "code": _inline_code}
    return environment


def _best_validation(trained: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the validation result of the state that training kept."""
    history = trained.get("history") or []
    return min(history, key=lambda entry: entry["loss"]) if history else None
