"""Damage files and folders of every kind at random and read each: all are refused in words, or read as what they are.

    PYTHONPATH=src:tests python scripts/malformed_inputs.py --times 200 --out benchmarks/results/malformed_inputs.json

A try fails if it raises anything but an error of remend, takes longer or more memory than the limit, reads or writes
outside of the folder, or returns what cannot be saved and read again, or what its kind does not allow.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import families
import remend
import tampering
import worlds
from remend.errors import RemendError
from tampered_files import file_kinds
from test_formats import random_edit

SECONDS = 2.0
"""The longest that reading a folder may take, of a processor's time."""
MEGABYTES = 1024
"""The most memory that this process may take beyond what it has once the good folders were read."""


def main() -> None:
    """Try all kinds of folders and write what happened."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=200, help="damages of each kind of folder")
    parser.add_argument("--only", default="", help="kinds whose name matches this")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    task, request = families.task("llama"), families.requests("llama", 1)
    edit = replace(random_edit(task.model), requests=tuple(request))
    kinds = tampering.kinds(task, request, edit) | file_kinds(task, worlds.requests(8), edit)
    results = {}
    for name, kind in kinds.items():
        if re.search(options.only, name):
            results[name] = try_kind(*kind, options.times, options.seed)
            print(name, results[name], flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    totals = {key: sum(result[key] for result in results.values()) for key in ("tries", "read", "refused")}
    totals["failures"] = sum(len(result["failures"]) for result in results.values())
    totals["slowest_seconds"] = max(result["slowest_seconds"] for result in results.values())
    limits = {"seconds_allowed": SECONDS, "megabytes_allowed": MEGABYTES}
    report = {"seed": options.seed, **limits, "versions": versions, "all": totals, "kinds": results}
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(any(result["failures"] for result in results.values()))


def try_kind(write: Callable[[Path], object], read: Callable[[Path], object], times: int, seed: int) -> dict[str, Any]:
    """Damage folders of one kind and read them; return how many were refused and read, and what failed."""
    failures: list[str] = []
    counts: Counter[str] = Counter(read=0, refused=0)
    slowest = 0.0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "outside.txt").write_text("secret")
        write(root / "good")
        with contextlib.redirect_stdout(io.StringIO()):
            read(root / "good")  # also imports what reading takes
        limit_memory()
        for number, folder in enumerate(tampering.damaged_copies(root / "good", root, times, seed)):
            start, found = time.process_time(), None
            try:
                with tampering.only_within(folder), contextlib.redirect_stdout(io.StringIO()):
                    found = read(folder)
                counts["read"] += 1
            except RemendError as error:
                counts["refused"] += 1
                if folder.name not in str(error):
                    failures.append(f"{number}: no file is named: {str(error)[:300]}")
            except BaseException as error:  # what the script looks for
                failures.append(f"{number}: {type(error).__name__}: {str(error)[:200]}")
            seconds = time.process_time() - start
            slowest = max(slowest, seconds)
            if seconds > SECONDS:
                failures.append(f"{number}: {seconds:.1f} s")
            if hasattr(found, "save") and hasattr(found, "load"):
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


def limit_memory() -> None:
    """Let this process take no more than :data:`MEGABYTES` beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (MEGABYTES << 20), hard))


if __name__ == "__main__":
    assert remend.__version__
    main()
