"""The benchmark of the paper's tables: cells are computed once, tables are filled, findings are checked."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from remend.errors import ConfigError, NonFiniteError
from remend.models import editable_modules
from remend.request import write_requests
from remend.saved_folders import write_json
from remend.tasks import load

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from paper import cell_definitions, testbeds
from paper.cell_definitions import Cell, Scale, cell_settings
from paper.charts import COLORS, Axis, line_chart
from paper.cli import _command
from paper.cli import main as run
from paper.methods import METHODS
from paper.render import code_spans
from paper.result_folder import ResultFolder
from paper.results import Figure, Results, t_quantile
from paper.runner import CellRunner, attention_matrices
from paper.table_definitions import CACHE, EDITORS, TABLES, TOGETHER
from paper.testbeds import TestbedOptions, make_testbeds
from paper.training_memory import MEMORY_METHODS, measure_memory

TINY = Scale(seeds=2, requests=4, steps=2, train=40, many=4, text_tokens=32, memory=(256,))


@pytest.fixture
def claims(monkeypatch):
    """Only the smallest testbed, and hardly any of it."""
    only = {"claims": make_testbeds()["claims"]}
    monkeypatch.setattr(testbeds, "make_testbeds", lambda options=None: only)
    sentences = testbeds.LoadedTestbed.sentences
    monkeypatch.setattr(testbeds.LoadedTestbed, "sentences", lambda testbed: sentences(testbed)[:500])
    for name in ("FULL", "QUICK"):
        monkeypatch.setattr(cell_definitions, name, TINY)
    return only


KNOWN = ("passages", *make_testbeds())


def runner_of(folder, beds, **options):
    return CellRunner(ResultFolder(folder, beds, TINY), **options)


@pytest.fixture
def no_computation(monkeypatch):
    """Cells get figures at once, where a test is about what happens to them."""
    names = ("edit_success", "edit_success_tokens", "accuracy_drawdown", "perplexity_drawdown")

    def measure(runner, cell):
        figures = {name: {"mean": 0.75, "n": 4} for name in names}
        return {"cell": cell.id, "figures": figures, "settings": cell_settings(cell, runner.scale)}

    monkeypatch.setattr(CellRunner, "measure", measure)


@pytest.fixture(scope="module")
def memory_folder(tmp_path_factory):
    """A folder with the measured memory of training."""
    folder = tmp_path_factory.mktemp("measured")
    measure_memory(folder, TINY.memory)
    return folder


class FixedResults:
    """Figures that are written down, in place of measured ones."""

    def __init__(self, success, drawdown=None, locality=None):
        self._success, self._drawdown, self._locality = success, drawdown or {}, locality or {}

    def success(self, testbed, method, edits=1):
        return self._success.get((testbed, method, edits), math.nan)

    def drawdown(self, testbed, method, edits=1):
        return self._drawdown.get((testbed, method, edits), math.nan)

    def user_testbeds(self):
        return [name for name in dict.fromkeys(name for name, _, _ in self._success) if name not in KNOWN]

    def locality(self, testbed, method, kind):
        return self._locality.get((testbed, method, kind), math.nan)


def test_every_table_names_methods_and_testbeds_that_exist():
    for table in TABLES.values():
        assert set(table.methods) <= METHODS.keys()
        assert {testbed for testbed, _ in table.columns} <= set(KNOWN)
        for method, testbed, edits in table.paper:
            assert method in table.methods, (table.name, method)
            assert (testbed, edits) in table.columns, (table.name, testbed, edits)
        assert table.findings


def test_cells_have_names():
    cell = Cell("facts", "mend-gate", 125, 2)
    assert Cell.parse(cell.id) == cell
    for wrong in ("facts/mend/1", "facts/mnd/1/0", "facts/mend/one/0", ""):
        assert Cell.parse(wrong) is None


def test_findings_hold_or_not():
    cached = {("questions", "cache", 1): 0.95, ("claims", "cache", 1): 0.99}
    well, fails = CACHE.findings
    cheap = {("questions", "cache", 1): 0.0, ("claims", "cache", 1): 0.01}
    assert well.holds(FixedResults(cached, cheap)) is True
    assert well.holds(FixedResults({**cached, ("claims", "cache", 1): 0.5}, cheap)) is False
    assert well.holds(FixedResults(cached, {**cheap, ("claims", "cache", 1): 0.3})) is False, "what it costs counts"
    assert well.holds(FixedResults({})) is None
    assert fails.holds(FixedResults(cached)) is None
    assert fails.holds(FixedResults({("passages", "cache", 1): 0.01, ("passages", "mend-paper", 1): 0.9})) is True
    bar = TOGETHER.findings[-1]
    both = {("facts", "mend", 125): 0.96, ("facts", "mend-gate", 125): 0.9}
    costs = {("facts", "mend", 125): 0.02, ("facts", "mend-gate", 125): 0.0}
    assert bar.holds(FixedResults(both, costs)) is False, "success and drawdown must be one method's"
    assert bar.holds(FixedResults(both, {**costs, ("facts", "mend", 125): 0.01})) is True
    best = EDITORS.findings[-1]
    equal = {("facts", m, 1): 0.9 for m in ("mend", "ke", "enn")}
    places = {("facts", m, k): 0.9 for m in ("mend", "ke", "enn") for k in ("far", "near")}
    assert best.holds(FixedResults(equal, locality=places)) is True
    assert best.holds(FixedResults(equal, locality={**places, ("facts", "ke", "near"): 0.95})) is False
    worse = {("own", m, 1): 0.9 for m in ("mend", "ke")} | {("own", "enn", 1): 0.95}
    there = {("own", m, k): 0.9 for m in ("mend", "ke", "enn") for k in ("far", "near")}
    assert best.holds(FixedResults(equal | worse, locality=places | there)) is False, (
        "a testbed that the user gave counts"
    )


def test_intervals_over_seeds():
    assert Figure.of([0.5]) == Figure(0.5, None)
    figure = Figure.of([0.4, 0.5, 0.6])
    assert figure.mean == pytest.approx(0.5)
    assert figure.half_width == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert figure.text() == "0.500 ± 0.248"
    for seeds, quantile in ((2, 12.706), (9, 2.306), (10, 2.262), (31, 2.042), (32, 2.040), (101, 1.984)):
        assert t_quantile(seeds - 1) == pytest.approx(quantile, abs=6e-4)


SVG = "{http://www.w3.org/2000/svg}"


def test_charts_name_each_line_once_and_apart():
    across = Axis("edits", [(1, "1"), (5, "5"), (125, "125")], evenly_spaced=True)
    up = Axis("success", [(0, "0"), (1, "1")])
    lines = {"a": [(1, 1.0), (125, 0.5)], "none": [], "b<": [(1, 0.9), (5, 0.9), (125, 0.51)], "c": [(125, 0.5)]}
    chart = line_chart("what <is> shown", lines, across, up)
    svg = ElementTree.fromstring(chart)
    assert svg.get("aria-label") == "what <is> shown"
    texts = [(text.text, float(text.get("transform").split()[-1].rstrip(")"))) for text in svg.iter(f"{SVG}text")]
    names = [(name, height) for name, height in texts if name in lines]
    assert sorted(name for name, _ in names) == ["a", "b<", "c"], "each once, and none without points"
    ends = sorted(height for _, height in names)
    assert all(after - before >= 14.9 for before, after in itertools.pairwise(ends))
    assert min(names, key=lambda own: own[1])[0] == "b<", "in the order of the lines' ends"
    drawn_lines = {group.get("id"): group for group in svg.iter(f"{SVG}g") if "line:" in (group.get("id") or "")}
    points = [drawn_lines[f"line:{name}"].find(f"{SVG}path").get("d").split() for name in ("a", "b<", "c")]
    assert [sum(part in ("M", "L") for part in own) for own in points] == [2, 3, 1]
    assert points[0][-2] == points[1][-2] == points[2][-2], "the last tick is one place for all"
    first, last = float(points[0][1]), float(points[0][-2])
    assert float(points[1][4]) == pytest.approx((first + last) / 2), "ticks are evenly spaced"
    fewer = line_chart("what", {"a": [], "b<": lines["b<"]}, across, up)
    assert COLORS[0] not in fewer, "a line keeps its color where another has no points"
    assert COLORS[1] in fewer
    assert chart == line_chart("what <is> shown", lines, across, up), "the same lines give the same file"
    assert code_spans("a `b<` c") == "a <code>b&lt;</code> c"


def test_a_run_continues_and_writes_its_tables(claims, memory_folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(memory_folder, out)
    assert run(["--out", str(out), "--tables", "11,memory"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "paper: a cache does well on questions and claims" in printed
    kept = {file: file.read_bytes() for file in (out / "cells").iterdir()}
    assert len(kept) == 4  # two methods, two seeds
    markdown, page = ((out / f"tables.{kind}").read_text() for kind in ("md", "html"))
    assert "## Table 11: a cache of edits" in markdown
    assert f"`python -m benchmarks.paper --out {out} --tables 11`" in markdown
    assert all(
        "its own 4 test requests, or all that there are (4 or one batch of several edits at once)" in own
        for own in (markdown, page)
    )
    assert "±" in markdown
    assert "<svg" in page
    assert "not measured</span>: paper: a cache fails on generation" in page
    content = json.loads((out / "tables.json").read_text())
    assert content["tables"][0]["rows"].keys() == {"cache", "mend-paper"}
    assert {own["method"] for own in content["memory"]} == set(MEMORY_METHODS)
    monkeypatch.setattr(CellRunner, "measure", lambda *_: pytest.fail("a cell was computed twice"))
    assert run(["--out", str(out), "--tables", "11"]) == 0
    assert {file: file.read_bytes() for file in (out / "cells").iterdir()} == kept


def test_one_cell_gives_the_figures_of_the_table(claims, tmp_path, capsys):
    for out in ("one", "other"):
        assert run(["--out", str(tmp_path / out), "--cell", "claims/mend-paper/2/1"]) == 0
    printed = capsys.readouterr().out
    assert "edit success" in printed
    name = "cells/claims-mend-paper-2-1.json"
    one, other = (json.loads((tmp_path / out / name).read_text())["figures"] for out in ("one", "other"))
    assert one == other
    assert one["edit_success"]["n"] == 4


@pytest.mark.parametrize(
    "method", ["ft-kl", "ft-local", "ke", "enn", "mend-sum", "mend-gate", "only-u", "attention", "ridge-gate", "memit"]
)
def test_every_kind_of_method_is_computed(claims, tmp_path, method):
    runner = runner_of(tmp_path, claims)
    found = runner.measure(Cell("claims", method))
    assert 0 <= found["figures"]["edit_success"]["mean"] <= 1
    assert found["figures"]["accuracy_drawdown"]["n"] == 4
    runner.compute([Cell("claims", method)])
    assert Results(runner.results).success("claims", method) == found["figures"]["edit_success"]["mean"]


@pytest.mark.parametrize(
    ("name", "pattern", "layers", "count"),
    [
        ("facts", "*attn.c_*", "last-3", 6),
        ("questions", "*SelfAttention.*", "last-2", 16),
        ("claims", "*attention.*", "last-3", 12),
    ],
)
def test_attention_is_found_by_structure(name, pattern, layers, count):
    """In T5 without cross-attention; its decoder has that too."""
    model = load(make_testbeds()[name].source, "cpu").model
    named = list(editable_modules(model, [pattern], layers=layers))
    assert len(named) == count
    assert list(editable_modules(model, attention_matrices(model))) == named


def test_attention_of_a_model_of_one_s_own(capitals, tmp_path):
    import worlds as tiny

    tiny.llama().save_pretrained(capitals / "model")
    runner = runner_of(tmp_path / "out", make_testbeds(TestbedOptions(testbed=capitals)))
    names = list(runner.trained_editor(Cell("capitals", "attention")).shapes)
    assert len(names) == 12  # q, k, v and o of three blocks
    assert all(".self_attn." in name for name in names)


@pytest.fixture
def writer(tmp_path):
    """A model that writes, and text for it."""
    import worlds as tiny

    tiny.gpt2(n_positions=64).save_pretrained(tmp_path / "writer")
    tiny.tokenizer().save_pretrained(tmp_path / "writer")
    pairs = list(zip(tiny.COUNTRIES, tiny.CITIES, strict=True))
    lines = [
        " ".join(f"The city {b} of {a} {number} is {number}" for number in range(start, start + 3))
        for start in range(0, 80, 10)
        for a, b in pairs
    ]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    return TestbedOptions(tmp_path / "writer", tmp_path / "text.txt")


def test_passages_are_parted_and_edited(writer, tmp_path):
    lines = set(writer.text.read_text().split("\n\n"))
    runner = runner_of(tmp_path / "out", make_testbeds(writer))
    home = runner.testbed("passages")
    parts = {split: set(home.passages(split)) for split in testbeds.TEXT_SHARES}
    assert sum(map(len, parts.values())) == len(lines)
    assert not parts["train"] & parts["test"]
    figures = runner.measure(Cell("passages", "mend-paper"))["figures"]
    assert {"edit_success", "perplexity_drawdown"} <= figures.keys()


def test_a_folder_keeps_to_its_writer_and_text(writer, tmp_path):
    import worlds as tiny

    out, cell = tmp_path / "out", Cell("passages", "cache")
    ResultFolder(out, make_testbeds(), TINY).read(Cell("claims", "cache"))
    assert ResultFolder(out, make_testbeds(writer), TINY).read(cell) is None, "a folder may gain a testbed"
    ResultFolder(out, make_testbeds(), TINY).read(Cell("claims", "cache"))
    assert ResultFolder(out, make_testbeds(writer), TINY).read(cell) is None
    (tmp_path / "other.txt").write_text(writer.text.read_text() + "\n\nOne more.")
    with pytest.raises(ConfigError, match="holds results of passages with another text: choose another folder"):
        ResultFolder(out, make_testbeds(TestbedOptions(writer.writer, tmp_path / "other.txt")), TINY).read(cell)
    tiny.gpt2(seed=1, n_positions=64).save_pretrained(writer.writer)
    with pytest.raises(ConfigError, match="with another model"):
        runner_of(out, make_testbeds(writer)).testbed("passages")


@pytest.fixture
def capitals(tmp_path):
    """The folder of a testbed of one's own."""
    import worlds as tiny

    folder = tmp_path / "capitals"
    tiny.gpt2().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    requests = tiny.requests(12)
    for split, own in zip(testbeds.SPLITS, (requests[:8], requests[8:10], requests[10:]), strict=True):
        write_requests(folder / f"{split}.jsonl", own)
    return folder


