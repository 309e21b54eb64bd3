"""Asking the Hugging Face hub for a file once, where its client would try for half a minute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)


def check_on_hub(repository: str, file: str, kind: str = "model") -> None:
    """Ask the hub once for a file, unless it is stored here.

    Args:
        repository: its owner and name.
        file: the file in it.
        kind: of the repository: ``model`` or ``dataset``.

    Raises:
        OSError: there is no such repository, or the hub cannot be reached.
    """
    if HF_HUB_OFFLINE:
        return
    try:
        if not isinstance(try_to_load_from_cache(repository, file, repo_type=kind), str):
            with readable_hub_errors():
                get_hf_file_metadata(hf_hub_url(repository, file, repo_type=kind))
    except RepositoryNotFoundError as error:
        if not isinstance(error, GatedRepoError):
            raise OSError(f"the hub has no {kind} of this name that you may read") from error
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError):
        return  # who reads the file tells what is wrong, or tries again where the hub is busy


@contextmanager
def readable_hub_errors() -> Iterator[None]:
    """Turn what the client's library for HTTP raises, which is not always the same, into an OSError."""
    try:
        yield
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError):
        raise
    except Exception as error:
        raise OSError(f"the hub cannot be reached ({error}), and nothing of it is stored here") from error
