"""What models write by themselves: each token is read once, and the texts are those of passes without a cache."""

import io

import pytest
import torch
from rich.console import Console

import families
from remend.cli.progress_lines import ProgressLines
from remend.progress import report_progress, reported_to
from remend.tasks import ordinary_inputs
from remend.tasks.base import Example
from remend.tasks.ordinary_inputs import SAMPLED_TOKENS, random_tokens, sampled_texts


@torch.no_grad()
def sampled_without_cache(task, seed, count):
    """The same draws, each from a whole pass over the texts so far."""
    generator = torch.Generator().manual_seed(seed)
    rows = random_tokens(task, generator, count, 1)
    for _ in range(min(SAMPLED_TOKENS, (task.context or SAMPLED_TOKENS) - 1)):
        ended = torch.tensor([bool(task.end_tokens & set(row[1:])) for row in rows.tolist()])
        if ended.all():
            break
        logits = task.outputs(task.collate([Example(tuple(row), (0,)) for row in rows.tolist()]))
        probabilities = torch.where(ended[:, None], 1.0, logits.float().softmax(-1))
        rows = torch.cat([rows, torch.multinomial(probabilities, 1, generator=generator)], 1)
    texts = []
    for row in rows.tolist():
        ends = [place for place, token in enumerate(row) if place and token in task.end_tokens]
        texts.append(tuple(row[: min(ends, default=len(row))]))
    return texts


@pytest.mark.parametrize("family", families.DECODERS)
def test_texts_are_those_of_passes_without_a_cache(family, monkeypatch):
    monkeypatch.setattr(ordinary_inputs, "SAMPLED_AT_ONCE", 5)  # in parts, the last of which is smaller
    task = families.task(family)
    assert sampled_texts(task, 3, 12, []) == sampled_without_cache(task, 3, 12)


def test_each_token_is_read_once():
    task, read = families.task("llama"), []
    task.model.get_input_embeddings().register_forward_hook(lambda module, args, output: read.append(args[0].shape[1]))
    texts = sampled_texts(task, 0, 8, [])
    assert set(read) == {1}
    assert max(map(len, texts)) <= len(read) + 1


def test_long_work_says_how_far_it_is():
    heard = []
    with reported_to(lambda *report: heard.append(report)):
        sampled_texts(families.task("llama"), 0, 4, [])
    assert heard[0] == ("letting the model write", 0, SAMPLED_TOKENS)
    assert [done for _, done, _ in heard] == list(range(len(heard)))
    report_progress("nobody listens", 1, 2)


def test_lines_about_long_work_are_few():
    now, output = 0.0, io.StringIO()
    lines = ProgressLines(Console(file=output), lambda: now)
    for second in range(31):
        now = float(second)
        lines("measuring", second, 40)
    printed = ["measuring: 7 % after 3 s", "measuring: 32 % after 13 s", "measuring: 57 % after 23 s"]
    assert output.getvalue().splitlines() == printed
    lines("writing", 0, 4)
    now = 32.0
    lines("writing", 1, 4)
    assert output.getvalue().splitlines() == printed, "another work's first line waits its turn too"
    now = 36.0
    lines("writing", 4, 4)
    assert output.getvalue().splitlines() == printed, "what is done is not reported"
