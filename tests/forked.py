"""The command line in processes of their own, each the fork of one that has imported it: imports take seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

PRELOADED = ["remend.cli", "remend.training", "remend.apps.patch_registry", "transformers.models.gpt2.modeling_gpt2"]


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def remend(arguments: Sequence[str], prepare: Callable[[], None] | None = None, timeout: float = 120) -> Ended:
    """Run ``remend`` with some arguments, and wait for its end.

    Args:
        arguments: of the command line.
        prepare: a function of a module, called before the command.
        timeout: in seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        process = context.Process(target=_run, args=([str(argument) for argument in arguments], outputs, prepare))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        return Ended(process.exitcode, *(Path(output).read_text() for output in outputs))


def _run(arguments: Sequence[str], outputs: Sequence[str], prepare: Callable[[], None] | None) -> None:
    for descriptor, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), descriptor)
    from remend.cli import run

    if prepare:
        prepare()
    sys.exit(run(arguments))


def kill_after_step(step: int) -> None:
    """Let this process be killed after a step of a training, before its checkpoint."""
    from remend.training import Trainer

    def train_step(self: Trainer, share: float, real=Trainer.train_step) -> float:
        loss = real(self, share)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    Trainer.train_step = train_step
