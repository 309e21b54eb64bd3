"""A process that works on a book until its work is done, or it is killed: run by test_book.py.

    python book_worker.py BOOK EDITS SEED OPERATIONS

What it has done it appends to a file of its own, after it was done: whatever stands there must be in the book.
"""

import os
import random
import sys
from pathlib import Path

from remend.apps.patch_registry import PatchRegistry
from remend.edit import Edit
from remend.errors import EditError


def main() -> None:
    path, edits, seed, operations = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    draw = random.Random(seed)
    book = PatchRegistry(path)
    made = [Edit.load(folder) for folder in sorted(edits.iterdir())]
    log = edits.parent / f"done-{seed}"
    done = len(log.read_text().splitlines()) if log.exists() else 0
    for _ in range(done):
        draw.random()
    with log.open("a") as told:
        for number in range(done, operations):
            kind = draw.random()
            entries = book.entries
            if kind < 0.2 or not entries:
                entry = book.add(made[int(kind * 1e6) % len(made)], f"{seed}/{number}")
                said = f"add {entry.id}"
            else:
                entry = entries[int(kind * 1e6) % len(entries)]
                wanted = "reverted" if entry.state == "active" else "active"
                try:
                    book.switch(entry.id, wanted, f"{seed}/{number}")
                    said = f"{wanted} {entry.id}"
                except EditError:  # another process was quicker
                    said = f"none {entry.id}"
            told.write(f"{said}\n")
            told.flush()
            os.fsync(told.fileno())


if __name__ == "__main__":
    main()
