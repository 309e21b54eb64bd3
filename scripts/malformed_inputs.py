"""Damage folders of every kind at random and read each: every one is refused in words, or read as what it still is.

    PYTHONPATH=src:tests python scripts/malformed_inputs.py --times 200 --out benchmarks/results/malformed_inputs.json

A try fails if it raises anything but an error of remend, takes longer than the limit, reads or writes outside of the
folder, or returns what cannot be saved and read again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import families
import remend
import tampering
from remend.errors import RemendError
from test_formats import random_edit

SECONDS = 2.0
"""The longest that reading a folder may take."""


def main() -> None:
    """Try all kinds of folders and write what happened."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=200, help="damages of each kind of folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    task, request = families.task("llama"), families.requests("llama", 1)
    kinds = tampering.kinds(task, request, replace(random_edit(task.model), requests=tuple(request)))
    results = {name: try_kind(*kind, options.times, options.seed) for name, kind in kinds.items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    report = {"seed": options.seed, "seconds_allowed": SECONDS, "versions": versions, "kinds": results}
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(any(result["failures"] for result in results.values()))


def try_kind(
    write: Callable[[Path], object], read: Callable[[Path], object], times: int, seed: int
) -> dict[str, object]:
    """Damage folders of one kind and read them; return how many were refused and read, and what failed."""
    failures: list[str] = []
    counts: Counter[str] = Counter()
    slowest = 0.0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "outside.txt").write_text("secret")
        write(root / "good")
        for number, folder in enumerate(tampering.damaged_copies(root / "good", root, times, seed)):
            start, found = time.perf_counter(), None
            try:
                with tampering.only_within(folder), contextlib.redirect_stdout(io.StringIO()):
                    found = read(folder)
                counts["read"] += 1
            except RemendError:
                counts["refused"] += 1
            except BaseException as error:  # what the script looks for
                failures.append(f"{number}: {type(error).__name__}: {str(error)[:200]}")
            seconds = time.perf_counter() - start
            slowest = max(slowest, seconds)
            if seconds > SECONDS:
                failures.append(f"{number}: {seconds:.1f} s")
            if hasattr(found, "save"):
                with contextlib.suppress(RemendError):
                    again = root / f"again {number}"
                    found.save(again)
                    type(found).load(again)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    return {
        "tries": times,
        **counts,
        "failures": failures,
        "slowest_seconds": round(slowest, 2),
        "grown_mb": round(grown),
    }


if __name__ == "__main__":
    assert remend.__version__
    main()
