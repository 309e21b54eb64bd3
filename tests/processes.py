"""What tests/test_processes.py starts in two processes: training runs, of which the last one fails in the second."""

import os
import signal
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import worlds
from remend.core import sketched_moment
from remend.editors import Mend
from remend.errors import ConfigError
from remend.models import fsdp as sharding
from remend.tasks import wrap
from remend.training import PRESETS, Resources, TrainingConfig, train

NETWORK = PRESETS["default"][0]
SETTINGS = TrainingConfig(
    edit_weight=1.0,
    batch_size=7,
    learning_rate=1e-3,
    alpha_learning_rate=5e-3,
    decay=True,
    max_steps=12,
    validate_every=4,
    validation_size=9,
)
"""Seven episodes are four for one process and three for the other; nine are two batches of seven and two."""

EVEN = replace(SETTINGS, batch_size=6)


def run(out=None, seen=lambda progress: None, family="gpt2", **more):
    """One training run, and the losses of its steps."""
    model, losses = worlds.FAMILIES[family](), []

    def follow(progress):
        assert sharding.is_sharded(model) is sharding.fsdp_requested()
        losses.append(progress.loss)
        seen(progress)

    requests = worlds.requests(50)
    train_on = [request for request in requests if request.subject not in worlds.COUNTRIES[:2]]
    validate_on = [request for request in requests if request.subject in worlds.COUNTRIES[:2]]
    editor = Mend.create(worlds.task(model), NETWORK, seed=SETTINGS.seed)
    settings = {"config": SETTINGS, "editor": editor, "out": out, "on_progress": follow, **more}
    return train(wrap(model, worlds.tokenizer()), train_on, validate_on, **settings), losses


def wide_run():
    """One in which inputs are wide enough to be told apart in some directions only."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MAX_DENSE_DIMENSIONS": 20, "MAX_DIRECTIONS": 12, "OVERSAMPLING": 4}.items():
            patch.setattr(sketched_moment, name, value)
        return run()


def kept(editor, losses):
    """What a run gave, as tensors."""
    history = torch.tensor([[entry["loss"], entry["taken"], entry["kept"]] for entry in editor.trained["history"]])
    return {**editor.state_dict(), "losses": torch.tensor(losses), "history": history}


def interrupted(folder):
    """A run in which only the second process is told to stop, after step 5; and its continuation."""
    rank = int(os.environ["RANK"])

    def stop(progress):
        if progress.step == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        run(folder / "resumed", stop)
    checkpoints = sorted((folder / "resumed.checkpoints").iterdir())
    # The first process may not have given up its lock yet.
    assert [path.name for path in checkpoints if path.name != "lock"] == ["step-00000005"]
    return run(folder / "resumed", resume=True)


def main(folder):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    found = {
        "whole": run(folder / "whole", track=["tensorboard"] if find_spec("tensorboard") else []),
        "resumed": interrupted(folder),
        "again": run(folder / "whole", resume=True),
        "wide": wide_run(),
        "cached": run(resources=Resources(cache_folder=folder / "cache")),
    }
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    for family in ("gpt2", "llama"):
        found[f"sharded-{family}"] = run(family=family, config=EVEN)
    with pytest.raises(ConfigError, match="must have equal parts of each batch, and 7 episodes cannot be divided so"):
        run()
    del os.environ["ACCELERATE_USE_FSDP"]
    for name, result in found.items():
        save_file(kept(*result), folder / f"{name}-{rank}.safetensors")

    def fail(progress):
        if rank == 1:
            raise OSError("the second process fails")

    run(seen=fail)
    raise AssertionError("one process went on alone")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
