"""``TensorStore``: tensors that stay the same while an editor trains, in memory up to a budget, and on disk."""

from __future__ import annotations

import re
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from remend.errors import FileError
from remend.saved_folders import read_folder, read_format, remove_saved, write_folder

STORE_FORMAT = "remend.activation-cache/1"
"""The format of a shard. Before, shards were ``remend.cache/1``, which is the format of a lookup editor's edits."""

SHARD_NAME = re.compile("shard-[0-9a-f]{16}")

SHARD_BYTES = 64 << 20
"""Entries are written to disk together when they take this much."""

Entry = tuple[Tensor, ...]


class TensorStore:
    """Entries by key, each stored once and never changed or removed.

    With a folder, every entry is also written there, in shards of safetensors. Later runs map these into memory, and so
    does this run once the memory budget is used up. A shard that does not match its manifest is deleted, and its
    entries count as missing. Several processes may share a folder: each writes its own shards, and reads those that
    existed when it started.

    Args:
        budget: the bytes of tensors to keep in memory.
        folder: the folder of the shards; only entries of one model, cut and precision may share a folder.

    Attributes:
        used: the bytes kept in memory.
        full: whether an entry did not fit; nothing more is kept in memory then.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget = budget
        self.folder = folder
        self.used = 0
        self.full = False
        self._entries: dict[str, Entry] = {}
        self._pending: dict[str, Entry] = {}
        self._pending_bytes = 0
        if folder is not None:
            shards = sorted(path for path in folder.glob("shard-*") if SHARD_NAME.fullmatch(path.name))
            # A folder of another format is not damaged: it belongs to somebody, who has to delete it.
            foreign = [shard for shard in shards if read_format(shard) not in ("", STORE_FORMAT)]
            if foreign:
                warnings.warn(
                    f"{len(foreign)} folders in {folder} are no parts of this cache ({foreign[0].name} is a "
                    f"{read_format(foreign[0])}, of an earlier release perhaps) and are not read: delete them",
                    stacklevel=2,
                )
            for shard in shards:
                if shard not in foreign:
                    self._map(shard)

    def __contains__(self, key: str) -> bool:
        return key in self._entries or key in self._pending

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key] if key in self._entries else self._pending[key]

    def has_all(self, keys: Iterable[str]) -> bool:
        """Tell whether storing these entries would change nothing: all are stored, or there is no room for another."""
        return (self.full and self.folder is None) or all(key in self for key in keys)

    def put(self, key: str, entry: Entry) -> None:
        """Store a copy of an entry in memory, until one does not fit; and on disk."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in entry)
        # Once full, always full: which entries are kept must not depend on whether a later one happens to be small.
        self.full = self.full or self.used + size > self.budget
        if not self.full:
            self._entries[key] = tuple(tensor.detach().clone() for tensor in entry)
            self.used += size
        if self.folder is not None:
            self._pending[key] = tuple(tensor.detach().cpu().clone() for tensor in entry)
            self._pending_bytes += size
            if self._pending_bytes >= SHARD_BYTES:
                self.flush()

    def memory_for(self, size: int) -> int:
        """Return how many of ``size`` bytes of entries would be kept in memory."""
        return min(size, self.budget)

    def flush(self) -> None:
        """Write the entries to disk that are not there yet."""
        if self.folder is None or not self._pending:
            return
        name = uuid.uuid4().hex[:16]  # another process may write the same entries at the same time
        tensors = {f"{key}/{i}": tensor for key, entry in self._pending.items() for i, tensor in enumerate(entry)}
        shard = write_folder(self.folder / f"shard-{name}", STORE_FORMAT, {}, tensors)
        self._pending, self._pending_bytes = {}, 0
        self._map(shard)

    def _map(self, shard: Path) -> None:
        """Add the entries of a shard, memory-mapped."""
        try:
            tensors = read_folder(shard, STORE_FORMAT)[1]
        except (FileError, OSError) as error:
            warnings.warn(f"a damaged part of the cache is deleted and computed anew: {error}", stacklevel=2)
            remove_saved(shard)
            return
        entries: dict[str, list[Tensor]] = {}
        for name in sorted(tensors):
            entries.setdefault(name.rpartition("/")[0], []).append(tensors[name])
        for key, entry in entries.items():
            self._entries.setdefault(key, tuple(entry))