def test_results_are_shown_of_testbeds_that_are_not_available(claims, no_computation, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    for name, parts in (("passages", {"model": "a", "text": "b"}), ("capitals", {"model": "a", "requests": "b"})):
        write_json(out / "worlds" / f"{name}.json", parts)
        for seed in range(TINY.seeds):
            cell = Cell(name, "cache", 1, seed)
            figures = {metric: {"mean": 0.4242, "n": 4} for metric in ("edit_success", "edit_success_tokens")}
            figures |= {"perplexity_drawdown": {"mean": 0.1, "n": 4}}
            write_json(out / "cells" / f"{cell.id.replace('/', '-')}.json", {"cell": cell.id, "figures": figures})
    assert run(["--out", str(out), "--tables", "11"]) == 0
    (row,) = (line for line in (out / "tables.md").read_text().splitlines() if line.startswith("| cache"))
    assert row.startswith("| cache | 0.424 ± 0.000 / 0.100 ± 0.000<br>*.001 / .211* | 0."), "passages, then claims"
    assert Cell("capitals", "ft") in EDITORS.cells(TINY, ResultFolder(out, claims, TINY).testbeds)
    assert run(["--out", str(out), "--cell", "passages/ft/1/0"]) == 2
    assert "the model is not at hand" in " ".join(capsys.readouterr().err.split())


def test_a_testbed_of_ones_own(capitals, tmp_path, capsys, monkeypatch):
    for name in ("FULL", "QUICK"):
        monkeypatch.setattr(cell_definitions, name, TINY)
    there = make_testbeds(TestbedOptions(testbed=capitals))
    assert Cell("capitals", "ke", 1, 1) in EDITORS.cells(TINY, there)
    assert ("capitals", 1) not in CACHE.columns_in(there)
    arguments = ["--out", str(tmp_path / "out"), "--testbed", str(capitals)]
    assert run([*arguments, "--cell", "capitals/ft/1/0"]) == 0
    assert "capitals/ft/1/0" in capsys.readouterr().out
    (capitals / "test.jsonl").write_text((capitals / "train.jsonl").read_text())
    assert run([*arguments, "--cell", "capitals/ft/1/0"]) == 2
    assert "results of capitals with another requests" in " ".join(capsys.readouterr().err.split())
    (capitals / "test.jsonl").unlink()
    assert run(arguments) == 2
    assert "lacks test.jsonl" in " ".join(capsys.readouterr().err.split())


def test_settings_that_changed_since(claims, tmp_path, monkeypatch):
    runner = runner_of(tmp_path, claims)
    cell, summed = Cell("claims", "mend"), Cell("claims", "mend-sum")
    runner.compute([cell, summed])
    file = tmp_path / "cells" / "claims-mend-1-0.json"
    kept = json.loads(file.read_text())
    assert kept["settings"]["training"]["max_steps"] == TINY.steps

    method = METHODS["mend"]
    changed = replace(method, config=replace(method.config, settle=0.3), training=replace(method.training, near=0.1))
    monkeypatch.setitem(METHODS, "mend", changed)
    with pytest.raises(ConfigError, match=r"mend-1-0\.json was computed with another config\.settle, training\.near"):
        runner.results.read(cell)
    assert runner.results.read(summed) is not None, "it has settings of its own"
    file.unlink()
    with pytest.raises(ConfigError, match=r"claims-mend-0 was trained with another config\.settle, training\.near"):
        runner.compute([cell])
    file.write_text(json.dumps({name: value for name, value in kept.items() if name != "settings"}))
    assert runner.results.read(cell)["figures"] == kept["figures"], "cells of before settings were kept count"


def test_a_cell_that_fails_stops_no_other(claims, no_computation, tmp_path, capsys, monkeypatch):
    """Its error is reported, and it is computed again only with --cell."""
    measure = CellRunner.measure

    def diverging(self, cell):
        if cell == Cell("claims", "cache", 1, 1):
            raise NonFiniteError("the loss became NaN")
        return measure(self, cell)

    monkeypatch.setattr(CellRunner, "measure", diverging)
    arguments = ["--out", str(tmp_path)]
    assert run([*arguments, "--tables", "11"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "claims/cache/1/1 failed: NonFiniteError: the loss became NaN" in printed
    for kind in ("md", "html"):
        tables = (tmp_path / f"tables.{kind}").read_text()
        assert "failed" in tables
        assert "NonFiniteError: the loss became NaN" in tables
    (table,) = json.loads((tmp_path / "tables.json").read_text())["tables"]
    assert [row[-1]["ours"] == "failed" for row in table["rows"].values()] == [True, False]
    assert run([*arguments, "--cell", "claims/cache/1/1"]) == 1
    assert "the loss became NaN" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(CellRunner, "measure", measure)
    assert run([*arguments, "--cell", "claims/cache/1/1"]) == 0
    assert run([*arguments, "--tables", "11"]) == 0
    assert "failed" not in (tmp_path / "tables.md").read_text()


def test_the_command_of_a_table_can_be_typed_again():
    options = TestbedOptions(Path("build/my writer"), Path("../text.txt"), device="cuda:1")
    line = "--quick --out build/tables --writer 'build/my writer' --text ../text.txt --device cuda:1"
    assert _command(Path("build/tables"), options, True, None) == f"python -m benchmarks.paper {line}"
    assert _command(Path("build/tables"), options, True, None, 250) == f"python -m benchmarks.paper {line} --steps 250"


def test_figures_do_not_depend_on_the_number_of_processes(claims, tmp_path, monkeypatch):
    """Each computes on one thread, and on the device of --device."""
    calls = []
    monkeypatch.setattr("torch.set_num_threads", calls.append)
    monkeypatch.setattr(testbeds, "load", lambda source, device: calls.append(device) or pytest.skip("enough"))
    with pytest.raises(pytest.skip.Exception):
        run(["--out", str(tmp_path), "--tables", "11", "--device", "cuda:1"])
    assert calls == [1, "cuda:1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tables", "4"], "there is no table '4' here; there are 3, 5, 6, 9, 11 and memory"),
        (["--cell", "claims/mend/1"], "is no cell: it is TESTBED/METHOD/EDITS/SEED"),
        (["--cell", "claims/mend/1/0", "--jobs", "2"], "--jobs: of several cells; --cell names one"),
        (["--cell", "seas/mend/1/0"], "there is no testbed 'seas' here"),
    ],
)
def test_wrong_use(claims, tmp_path, capsys, arguments, message):
    assert run(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_folder_of_another_size_is_refused(claims, tmp_path):
    ResultFolder(tmp_path, claims, TINY)
    ResultFolder(tmp_path, claims, TINY)
    with pytest.raises(ConfigError, match="another size of run"):
        ResultFolder(tmp_path, claims, Scale())


def test_a_writer_needs_a_text(tmp_path):
    with pytest.raises(ConfigError, match="give both, or none"):
        make_testbeds(TestbedOptions(writer=tmp_path))


def test_memory_is_measured_once(memory_folder, monkeypatch):
    rows = [json.loads(file.read_text()) for file in sorted((memory_folder / "memory").iterdir())]
    assert len(rows) == len(MEMORY_METHODS)
    assert all(row["added"] > 0 and row["parameters"] > 0 for row in rows)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("measured twice"))
    assert sorted(row["peak"] for row in measure_memory(memory_folder, [256])) == sorted(row["peak"] for row in rows)


@pytest.mark.parametrize(
    ("error", "message"), [("", "it ended with -9"), ("Traceback …\nMemoryError\n", "MemoryError")]
)
def test_tables_are_written_though_memory_cannot_be_measured(
    claims, no_computation, tmp_path, capsys, monkeypatch, error, message
):
    dead = subprocess.CompletedProcess([], -9, "", error)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: dead)
    assert run(["--out", str(tmp_path), "--tables", "11,memory"]) == 1
    assert f"measuring the memory of ke failed: {message}" in " ".join(capsys.readouterr().err.split())
    assert "## Table 11" in (tmp_path / "tables.md").read_text()
