"""How well edits work after their rank is reduced, which servers of adapters require.

    python benchmarks/rank_compression.py [--config benchmarks/configs/rank_compression.json] [--out result.json]

Edits are made one by one and many together, then replaced by the nearest change of a smaller rank
(``Edit.compressed``, as ``remend export --rank`` does), and evaluated with ``remend.evaluate``.
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported: see common.py

import random
from collections.abc import Sequence
from typing import Any

import common
import remend
from remend.edit import Edit
from remend.editors import Mend, make
from remend.editors.base import Editor
from remend.request import EditRequest
from remend.tasks import Task

METRICS = ("edit_success", "locality_near", "locality_far")


class CompressingEditor:
    """An editor whose edits are reduced to a rank.

    Attributes:
        info: that of the wrapped editor.
        ranks: for each edit, the largest rank of a change before it was reduced.
        lost: for each edit, the largest share of a matrix's change that was lost.
    """

    def __init__(self, editor: Editor, rank: int | None) -> None:
        self.info = editor.info
        self._editor, self._rank = editor, rank
        self.ranks: list[int] = []
        self.lost: list[float] = []

    def edit(self, task: Task, requests: Sequence[EditRequest]) -> Edit:
        """Return the wrapped editor's edit, reduced to the rank."""
        edit = self._editor.edit(task, requests)
        assert isinstance(edit, Edit)
        self.ranks.append(max(change.rank for change in edit.changes.values()))
        if self._rank is None:
            return edit
        compressed = edit.compressed(self._rank)
        self.lost.append(max(compressed.editor["lost"].values()))
        return compressed

    def edit_each(self, task: Task, requests: Sequence[EditRequest]) -> list[Edit]:
        """Return the reduced edit of each request."""
        return [self.edit(task, [request]) for request in requests]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the result."""
    arguments = common.parser(__doc__, "rank_compression").parse_args(argv)
    config = common.start(arguments)
    task = remend.load(config["model"], "cpu")
    requests = random.Random(config["seed"]).sample(remend.read_source(config["data"]), config["requests"])
    rows = []
    for name in config["editors"]:
        editor = Mend.load(name) if name == config["model"] else make(name, task)
        for size in config["sizes"]:
            evaluated = requests[: config["requests"] if size == 1 else config["batched"]]
            for rank in (None, *config["ranks"]):
                compressing = CompressingEditor(editor, rank)
                protocol = {"protocol": "single"} if size == 1 else {"protocol": "batched", "edits": [size]}
                report = remend.evaluate(task, compressing, evaluated, baselines=False, **protocol)
                means = {key: value["generated"].mean for key, value in report.metrics().items() if key in METRICS}
                lost = sum(compressing.lost) / len(compressing.lost) if compressing.lost else 0.0
                rows.append(
                    {"editor": name, "edits": size, "rank": rank, "of_rank": max(compressing.ranks), "lost": lost}
                    | means
                )
                print(rows[-1], flush=True)
    common.write(arguments.out, config, {"rows": rows})
    arguments.out.with_suffix(".md").write_text(table(rows, config), encoding="utf-8")


def table(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = [
        f"Edits of {config['model']} cut to a rank (`python benchmarks/rank_compression.py`; "
        f"{config['requests']} requests of `{config['data']}` one by one, {config['batched']} in "
        "batches; answers generated; lost: of the matrix that loses most, the share of its change, in the mean).",
        "",
        "| editor | edits at once | rank | lost | edit success | kept of it | near | far |",
        "|---|---|---|---|---|---|---|---|",
    ]
    uncompressed_success = 0.0
    for row in rows:
        if row["rank"] is None:
            uncompressed_success = row["edit_success"]
        rank = f"{row['of_rank']}, as it is" if row["rank"] is None else str(row["rank"])
        cells = [
            row["editor"], row["edits"], rank, f"{row['lost']:.3f}", f"{row['edit_success']:.3f}",
            f"{row['edit_success'] / uncompressed_success:.3f}", f"{row['locality_near']:.3f}",
            f"{row['locality_far']:.3f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
