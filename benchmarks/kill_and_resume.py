"""Check that training which is killed again and again ends with the same editor as training without interruption.

    python benchmarks/kill_and_resume.py [--config FILE] [--out result.json]

``remend train`` runs once without interruption, and then in chains: it is killed (SIGKILL) at a random time and
started again with ``--resume``, several times in a row, and then runs to its end. Each chain's editor is compared
with the first one: all tensors bit for bit, and the history of validations without its times.
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
from remend.training.checkpoint import checkpoints_folder


def command(config: Mapping[str, Any], out: Path, resume: bool) -> list[str]:
    """Return the command line of one session."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config["options"].items()]
    arguments = [sys.executable, "-m", "remend", "train", config["model"], *options, f"--out={out}"]
    return [*arguments, "--resume"] if resume else arguments


def run_session(config: Mapping[str, Any], out: Path, resume: bool, kill_after: float | None) -> tuple[bool, float]:
    """Run a session, kill it after some seconds, and return whether it was killed and how long it ran.

    Raises:
        RuntimeError: it failed.
    """
    start = time.monotonic()
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
    return killed, time.monotonic() - start


def last_checkpoint(out: Path) -> int | None:
    """Return the step of a run's newest checkpoint; None if it has none."""
    steps = [int(path.name.removeprefix("step-")) for path in checkpoints_folder(out).glob("step-*")]
    return max(steps, default=None)


def final_state(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Return the tensors of a finished run's editor, and its history without the times."""
    editor = Mend.load(out)
    history = [
        {name: value for name, value in entry.items() if name != "seconds"} for entry in editor.trained["history"]
    ]
    return editor.state_dict(), [*history, {"best_step": editor.trained["best_step"], "steps": editor.trained["steps"]}]


def states_equal(state: tuple[Any, Any], expected: tuple[Any, Any]) -> bool:
    """Return whether two runs ended with equal tensors, bit for bit, and equal histories."""
    (tensors, history), (expected_tensors, expected_history) = state, expected
    return (
        tensors.keys() == expected_tensors.keys()
        and all(torch.equal(tensors[name], expected_tensors[name]) for name in tensors)
        and history == expected_history
    )


def run_chain(
    config: Mapping[str, Any], out: Path, rng: random.Random, kills: int, latest: float
) -> list[dict[str, Any]]:
    """Kill a run up to ``kills`` times within ``latest`` seconds, let it end, and return what happened at each kill."""
    events: list[dict[str, Any]] = []
    while True:
        kill_after = rng.uniform(0, latest) if len(events) < kills else None
        from_step = last_checkpoint(out)
        # --resume starts a run anew that was killed before its first checkpoint.
        killed, _ = run_session(config, out, resume=bool(events), kill_after=kill_after)
        if not killed:
            return events
        events.append(
            {"killed_after_seconds": kill_after, "began_at_step": from_step, "checkpoint_left": last_checkpoint(out)}
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run without interruption, then run chains until there were as many kills as configured."""
    arguments = common.parser(__doc__, "kill_and_resume").parse_args(argv)
    config = common.start(arguments)
    rng = random.Random(config["seed"])
    chains: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        uninterrupted = Path(folder) / "uninterrupted"
        _, duration = run_session(config, uninterrupted, resume=False, kill_after=None)
        expected = final_state(uninterrupted)
        remaining = config["kills"]
        while remaining:
            out = Path(folder) / f"chain-{len(chains)}"
            most = min(remaining, config["kills_a_chain"])
            kills = run_chain(config, out, rng, most, config["latest_share"] * duration)
            chains.append({"equal": states_equal(final_state(out), expected), "kills": kills})
            remaining -= len(kills)
            result = {
                "uninterrupted_seconds": duration,
                "kills": sum(len(chain["kills"]) for chain in chains),
                "all_equal": all(chain["equal"] for chain in chains),
                "chains": chains,
            }
            print(f"chain {len(chains)}: {len(kills)} kills, equal: {chains[-1]['equal']}", flush=True)
            common.write(arguments.out, config, result)


if __name__ == "__main__":
    main()
