"""Figures 3 and 4: the peak memory of training an editor against the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remend.errors import TrainingError
from remend.saved_folders import write_json

MEMORY_METHODS = ("ke", "enn", "mend")
PROGRAM = Path(__file__).with_name("training_memory_process.py")


def measure_memory(folder: Path, widths: Sequence[int]) -> list[dict[str, Any]]:
    """Measure the peak memory (GB) of two training steps with batches of ten, for each method and model.

    Each is measured in a process of its own, since memory that a process has freed once may stay with it. Results are
    stored in ``folder/memory`` and not measured again.

    Raises:
        TrainingError: a process failed.
    """
    rows = []
    for width in widths:
        for method in MEMORY_METHODS:
            file = folder / "memory" / f"{method}-{width}.json"
            if not file.exists():
                write_json(file, _measure_in_process(method, width))
            rows.append({"method": method, "width": width, **json.loads(file.read_text(encoding="utf-8"))})
    return rows


def _measure_in_process(method: str, width: int) -> dict[str, Any]:
    # -P: modules of this folder must not hide installed ones of the same name.
    command = [sys.executable, "-P", str(PROGRAM), method, str(width)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        # A process that was killed, for example by the system for lack of memory, writes no error.
        error_lines = process.stderr.strip().splitlines() or [f"it ended with {process.returncode}"]
        raise TrainingError(f"measuring the memory of {method} failed: {error_lines[-1]}")
    measured = json.loads(process.stdout.strip().splitlines()[-1])
    before, peak = measured["before"] / 1e9, measured["peak"] / 1e9
    return {"parameters": measured["parameters"], "before": before, "peak": peak, "added": peak - before}
