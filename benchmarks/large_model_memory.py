"""The memory that editing large models would take, computed from their configurations as ``remend doctor`` does.

    python benchmarks/large_model_memory.py [--config FILE] [--out result.json]

No weights are created or downloaded. A Markdown table is written beside the result.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from remend.errors import ModelError
from remend.training.resource_estimate import GPUS, dry_run


def estimate_row(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return the estimate of one model, or why it cannot be edited."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape["config"]), encoding="utf-8")
        try:
            estimate = dry_run(folder).to_json()
        except ModelError as error:
            return {"name": shape["name"], "refused": str(error)}
    del estimate["model"]  # the name of the temporary folder
    return {"name": shape["name"], **estimate}


def table(about: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown."""
    head = ["", "parameters", "edited", "editor", *(f"{count} GPU{'s' if count > 1 else ''}" for count in GPUS)]
    lines = [
        "# What large models take",
        "",
        about,
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---|" * (len(head) - 1),
    ]
    for row in rows:
        if "refused" in row:
            lines.append(f"| {row['name']} | " + f"not yet: {row['refused']}" + " |" * (len(head) - 1))
            continue
        names = list(row["matrices"])
        edited = f"{len(names)} × {'×'.join(map(str, row['matrices'][names[-1]]))}, to `{names[-1]}`"
        cells = [row["name"], f"{row['parameters'] / 1e9:.1f} billion", edited, f"{row['editor_bytes'] / 1e9:.1f}"]
        cells += [f"{row['gpu_bytes'][str(count)] / 1e9:.0f}" for count in GPUS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Estimate every model, and print and write the table."""
    arguments = common.parser(__doc__, "large_model_memory").parse_args(argv)
    config = common.start(arguments)
    rows = [estimate_row(shape) for shape in config["models"]]
    common.write(arguments.out, config, {"rows": rows})
    text = table(config["about"], rows)
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
