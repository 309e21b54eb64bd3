"""What editing would take of large models, from their configurations alone: what ``remend doctor config.json`` says.

    python benchmarks/dry_run.py [--config FILE] [--out result.json]

No weight is made or fetched: models are built without memory. A table (Markdown) is written beside the result.
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


def row(shape: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to say of one model."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape["config"]), encoding="utf-8")
        try:
            found = dry_run(folder).to_json()
        except ModelError as error:
            return {"name": shape["name"], "refused": str(error)}
    del found["model"]
    return {"name": shape["name"], **found}


def table(about: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ["", "parameters", "edited", "editor", *(f"{count} GPU{'s' if count > 1 else ''}" for count in GPUS)]
    lines = [
        "# What large models take",
        "",
        about,
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---|" * (len(head) - 1),
    ]
    for one in rows:
        if "refused" in one:
            lines.append(f"| {one['name']} | " + f"not yet: {one['refused']}" + " |" * (len(head) - 1))
            continue
        names = list(one["matrices"])
        edited = f"{len(names)} × {'×'.join(map(str, one['matrices'][names[-1]]))}, to `{names[-1]}`"
        cells = [one["name"], f"{one['parameters'] / 1e9:.1f} billion", edited, f"{one['editor_bytes'] / 1e9:.1f}"]
        cells += [f"{one['gpu_bytes'][str(count)] / 1e9:.0f}" for count in GPUS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Look at every model, print and write what was found."""
    arguments = common.parser(__doc__, "dry_run").parse_args(argv)
    config = common.start(arguments)
    rows = [row(shape) for shape in config["models"]]
    common.write(arguments.out, config, {"rows": rows})
    text = table(config["about"], rows)
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
