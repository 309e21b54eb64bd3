"""What test_patch_registry.py runs in processes: operations on a patch registry, until it is killed."""

import os
import random
from multiprocessing.connection import Connection
from pathlib import Path

from remend.apps.patch_registry import PatchRegistry
from remend.edit import Edit
from remend.errors import EditError


def work(connection: Connection, path: Path, folder: Path, seed: int, operations: int) -> None:
    """Do the operations that are not done yet, on the registry at ``path`` with the edits in ``folder``.

    Before each it sends the operation's number and waits for a reply. After each it appends the result to a file
    ``done-SEED``: what stands there must be in the registry.
    """
    draw = random.Random(seed)
    registry = PatchRegistry(path)
    edits = [Edit.load(saved) for saved in sorted(folder.iterdir())]
    log = folder.parent / f"done-{seed}"
    done = len(log.read_text().splitlines()) if log.exists() else 0
    for _ in range(done):
        draw.random()
    with log.open("a") as file:
        for number in range(done, operations):
            connection.send(number)
            connection.recv()
            kind = draw.random()
            entries = registry.entries
            if kind < 0.2 or not entries:
                entry = registry.add(edits[int(kind * 1e6) % len(edits)], f"{seed}/{number}")
                result = f"add {entry.id}"
            else:
                entry = entries[int(kind * 1e6) % len(entries)]
                state = "reverted" if entry.state == "active" else "active"
                try:
                    registry.set_state(entry.id, state, f"{seed}/{number}")
                    result = f"{state} {entry.id}"
                except EditError:  # another process was quicker
                    result = f"none {entry.id}"
            file.write(f"{result}\n")
            file.flush()
            os.fsync(file.fileno())
