"""A process that works on a patch registry until its operations are done or it is killed: run by test_patch_registry.

    python patch_registry_worker.py REGISTRY EDITS SEED OPERATIONS

Before each operation it writes the operation's number to its standard output and waits for a line on its standard
input. After the operation it appends the result to a file ``done-SEED``:
what stands there must be in the registry.
"""

import os
import random
import sys
from pathlib import Path

from remend.apps.patch_registry import PatchRegistry
from remend.edit import Edit
from remend.errors import EditError


def main() -> None:
    path, folder, seed, operations = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    draw = random.Random(seed)
    registry = PatchRegistry(path)
    edits = [Edit.load(saved) for saved in sorted(folder.iterdir())]
    log = folder.parent / f"done-{seed}"
    done = len(log.read_text().splitlines()) if log.exists() else 0
    for _ in range(done):
        draw.random()
    with log.open("a") as file:
        for number in range(done, operations):
            print(number, flush=True)
            sys.stdin.readline()
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


if __name__ == "__main__":
    main()
