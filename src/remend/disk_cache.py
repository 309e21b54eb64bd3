"""What took long to measure of a model, kept on disk for later runs.

    FOLDER/5f0c…/    one entry, a folder that remend wrote; its name is the hash of all that its content depends on

FOLDER is ``$REMEND_CACHE``, or ``remend`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``; ``REMEND_CACHE=off`` keeps nothing
and reads nothing. Entries are checked when they are read. Where they are together larger than :data:`MAX_BYTES`, those
that were not used for longest are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from remend.errors import RemendError
from remend.saved_folders import MANIFEST
from remend.staging import staging_folder

VARIABLE, OFF = "REMEND_CACHE", "off"
"""The environment variable that names the folder, and its value for none."""

MAX_BYTES = 4_000_000_000
"""The most that all entries hold together: some for large models, hundreds for small ones."""

Content = TypeVar("Content")


def cache_folder() -> Path | None:
    """Return the folder in which entries are kept; None where nothing is kept."""
    named = os.environ.get(VARIABLE, "")
    if named:
        return None if named.lower() == OFF else Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of XDG has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "remend"


def load_or_measure(
    depends_on: Mapping[str, Any],
    load: Callable[[Path], Content],
    measure: Callable[[], Content],
    save: Callable[[Content, Path], object],
    announce: Callable[[str], None] = lambda message: None,
) -> Content:
    """Return what was measured before and kept on disk, or measure it and keep it.

    Processes may do so at the same time: an entry appears and disappears as a whole. One that is damaged is measured
    again, with a warning; where nothing can be written, a warning says so and nothing else happens.

    Args:
        depends_on: all that the content depends on, as JSON.
        load: reads an entry from a folder.
        measure: returns the content.
        save: writes an entry atomically as a folder of remend (:func:`remend.saved_folders.write_folder`).
        announce: told whether it is measured or read, and where it is kept.
    """
    folder = cache_folder()
    if folder is None:
        announce(f"measured for this run alone, since {VARIABLE} is {OFF}")
        return measure()
    entry = folder / hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    try:
        content = load(entry)
    except (RemendError, OSError) as error:
        if entry.exists():  # else there is none yet, or another process has just removed it
            warnings.warn(f"what was kept in {entry} cannot be used and is measured again ({error})", stacklevel=3)
            _remove(entry)
    else:
        announce(f"measured before, read from {folder}")
        with suppress(OSError):
            os.utime(entry / MANIFEST)  # the time of last use
        return content
    announce(f"measured once and kept in {folder} ({VARIABLE}={OFF} keeps nothing)")
    content = measure()
    try:
        if not entry.exists():  # another process may have been faster
            save(content, entry)
        _remove_least_used(folder, entry)
    except (RemendError, OSError) as error:
        if not entry.exists():
            warnings.warn(
                f"it is measured again the next time: {error}. {VARIABLE} can name another folder, or be {OFF}",
                stacklevel=3,
            )
    return content


def _remove_least_used(folder: Path, newest: Path) -> None:
    """Remove the entries that were not used for longest, until the others are within :data:`MAX_BYTES`."""
    entries = []
    for path in folder.iterdir():
        if re.fullmatch(r"[0-9a-f]{64}", path.name):
            with suppress(OSError):  # another process may just remove it
                size = sum(file.stat().st_size for file in path.iterdir())
                entries.append((path == newest, (path / MANIFEST).stat().st_mtime, size, path))
    total = 0
    for _, _, size, path in sorted(entries, reverse=True):
        total += size
        if total > MAX_BYTES:
            _remove(path)


def _remove(entry: Path) -> None:
    """Remove an entry in one step for whoever reads it; what cannot be removed is left."""
    with suppress(OSError), staging_folder(entry.parent) as staging:
        entry.rename(staging / entry.name)
