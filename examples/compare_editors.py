"""Which editor for which request? The same requests with several editors, and what each costs nearby.

python examples/compare_editors.py
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

import remend
from remend.editors import make

METRICS = {
    "reliability": "the prompt", "generality": "paraphrases", "locality_near": "near stay", "locality_far": "far stay",
}  # fmt: skip


def main(count: int = 10) -> None:
    """Compare MEND, which was trained for the model, with editors that need no training."""
    task = remend.load("atlas")
    requests = remend.read_source("atlas:test")[:count]
    editors = {"mend": remend.Mend.load("atlas")}
    editors |= {name: make(name, task) for name in ("ridge", "finetune")}
    table = Table("editor", *METRICS.values(), title=f"generated answers, the mean of {count} edits")
    for name, editor in editors.items():
        found = remend.evaluate(task, editor, requests, baselines=False).metrics()
        table.add_row(name, *(f"{found[metric]['generated'].mean:.2f}" for metric in METRICS))
    Console().print(table)


if __name__ == "__main__":
    main()
