"""Push saved edits and editors to the Hugging Face hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remend.apps.hub.model_card import render_model_card
from remend.errors import FileError
from remend.saved_folders import MANIFEST, TENSORS, hub_errors, read_verified_manifest, resolve_folder

CARD_FILE = "README.md"


def push(
    folder: str | Path,
    repo: str,
    *,
    license_id: str | None = None,
    base: str | None = None,
    evaluation: Sequence[tuple[str, str]] = (),
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload with remend",
) -> str:
    """Push a saved edit or editor to the hub with a model card, and return the URL of the commit.

    Args:
        folder: a folder written by :meth:`remend.Edit.save` or an editor's ``save``; it is verified first.
        repo: the repository, ``owner/name``; it is created if it does not exist.
        license_id: the hub's identifier of the license (``apache-2.0``).
        base: the base model's hub id, if the manifest has another name.
        evaluation: results for the card, each as a name and a value in words.
        private: whether a new repository is private; by default as its owner has set.
        token: the hub token; by default the one that ``hf auth login`` stored.
        message: the commit message.

    Raises:
        FileError: the folder holds neither an edit nor an editor, is damaged, or the hub does not take it.
    """
    check_repo_name(repo)
    manifest, folder = read_verified_manifest(folder), resolve_folder(folder)
    card = render_model_card(manifest, repo, license_id, base, evaluation)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    operations = [CommitOperationAdd(name, str(folder / name)) for name in (MANIFEST, TENSORS)]
    operations.append(CommitOperationAdd(CARD_FILE, card.encode()))
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message=message)
    except hub_errors() as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileError(f"the hub did not take {folder} as {repo}: {reason}. Nothing was published") from None
    return str(commit.commit_url)


def check_repo_name(repo: str) -> None:
    """Check that a name has the form ``owner/name``.

    Raises:
        FileError: it has not.
    """
    if not re.fullmatch(r"\w[\w.\-]*/\w[\w.\-]*", repo):
        raise FileError(f"{repo!r} is not the name of a hub repository: give owner/name")


def push_to_hub(artifact: Any, repo: str, **options: Any) -> str:
    """Save an edit or an editor to a temporary folder and push it; options and errors are those of :func:`push`.

    Args:
        artifact: an edit or an editor.
        repo: the repository, ``owner/name``.
        options: further arguments of :func:`push`.
    """
    with tempfile.TemporaryDirectory() as folder:
        return push(artifact.save(Path(folder) / "saved"), repo, **options)
