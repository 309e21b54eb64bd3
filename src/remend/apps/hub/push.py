"""Putting a saved edit or editor on the hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remend.apps.hub.model_card import card_of
from remend.errors import FileError
from remend.serialization import MANIFEST, TENSORS, hub_errors, read_verified_manifest, resolve_folder

CARD = "README.md"


def push(
    folder: str | Path,
    repo: str,
    *,
    licence: str | None = None,
    base: str | None = None,
    evaluation: Sequence[tuple[str, str]] = (),
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload with remend",
) -> str:
    """Put a saved edit or editor on the hub with a card, and return the address of the commit.

    Args:
        folder: what :meth:`remend.Edit.save` or an editor's ``save`` wrote; checked before anything is sent.
        repo: ``owner/name``; made if it is not there.
        licence: as the hub abbreviates it (``apache-2.0``).
        base: the base model's hub id, if the manifest names it otherwise.
        evaluation: for the card: a name and a figure in words, each.
        private: whether a repository that is made is private; by default as the owner has set.
        token: of the hub; by default the one that ``hf auth login`` keeps.
        message: of the commit.

    Raises:
        FileError: the folder holds neither, is damaged, or the hub does not take it.
    """
    check_place(repo)
    manifest, folder = read_verified_manifest(folder), resolve_folder(folder)
    card = card_of(manifest, repo, licence, base, evaluation)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    operations = [CommitOperationAdd(name, str(folder / name)) for name in (MANIFEST, TENSORS)]
    operations.append(CommitOperationAdd(CARD, card.encode()))
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        found = api.create_commit(repo, operations, commit_message=message)
    except hub_errors() as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileError(f"the hub did not take {folder} as {repo}: {reason}. Nothing was published") from None
    return str(found.commit_url)


def check_place(repo: str) -> None:
    """Refuse what cannot be a repository's name.

    Raises:
        FileError: it is not ``owner/name``.
    """
    if not re.fullmatch(r"\w[\w.\-]*/\w[\w.\-]*", repo):
        raise FileError(f"{repo!r} is no place on the hub: give owner/name")


def push_to_hub(artifact: Any, repo: str, **options: Any) -> str:
    """Save an edit or an editor to a temporary folder and publish it; options and errors are those of :func:`push`.

    Args:
        artifact: an edit or an editor.
        repo: ``owner/name``.
        options: passed on to :func:`push`.
    """
    with tempfile.TemporaryDirectory() as folder:
        return push(artifact.save(Path(folder) / "saved"), repo, **options)
