"""Training in two processes, on the CPU over gloo: the same editor as in one, and nobody waits for ever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import processes
import worlds
from remend.core.distributed import ProcessGroup
from remend.core.symmetric_operator import SymmetricOperator
from remend.editors import Mend
from remend.errors import ConfigError, ModelError
from remend.models.fsdp import shard_model
from remend.models.loading import choose_device
from remend.request import write_requests
from remend.tasks import load

TESTS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]


def start(*command):
    """Runs a command to its end; the launchers warn of what does not concern us."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(part) for part in command]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Where processes.py left its results, and how it ended."""
    made = tmp_path_factory.mktemp("processes")
    return made, start(*TORCHRUN, TESTS / "processes.py", made)


@pytest.fixture
def folder(job):
    """The results of processes.py."""
    made, ended = job
    assert list(made.glob("*-1.safetensors")), ended.stderr
    return made


def left(folder, name, rank=0):
    return load_file(folder / f"{name}-{rank}.safetensors")


def equal(a, b, but=()):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a.keys() - set(but))


def compare(one, two, family="gpt2"):
    """Asserts that two runs gave the same, but for the order of sums."""
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-4, atol=0)
    torch.testing.assert_close(two["history"], one["history"], rtol=1e-4, atol=0)
    assert len(one["history"]) == 4
    for name, value in (
        Mend.create(worlds.task(worlds.FAMILIES[family]()), processes.NETWORK, seed=0).state_dict().items()
    ):
        # In norm, beside the way gone: Adam turns the rounding of a gradient near zero into a whole step.
        apart, gone = (two[name].double() - one[name]).norm(), (one[name].double() - value).norm()
        assert gone > 0, f"{name} never moved"
        assert apart < 1e-4 * gone, f"{name}: {float(apart / gone):.2e} of the way apart"


def test_two_processes_train_the_editor_that_one_would(folder):
    compare(processes.kept(*processes.run()), left(folder, "whole"))


def test_all_processes_have_the_same_editor(folder):
    assert equal(left(folder, "whole", 0), left(folder, "whole", 1))


def test_processes_find_the_same_directions_of_wide_inputs(folder):
    """Directions may be turned among those of nearly the same size: what is compared is what operators do."""
    one, two = processes.kept(*processes.wide_run()), left(folder, "wide")
    assert equal(two, left(folder, "wide", 1))
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-3, atol=0)
    x = torch.randn(20, len(one["basis_0"]), generator=torch.Generator().manual_seed(0))
    for kind in ("whitener_0", "contrast_0"):
        done, expected = (SymmetricOperator(found[kind], found["basis_0"])(x) for found in (two, one))
        assert (done - expected).norm() < 1e-3 * expected.norm(), kind


def test_only_the_first_process_logs(folder):
    pytest.importorskip("tensorboard")
    assert len(list((folder / "whole.logs" / "remend").glob("events*"))) == 1


def test_interrupted_and_resumed_is_as_if_it_never_was(folder):
    """Only one process was told to stop; the processes look up what they share in the same order again."""
    for rank in (0, 1):
        assert equal(left(folder, "resumed", rank), left(folder, "whole", rank), but={"losses"})
        assert len(left(folder, "resumed", rank)["losses"]) == processes.SETTINGS.max_steps - 5
    assert not (folder / "resumed.checkpoints").exists()


def test_resuming_what_is_finished_gives_it_to_all(folder):
    for rank in (0, 1):
        assert equal(left(folder, "again", rank), left(folder, "whole", 0), but={"losses"})


def test_processes_share_a_cache_folder(folder):
    assert equal(left(folder, "cached"), left(folder, "whole"))
    shards = list((folder / "cache").glob("*/*"))
    assert len(shards) >= 2
    assert all(shard_model.name.startswith("shard-") for shard_model in shards), "nothing half-written is left"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_processes_that_share_the_model_train_the_same_editor(family, folder):
    one = processes.kept(*processes.run(family=family, config=processes.EVEN))
    compare(one, left(folder, f"sharded-{family}"), family)
    assert equal(left(folder, f"sharded-{family}", 0), left(folder, f"sharded-{family}", 1))


def test_an_error_in_one_process_ends_the_job(job):
    _, ended = job
    assert ended.returncode != 0
    assert "the second process fails" in ended.stderr
    assert "one process went on alone" not in ended.stderr


def test_of_several_processes_only_the_first_prints(tmp_path):
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    pytest.importorskip("accelerate")
    worlds.gpt2().save_pretrained(tmp_path / "model")
    worlds.tokenizer().save_pretrained(tmp_path / "model")
    write_requests(tmp_path / "train.jsonl", worlds.requests(40))
    arguments = ["--data", tmp_path / "train.jsonl", "--out", tmp_path / "editor", "--device", "cpu", "--max-steps", 2]
    ended = start(*accelerate, "-m", "remend", "train", tmp_path / "model", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("40 requests in 2 processes") == 1
    assert ended.stdout.count("best at step") == 1
    assert Mend.load(tmp_path / "editor").trained["finished"]


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:3")
    assert choose_device("cuda:1") == torch.device("cuda:1")


def test_incomplete_launches_and_models_that_cannot_be_sharded_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, but RANK.* accelerate launch or torchrun"):
        ProcessGroup(torch.device("cpu"))
    model = worlds.llama()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(3, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"lm_head\.weight is quantised or offloaded, and such a model"):
        shard_model(model, torch.device("cpu"))
    with pytest.raises(ModelError, match="'map' spreads one model over all GPUs"):
        load(str(tmp_path), "map")
