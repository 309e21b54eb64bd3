"""Settings of every test: the shapes in annotations are checked, and one thread, since the models are tiny."""

import inspect
import sys

import hypothesis
import torch

import annotation_checks

hypothesis.settings.register_profile("remend", deadline=None)  # no test depends on how busy the machine is
hypothesis.settings.load_profile("remend")
torch.set_num_threads(1)
annotation_checks.install(["remend.core", "remend.edit", "remend.editors", "remend.tasks", "remend.training"])

import pytest  # noqa: E402

import worlds  # noqa: E402
from remend.editors import Mend, MendConfig  # noqa: E402
from remend.tasks.causal_lm import CausalLM  # noqa: E402
from remend.training import Trainer, TrainingConfig  # noqa: E402

LONGEST_FIRST = (
    "test_readme",
    "test_patch_registry",
    "test_paper_benchmark",
    "test_atlas",
    "test_processes",
    "test_studio",
    "test_benchmarks",
    "test_locate_then_edit",
    "test_lm_eval",
    "test_docs",
    "test_hub",
    "test_acceptance",
    "test_cli",
    "test_engine",
)
"""The files in which single tests take longest."""


def pytest_collection_modifyitems(items):
    """Start the files with the longest tests first, so that none of several workers ends long after the others."""
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each of several workers one stretch of the tests, of which one that has no more takes the end of another's.

    By default the first stretches are dealt out in the order of the tests, with all that take long in one of them.
    """
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session", autouse=True)
def cache_of_tests(tmp_path_factory):
    """What commands keep of models is kept apart from the user's own, also by processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REMEND_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=worlds.FAMILIES)
def model(request):
    """A tiny random model, of each family in turn."""
    return worlds.FAMILIES[request.param]()


@pytest.fixture
def task(model):
    """The model with its tokenizer."""
    return CausalLM(model, worlds.tokenizer())


@pytest.fixture
def editor(task):
    """An editor with statistics, a large step, and a few steps of training: its edits show."""
    made = Mend.create(task, MendConfig(rank=8, alpha=3e-2))
    settings = TrainingConfig(batch_size=4, learning_rate=1e-3, alpha_learning_rate=1e-3, max_steps=4)
    trainer = Trainer(task, made, worlds.requests(10), settings)
    trainer.calibrate()
    for _ in range(4):
        trainer.train_step()
    return made


@pytest.fixture
def snapshot(model):
    """A function that asserts that the model is bit for bit what it was: weights, gradients, modes and hooks."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}

    def unchanged():
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, weights[name]), f"{name} changed"
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
        assert all(parameter.grad is None for parameter in model.parameters()), "a .grad was left"
        assert {name: module.training for name, module in model.named_modules()} == modes
        for name, module in model.named_modules():
            assert not module._forward_hooks, f"a hook was left on {name}"
            assert not module._forward_pre_hooks, f"a hook was left on {name}"

    return unchanged


@pytest.fixture
def other_package(tmp_path, monkeypatch):
    """A function that makes a package ``other_package`` of some code, with entry points, as if pip had installed it."""

    def install(registry, code, **entry_points):
        registry.names()  # so that the entry points that are really installed are restored afterwards
        folder = tmp_path / "site" / "other_package-1.0.dist-info"
        folder.mkdir(parents=True)
        folder.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in entry_points.items()]
        folder.joinpath("entry_points.txt").write_text("\n".join([f"[{registry.group}]", *lines]))
        folder.parent.joinpath("other_package.py").write_text(code)
        monkeypatch.syspath_prepend(folder.parent)
        monkeypatch.delitem(vars(registry), "_entry_points")

    yield install
    sys.modules.pop("other_package", None)


@pytest.fixture
def unchecked(monkeypatch):
    """What hooks call, without the checks of annotations that tests have: ``torch.compile`` cannot trace them."""
    from remend.core import low_rank_hooks
    from remend.core.low_rank import LowRank
    from remend.core.response import Response

    hooks = (low_rank_hooks.LowRankHook, low_rank_hooks._ReadHook, low_rank_hooks.ReachCheck)
    for holder in (low_rank_hooks, Response, LowRank, *hooks):
        for name, value in list(vars(holder).items()):
            plain = inspect.unwrap(value) if inspect.isfunction(value) else value
            if plain is not value and not inspect.isgeneratorfunction(plain):
                monkeypatch.setattr(holder, name, plain)
