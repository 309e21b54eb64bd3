"""Many edits as one: the least-squares solution against its dense form, and what it does at each edit's keys."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import remend
from remend.core.least_squares import EIGENVALUE_FLOOR, least_squares, make_definite
from remend.core.response import Response
from remend.core.symmetric_operator import SymmetricOperator


def random_metric(d, generator):
    root = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return SymmetricOperator(root @ root.T + 0.1 * torch.eye(d))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 12), d_in=st.integers(2, 9), d_out=st.integers(1, 7), seed=st.integers(0, 1000))
def test_it_is_the_dense_solution(rows, d_in, d_out, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(rows, d_in, generator=generator, dtype=torch.float64)
    moves = torch.randn(rows, d_out, generator=generator, dtype=torch.float64)
    for metric in (None, random_metric(d_in, generator)):
        m = torch.eye(d_in, dtype=torch.float64) if metric is None else metric.inner
        answers = keys @ m @ keys.T
        system = answers + 0.05 * answers.diagonal().mean() * torch.eye(rows, dtype=torch.float64)
        dense = moves.T @ torch.linalg.inv(system) @ keys @ m
        torch.testing.assert_close(least_squares(keys, moves, metric).dense(), dense, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gate", [0.0, 0.3])
def test_each_key_gets_its_move(gate):
    torch.manual_seed(0)
    keys, moves = torch.randn(10, 32) + 1, torch.randn(10, 8)  # all alike: each answers to the others'
    change = least_squares(keys, moves, ridge=1e-6, response=Response.from_gate(gate))
    torch.testing.assert_close(change.output_change(keys), moves, rtol=1e-3, atol=1e-3)
    summed = least_squares(keys[:1], moves[:1], ridge=1e-6, response=Response.from_gate(gate))
    assert (summed.output_change(keys[1:2]) - moves[1:2]).norm() > 0.5


def test_experts_do_not_answer_to_each_other():
    torch.manual_seed(0)
    keys, moves, experts = torch.randn(6, 16) + 1, torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    change = least_squares(keys, moves, ridge=1e-6, experts=experts)
    torch.testing.assert_close(change.output_change(keys, experts), moves, rtol=1e-3, atol=1e-3)
    alone = least_squares(keys[experts == 1], moves[experts == 1], ridge=1e-6)
    torch.testing.assert_close(change.dense(2)[1], alone.dense(), rtol=1e-3, atol=1e-3)


def test_a_metric_is_made_definite():
    values = torch.tensor([1.0, 0.5, -0.2, 0.001])
    basis = torch.linalg.qr(torch.randn(6, 3))[0]
    for metric in (SymmetricOperator(values.diag()), SymmetricOperator(values, basis)):
        values_kept = make_definite(metric).matrix.diagonal()
        torch.testing.assert_close(values_kept, torch.tensor([1.0, 0.5, EIGENVALUE_FLOOR, EIGENVALUE_FLOOR]))


def test_each_matrix_moves_at_each_request_as_by_its_edit_alone():
    """At every token of a target, all that the request's own edit does there, whatever the other edits add."""
    task = remend.load("atlas")
    editor, task = remend.Mend.load("atlas"), task
    requests = random.Random(1).sample(remend.read_source("atlas:validation"), 10)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in editor.shapes}
    alone = editor._changes(task, requests, inputs)
    together = editor.edit(task, requests)
    for name, change in together.changes.items():
        parts = [changes[name] for changes in alone]
        assert max(part.rank for part in parts) > 1
        keys = torch.cat(inputs[name])
        wanted = torch.cat(
            [p.output_change(k) for p, k in zip(parts, keys.split([p.rank for p in parts]), strict=True)]
        )
        assert (change.output_change(keys) - wanted).norm() < 0.1 * wanted.norm()


def test_edits_together_act_as_each_alone():
    """Of 75 edits at once nearly all take; of their sum hardly more than half."""
    task = remend.load("atlas")
    editor = remend.Mend.load("atlas")
    requests = random.Random(0).sample(remend.read_source("atlas:validation"), 75)
    assert editor.config.aggregate == "least-squares"
    before = remend.answers(task, [r.prompt for r in requests])
    edit = editor.edit(task, requests)
    with edit.applied(task.model):
        answers = remend.answers(task, [r.prompt for r in requests])
    assert sum(answer == r.target for answer, r in zip(answers, requests, strict=True)) >= 72, answers
    with editor.with_settings(aggregate="sum").edit(task, requests).applied(task.model):
        summed = remend.answers(task, [r.prompt for r in requests])
    assert sum(answer == r.target for answer, r in zip(summed, requests, strict=True)) < 60
    assert remend.answers(task, [r.prompt for r in requests]) == before
