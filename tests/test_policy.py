"""Control policies, plain modules with discrete and with Gaussian actions: edited, trained for and evaluated."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import remend
from remend.core.output_distributions import Gaussian
from remend.editors import Mend, make
from remend.editors.ke import Ke
from remend.errors import ConfigError, ModelError, RequestError
from remend.evaluation.neighbourhood import measure_neighbourhood
from remend.request import parse_request
from remend.tasks.policy import DiscreteActions, GaussianActions, Observation
from remend.training import PRESETS

OBSERVED = 4


def mlp(outputs):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(OBSERVED, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, outputs)
    ).eval()


TASKS = {
    "discrete": lambda: remend.wrap(mlp(3), DiscreteActions(("left", "stay", "right"), OBSERVED)),
    "gaussian": lambda: remend.wrap(mlp(2), GaussianActions(2, OBSERVED, log_std=(-1.0, -1.0))),
    "gaussian with its own spread": lambda: remend.wrap(mlp(4), GaussianActions(2, OBSERVED)),
}


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]()


def action(task, number):
    discrete = isinstance(task.actions, DiscreteActions)
    return task.actions.names[number % 3] if discrete else f"{0.1 * (number % 7):.1f}, -0.3"


def observation_requests(task, count):
    values = torch.randn(count, 4, OBSERVED, generator=torch.Generator().manual_seed(1)).tolist()
    requests = []
    for number, (prompt, paraphrase, near, far) in enumerate(values):
        written = {
            "observation": prompt, "target": action(task, number), "subject": f"state {number}",
            "paraphrases": [paraphrase],
            "near": [{"observation": near, "target": action(task, 0)}],
            "locality": [{"observation": far, "target": action(task, 1)}],
        }  # fmt: skip
        requests.append(parse_request(json.dumps(written), "here"))
    return requests


def is_taken(task, request):
    answer = task.predict([request.prompt])[0]
    batch = task.collate([task.encode(request.prompt, request.target)])
    with torch.no_grad():
        right = bool(task.correct(task.outputs(batch), batch).all())
    target = batch.target.tolist()
    tolerance = getattr(task.distribution, "tolerance", 0.5)
    assert right == all(abs(a - b) < tolerance for a, b in zip(answer, target, strict=True)), "both ways agree"
    return right


@pytest.mark.parametrize("name", ["finetune", "ridge"])
def test_an_edit_of_one_state_is_verified_reverted_saved_and_loaded(task, tmp_path, name):
    before = {key: tensor.clone() for key, tensor in task.model.state_dict().items()}
    request = next(request for request in observation_requests(task, 6) if not is_taken(task, request))
    edit = make(name, task).edit(task, [request])
    with edit.applied(task):
        assert is_taken(task, request)
    assert not is_taken(task, request)
    pair = measure_neighbourhood(task, edit, request)[0]
    assert (pair.outcome, pair.distance) == ("followed", 0)
    assert pair.effect > 0
    edit.save(tmp_path / "edit")
    loaded = remend.Edit.load(tmp_path / "edit")
    assert loaded.requests == (request,)
    merged = loaded.merge(task)
    assert is_taken(task, request)
    merged.revert()
    assert all(torch.equal(tensor, before[key]) for key, tensor in task.model.state_dict().items())


def test_mend_is_trained_for_a_hundred_steps_and_evaluated(task):
    network, settings = PRESETS["default"]
    requests = observation_requests(task, 24)
    editor = remend.train(
        task, requests[:16], requests[16:], editor=Mend.create(task, replace(network, rank=8)),
        config=replace(settings, max_steps=100, validate_every=50, batch_size=8),
    )  # fmt: skip
    history = editor.trained["history"]
    assert [entry["step"] for entry in history] == [0, 50, 100]
    assert history[-1]["loss"] < history[0]["loss"], "training lowers the outer loss"
    metrics = remend.evaluate(task, editor, requests[16:20]).metrics()
    assert metrics.keys() >= {"reliability", "generality", "locality_far", "locality_near"}
    assert all(summary.n == 4 for summary in metrics["reliability"].values())


def test_losses_and_divergences_of_gaussian_actions_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(6, 2, generator=generator) for _ in range(2))
    target, row = torch.randn(6, generator=generator), torch.tensor([0, 0, 1, 1, 2, 2])
    gaussian = Gaussian(0.1)
    p, q = (torch.distributions.Normal(x[:, 0], x[:, 1].exp()) for x in (before, after))
    torch.testing.assert_close(gaussian.log_prob(before, target), p.log_prob(target))
    torch.testing.assert_close(gaussian.loss(before, target, row, 3), -p.log_prob(target).view(3, 2).mean(1))
    divergence = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(gaussian.divergence(before, after, row, 3), divergence.view(3, 2).mean(1))
    assert not gaussian.divergence(before, before, row, 3).any()


def test_an_editor_that_reads_text_says_so():
    with pytest.raises(ConfigError, match=r"ke cannot edit models of the kind 'policy': it reads the embeddings"):
        Ke.create(TASKS["discrete"]())
    with pytest.raises(ConfigError, match=r"in-context cannot edit models of the kind 'policy'"):
        make("in-context", TASKS["discrete"]())


def test_what_does_not_fit_a_policy_is_refused():
    task = TASKS["gaussian"]()
    with pytest.raises(RequestError, match="has 2 values, the policy observes 4"):
        task.encode(Observation((1.0, 2.0)), "0, 0")
    with pytest.raises(RequestError, match=r"the action 'left' should be 2 numbers"):
        task.encode(Observation((0.0,) * 4), "left")
    with pytest.raises(RequestError, match=r'a policy is given \{"observation": \[numbers\]\}'):
        task.encode("Oslo is", "0, 0")
    with pytest.raises(RequestError, match="observation: should be a list of numbers, not"):
        parse_request('{"observation": "left", "target": "0, 0"}', "here")
    with pytest.raises(ModelError, match=r"its actions need a tensor \[1, 3\]"):
        remend.wrap(mlp(2), DiscreteActions(("left", "stay", "right"), OBSERVED))
