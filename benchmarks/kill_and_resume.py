"""Whether a training that is killed again and again ends with the very editor that it would have ended with.

    python benchmarks/kill_and_resume.py [--config FILE] [--out result.json]

``remend train`` runs once without interruption. Then again, in chains: it is killed (SIGKILL) at a random moment and
started with ``--resume``, some times in a row, and then left to end. Every chain's editor is compared with the first:
all tensors bit for bit, and the history of validations but for its seconds.
"""

from __future__ import annotations

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch is imported: see common.py

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import common
from remend.editors import Mend
from remend.training.checkpoint import folder_of


def command(config: Mapping[str, Any], out: Path, resume: bool) -> list[str]:
    """The command line of one session."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config["options"].items()]
    made = [sys.executable, "-m", "remend", "train", config["model"], *options, f"--out={out}"]
    return [*made, "--resume"] if resume else made


def session(config: Mapping[str, Any], out: Path, resume: bool, kill_after: float | None) -> tuple[bool, float]:
    """Start a session and kill it after some seconds; returns whether it was killed, and how long it ran.

    Raises:
        RuntimeError: it failed by itself.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command(config, out, resume), stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        killed = False
        try:
            code = process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            code, killed = process.wait(), True
        if code != 0 and not killed:
            output.seek(0)
            raise RuntimeError(f"{' '.join(process.args)} failed: {output.read().decode()[-2000:]}")
    return killed, time.monotonic() - began


def last_checkpoint(out: Path) -> int | None:
    """The step of the newest checkpoint of a run, if it has one."""
    steps = [int(path.name.removeprefix("step-")) for path in folder_of(out).glob("step-*")]
    return max(steps, default=None)


def outcome(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """What a finished run left: its editor's tensors, and its history without the times."""
    editor = Mend.from_pretrained(out)
    history = [
        {name: value for name, value in entry.items() if name != "seconds"} for entry in editor.trained["history"]
    ]
    return editor.state_dict(), [*history, {"best_step": editor.trained["best_step"], "steps": editor.trained["steps"]}]


def equal(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Whether two runs ended alike, bit for bit."""
    tensors, others = one[0], other[0]
    same = tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    return same and one[1] == other[1]


def chain(
    config: Mapping[str, Any], out: Path, draw: random.Random, kills: int, longest: float
) -> list[dict[str, Any]]:
    """Kill a run up to ``kills`` times and let it end; returns what happened at each kill."""
    found: list[dict[str, Any]] = []
    while True:
        moment = draw.uniform(0, longest) if len(found) < kills else None
        from_step = last_checkpoint(out)
        # A run that was killed before its first checkpoint begins anew: --resume says so, and does it.
        killed, _ = session(config, out, resume=bool(found), kill_after=moment)
        if not killed:
            return found
        found.append(
            {"killed_after_seconds": moment, "began_at_step": from_step, "checkpoint_left": last_checkpoint(out)}
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure an uninterrupted run, then kill until as many kills as configured were survived."""
    arguments = common.parser(__doc__, "kill_and_resume").parse_args(argv)
    config = common.start(arguments)
    draw = random.Random(config["seed"])
    chains: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        straight = Path(folder) / "straight"
        _, duration = session(config, straight, resume=False, kill_after=None)
        expected = outcome(straight)
        left = config["kills"]
        while left:
            out = Path(folder) / f"chain-{len(chains)}"
            kills = chain(config, out, draw, min(left, config["kills_a_chain"]), config["latest_share"] * duration)
            chains.append({"equal": equal(outcome(out), expected), "kills": kills})
            left -= len(kills)
            found = {
                "uninterrupted_seconds": duration,
                "kills": sum(len(one["kills"]) for one in chains),
                "all_equal": all(one["equal"] for one in chains),
                "chains": chains,
            }
            print(f"chain {len(chains)}: {len(kills)} kills, equal: {chains[-1]['equal']}", flush=True)
            common.write(arguments.out, config, found)


if __name__ == "__main__":
    main()
