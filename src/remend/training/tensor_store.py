"""Tensors that do not change while an editor trains: kept in memory up to a budget, and on disk if asked to."""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from remend.errors import FileError
from remend.serialization import read_folder, read_format, write_folder

STORE_FORMAT = "remend.activation-cache/1"
"""The format of a shard. Before, shards were ``remend.cache/1``, which is the format of a lookup editor's edits."""
SHARD_BYTES = 64 << 20
"""Entries are written to disk together when they take this much."""

Entry = tuple[Tensor, ...]


class TensorStore:
    """Entries by key, each put once and never changed or dropped.

    With a folder, every entry is also written there, in shards of safetensors that later runs (and this one, once the
    memory budget is used up) map into memory. A shard that is not what its manifest says is deleted, and what it held
    counts as missing. Several processes may share a folder: each writes shards of its own, and reads those that were
    there when it began.

    Args:
        budget: bytes of tensors to keep in memory.
        folder: where shards are; only entries of one model, cut and precision may share a folder.

    Attributes:
        used: bytes kept in memory.
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
            shards = sorted(folder.glob("shard-*"))
            # What says that it is something else is not damaged: it is left alone, for its owner to delete.
            others = [shard for shard in shards if read_format(shard) not in ("", STORE_FORMAT)]
            if others:
                warnings.warn(
                    f"{len(others)} folders in {folder} are no parts of this cache ({others[0].name} is a "
                    f"{read_format(others[0])}, of an earlier release perhaps) and are not read: delete them",
                    stacklevel=2,
                )
            for shard in shards:
                if shard not in others:
                    self._map(shard)

    def __contains__(self, key: str) -> bool:
        return key in self._entries or key in self._pending

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key] if key in self._entries else self._pending[key]

    def has_all(self, keys: Iterable[str]) -> bool:
        """Whether nothing is left to be kept: all these entries are there, or there is no place for another."""
        return (self.full and self.folder is None) or all(key in self for key in keys)

    def put(self, key: str, entry: Entry) -> None:
        """Keep a copy of an entry in memory, until one does not fit; and on disk."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in entry)
        self.full = self.full or self.used + size > self.budget
        if not self.full:
            self._entries[key] = tuple(tensor.detach().clone() for tensor in entry)
            self.used += size
        if self.folder is not None:
            self._pending[key] = tuple(tensor.detach().cpu().clone() for tensor in entry)
            self._pending_bytes += size
            if self._pending_bytes >= SHARD_BYTES:
                self.flush()

    def room(self, wanted: int) -> int:
        """How much of ``wanted`` bytes would be kept in memory."""
        return min(wanted, self.budget)

    def flush(self) -> None:
        """Write to disk what is not there yet."""
        if self.folder is None or not self._pending:
            return
        name = uuid.uuid4().hex[:16]  # another process may write the same entries at the same time
        tensors = {f"{key}/{i}": tensor for key, entry in self._pending.items() for i, tensor in enumerate(entry)}
        shard = write_folder(self.folder / f"shard-{name}", STORE_FORMAT, {}, tensors)
        self._pending, self._pending_bytes = {}, 0
        self._map(shard)

    def _map(self, shard: Path) -> None:
        try:
            tensors = read_folder(shard, STORE_FORMAT)[1]
        except (FileError, OSError) as error:
            warnings.warn(f"a damaged part of the cache is deleted and computed anew: {error}", stacklevel=2)
            shutil.rmtree(shard, ignore_errors=True)
            return
        found: dict[str, list[Tensor]] = {}
        for name in sorted(tensors):
            found.setdefault(name.rpartition("/")[0], []).append(tensors[name])
        for key, entry in found.items():
            self._entries.setdefault(key, tuple(entry))
