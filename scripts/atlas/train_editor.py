"""Train the editor that ships with the atlas, and store it in half precision.

    python scripts/atlas/train_editor.py [--budget-seconds 1500]

It is what ``remend train atlas --data atlas:train --validation atlas:validation`` does, with the default preset. The
test split is not touched; ``remend evaluate atlas --editor atlas --data atlas:test`` measures the result.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import remend
from remend.assets import ATLAS_FOLDER
from remend.training import PRESETS, TrainingProgress

MAX_BYTES = 8_000_000
"""The largest editor that the package may contain."""


def main() -> None:
    """Train and save the editor, and evaluate the saved one on the validation split."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ATLAS_FOLDER / "editor")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-steps", type=int, help="stop after so many steps; the preset's number by default")
    parser.add_argument("--budget-seconds", type=float, help="stop after so many seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()

    def print_progress(progress: TrainingProgress) -> None:
        if progress.validation is not None:
            figures = ", ".join(f"{name} {value:.4f}" for name, value in progress.validation.items())
            console.print(f"step {progress.step}, {progress.share:.0%}: {figures}", highlight=False)

    settings = PRESETS["default"][1]
    settings = replace(settings, seed=arguments.seed, max_steps=arguments.max_steps or settings.max_steps)
    task = remend.load("atlas", arguments.device)
    editor = remend.Mend.create(task, PRESETS["default"][0], seed=arguments.seed)
    remend.train(
        task,
        remend.read_source("atlas:train"),
        remend.read_source("atlas:validation"),
        config=settings,
        editor=editor,
        budget_seconds=arguments.budget_seconds,
        on_progress=print_progress,
    )
    editor.save(arguments.out, dtype=torch.float16)
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    stored = remend.Mend.load(arguments.out).to(editor.device)
    report = remend.evaluate(task, stored, remend.read_source("atlas:validation"), data="atlas:validation")
    for name, modes in report.metrics().items():
        value = modes.get("generated") or next(iter(modes.values()))
        console.print(f"{name}: {value.mean:.4f} (n = {value.n})", highlight=False)
    console.print(f"{editor.trained['seconds']:.0f} s, {size / 1e6:.1f} MB in {arguments.out}", soft_wrap=True)
    if size > MAX_BYTES:
        raise SystemExit(f"the package may contain an editor of {MAX_BYTES / 1e6:.0f} MB: choose a smaller rank")


if __name__ == "__main__":
    main()
