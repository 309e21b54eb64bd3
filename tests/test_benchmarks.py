"""Every benchmark runs with a tiny configuration and writes its result; the committed results can be drawn."""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import remend
from remend.data import read_source
from remend.evaluation.reports.report import Case, Report, Run
from remend.request import write_requests
from remend.saved_folders import write_json
from remend.training import PRESETS

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import common  # noqa: E402
import edit_cost  # noqa: E402
import frontier  # noqa: E402
import gpu  # noqa: E402
import key_separation  # noqa: E402
import kill_and_resume  # noqa: E402
import large_model_memory  # noqa: E402
import prefix_cache  # noqa: E402
import rejected_variants  # noqa: E402
import scaling  # noqa: E402
import time_to_quality  # noqa: E402
import training_speed  # noqa: E402
import tune_baselines  # noqa: E402

MODEL = {"n_embd": 32, "n_layer": 4, "n_head": 2, "vocab_size": 64}
T5 = {"model_type": "t5", "d_model": 32, "d_ff": 64, "num_layers": 4, "num_heads": 2, "d_kv": 16, "vocab_size": 64}
T5["decoder_start_token_id"] = 0
RANDOM = {"model": MODEL, "preset": "paper", "tokens": 6, "target_tokens": 2, "seed": 0}


@pytest.fixture
def measured(tmp_path):
    """A function that runs a benchmark with a configuration, and returns its result."""

    def run(module, config, *more):
        write_json(tmp_path / "config.json", config)
        out = tmp_path / "result.json"
        module.main(["--config", str(tmp_path / "config.json"), "--out", str(out), *more])
        result = json.loads(out.read_text())
        assert result["config"] == config
        assert {"remend", "torch", "cpu", "threads"} <= result["environment"].keys()
        return result

    return run


@pytest.fixture
def facts(tmp_path):
    """A few requests of the atlas as files of training and validation requests."""
    by_subject = {request.key: request for request in read_source("atlas:validation")}
    chosen = list(by_subject.values())[:24]
    files = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    for file, part in zip(files, (chosen[:16], chosen[16:]), strict=True):
        write_requests(file, part)
    return [str(file) for file in files]


def test_every_benchmark_has_a_configuration_and_every_configuration_a_benchmark():
    configs = {file.stem for file in (FOLDER / "configs").glob("*.json")}
    # real_gemma and real_sets are for real.py, with another model and with sets.
    assert configs - {"real_gemma", "real_sets"} == {file.stem for file in FOLDER.glob("*.py")} - {
        "common",
        "counterfact_testbed",
        "mend_real",
        "pararel_testbed",
        "plot_results",
        "real_requests",
        "rejected_variants",
    }
    for name in configs:
        json.loads((FOLDER / "configs" / f"{name}.json").read_text())


def test_edit_cost(measured):
    config = {"model": "atlas", "editor": "atlas", "data": "atlas:test", "requests": 2, "repeats": 1, "seed": 0}
    assert measured(edit_cost, config)["n"] == 2


@pytest.fixture
def no_child(monkeypatch):
    """What is measured in a process of its own is measured here: importing torch again takes seconds."""
    monkeypatch.setattr(common, "in_child_process", lambda function, *arguments: function(*arguments))


def test_a_child_returns_what_it_found():
    assert common.in_child_process(divmod, 7, 2) == (3, 1)


def test_training_speed(measured, no_child):
    config = {
        **RANDOM,
        "batch_sizes": [2],
        "micro_batch": 1,
        "warm_up_steps": 1,
        "steps": {"2": 1},
        "memory_cache": 0.01,
        "reference_episodes": 1,
    }
    (found,) = measured(training_speed, config)["results"]
    for epoch in (found["first"], found["warm"]):
        assert epoch["ratio"] > 0
        assert sum(epoch["stages"].values()) == pytest.approx(epoch["seconds_per_episode"])
        assert all(epoch["stages"][name] > 0 for name in ("edited forward", "editor backward", "Adam"))
    assert found["warm"]["stages"]["inner pass"] < found["first"]["stages"]["inner pass"], "factors are looked up"
    assert found["memory"]["peak_bytes"] > found["memory"]["model_bytes"]


def test_scaling(measured, no_child):
    config = {
        **RANDOM,
        "head_size": 16,
        "centre": {"batch_size": 1, "n_embd": 32, "n_layer": 4, "edited_blocks": 1, "rank": 8},
        "sweeps": {"edited_blocks": [1, 2], "rank": [8]},
        "micro_batch": 1,
        "cache": 0.01,
        "warm_up_steps": 1,
        "steps": 1,
    }
    sweeps = measured(scaling, config)["sweeps"]
    one, two = (point["editor_parameters"] for point in sweeps["edited_blocks"])
    assert one < two
    assert sweeps["rank"][0]["editor_parameters"] == one


def test_prefix_cache(measured):
    config = {
        **RANDOM,
        "requests": 8,
        "micro_batch": 8,
        "cache": 0.01,
        "epochs_before": 1,
        "epochs": 1,
        "warm_up_steps": 1,
    }
    nothing, *prefix, disk = measured(prefix_cache, config)["results"]
    assert nothing["ratio"] == 1
    assert nothing["memory_bytes"] == nothing["disk_bytes"] == disk["memory_bytes"] == 0
    assert disk["disk_bytes"] > 0
    kept = [one["memory_bytes"] for one in prefix]
    assert 0 < kept[0] < kept[1] < kept[2]


def test_time_to_quality_goes_on_where_it_stopped(measured, facts, monkeypatch):
    line = {"preset": "default", "seconds": 0.01, "validate_every": 1, "validate_growth": 1.5, "network": {"rank": 8}}
    config = {
        "model": "atlas",
        "data": facts[0],
        "validation": facts[1],
        "validation_size": 4,
        "validation_draws": 2,
        "goal": {"taken": 0.0, "kept": 0.0},
        "seeds": [0],
        "lines": [{"name": "a", **line}, {"name": "b", **line}],
    }
    result = measured(time_to_quality, config)
    assert [one["name"] for one in result["summary"]] == ["a", "b"]
    assert result["summary"][0]["seconds_to_goal"] == [result["runs"][0]["curve"][0]["seconds"]]
    monkeypatch.setattr(time_to_quality, "train_run", None)  # nothing is left to do
    assert measured(time_to_quality, config, "--resume")["runs"] == result["runs"]


def test_frontier(measured, facts):
    line = {
        "preset": "default",
        "network": {"rank": 8},
        "training": {"max_steps": 2, "validate_every": 2},
        "seeds": [0],
    }
    data = facts[0].replace("train", "{}")
    Path(data.format("test")).write_bytes(Path(facts[1]).read_bytes())
    config = {
        "about": "A test.",
        "testbeds": [
            {"name": "atlas", "title": "Atlas", "model": "atlas", "data": data},
            {"name": "other", "title": "Other", "model": "nowhere", "data": data},
        ],
        "scales": [0.5, 2.0],
        "lines": [
            {"name": "a", "title": "A", **line, "edits": 4, "requests": 12},
            {"name": "b", "title": "B", **line, "edits": 4, "requests": 12, "drop_near": True, "split": "test"},
        ],
    }
    result = measured(frontier, config)
    assert [(one["testbed"], one["name"], one["split"]) for one in result["runs"]] == [
        ("atlas", "a", "validation"),
        ("atlas", "b", "test"),
    ]
    assert [point["scale"] for point in result["runs"][0]["frontier"]] == [0.5, 1.0, 2.0]
    assert "| A | 1 |" in frontier.table(config, result["runs"])
    assert measured(frontier, config, "--resume")["runs"] == result["runs"]
    pytest.importorskip("matplotlib")
    import plot_results

    assert plot_results.frontier(result) is not None


def test_frontiers_are_compared_at_one_locality():
    def run(*points):
        return {"frontier": [{"locality_near_same_object": {"mean": n}, "generality": {"mean": g}} for n, g in points]}

    assert frontier.generality_at(run((1.0, 0.4), (0.96, 0.6), (0.94, 0.8), (0.5, 0.9))) == pytest.approx(0.7)
    assert frontier.generality_at(run((0.9, 0.4), (0.8, 0.6))) is None
    assert frontier.generality_at(run((1.0, 0.4), (0.96, 0.6))) is None


def test_large_model_memory(measured):
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 4, "vocab_size": 9}
    shape |= {"num_attention_heads": 2}
    experts = {"model_type": "llama4_text", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    experts |= {"num_local_experts": 2, "vocab_size": 9, "num_attention_heads": 2, "num_key_value_heads": 1}
    models = [{"name": "Small", "config": shape}, {"name": "Experts", "config": experts}]
    rows = measured(large_model_memory, {"about": "A test.", "models": models})["rows"]
    assert list(rows[0]["matrices"].values()) == [[40, 16]] * 3
    assert "several experts" in rows[1]["refused"]
    text = large_model_memory.table("A test.", rows)
    assert "| Small | 0.0 billion | 3 × 40×16, to `model.layers.3.mlp.down_proj` |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_the_committed_table_of_large_models_knows_the_sizes_that_were_published():
    result = json.loads((FOLDER / "results" / "large_model_memory.json").read_text())
    published = {model["name"]: model["parameters"] for model in result["config"]["models"]}
    for row in result["rows"]:
        if "refused" not in row:
            assert row["parameters"] == pytest.approx(published[row["name"]], rel=0.01)


def test_each_edit_is_taken_at_its_best_strength():
    def cases(*values):
        named = [dict(zip(("reliability", "generality", "locality_near"), own, strict=True)) for own in values]
        return [Case(0, "", "", "", {m: {"generated": v} for m, v in own.items()}) for own in named]

    at = {0.5: cases((1, 0.5, 1), (1, 0, 0.5)), 1.0: cases((1, 1, 0), (1, 1, 0.25))}
    found = frontier.at_best_strengths(Report("", "", [Run(1, at[1.0], 0.0)], frontier=at))
    assert found == {"reliability": 1, "generality": 0.75, "locality_near": 0.625}


@pytest.fixture(scope="module")
def change_of():
    """A function that trains an editor of a variant for two steps and returns the change of its first edit."""
    requests = read_source("atlas:validation")[:24]
    task = remend.load("atlas", "cpu")
    config = replace(PRESETS["default"][1], max_steps=2, batch_size=8)

    @functools.cache
    def change(variant, network):
        editor = variant.editor.create(task, network, modules=["*.2.mlp.c_proj"])
        rejected_variants.train(task, editor, requests, config, variant)
        (change,) = editor.edit(task, requests[:1]).changes.values()
        return change.dense()

    return change


@pytest.mark.parametrize("name", list(rejected_variants.VARIANTS))
def test_variants_train_and_edit(name, change_of):
    """Each changes what it says it changes: edits are finite, and not those of the default."""
    network = replace(PRESETS["default"][0], rank=8)
    if name == "subject-token":
        network = replace(network, contrast=0.0, settle=0.0)
    changed = change_of(rejected_variants.VARIANTS[name], network)
    assert changed.isfinite().all()
    assert float(changed.norm()) > 0
    assert not torch.equal(changed, change_of(rejected_variants.Variant(), network))


def test_kill_and_resume(measured, facts):
    options = {"data": facts[0], "validation": facts[1], "device": "cpu", "max_steps": 3, "checkpoint_minutes": 0}
    config = {"model": "atlas", "options": options, "kills": 1, "kills_a_chain": 1, "latest_share": 0.9, "seed": 0}
    result = measured(kill_and_resume, config)
    assert result["all_equal"]
    assert result["kills"] == 1


def test_gpu_measures_the_smallest_model_anywhere(measured):
    shapes = [
        {"name": "tiny", "smallest": True, "model": {"model_type": "gpt2", **MODEL}},
        {"name": "large", "model": {"model_type": "llama", "hidden_size": 10**6, "vocab_size": 10**6}},
        {"name": "T5", "smallest": True, "model": T5},
    ]
    more = {"dtype": "bfloat16", "precision": "bfloat16", "batch_size": 2, "requests": 16, "cache": 0.1}
    result = measured(gpu, {**RANDOM, **more, "shapes": shapes[::2], "warm_up_steps": 2, "seconds": 0.2})
    assert [row["status"] for row in result["results"]] == ["measured", "measured"]
    if not torch.cuda.is_available():
        result = measured(gpu, {**RANDOM, **more, "shapes": shapes[1:2], "warm_up_steps": 2, "seconds": 0.2})
        assert [row["status"] for row in result["results"]] == ["not measured"]
        assert not result["measured"]


def test_the_committed_results_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    import plot_results

    plot_results.main(["--out", str(tmp_path)])
    drawn = {file.stem for file in tmp_path.glob("*.png")}
    there = {file.stem for file in (FOLDER / "results").glob("*.json")} & plot_results.PLOTS.keys()
    assert drawn == there - {"gpu"} or drawn == there


def test_key_separation(measured):
    config = {"testbeds": {"questions": "ridge"}, "edits": 4, "kept": [0.5, 0.9], "seeds": [0]}
    half, most = measured(key_separation, config)["testbeds"]["questions"]
    assert 1.2 > half["threshold"] > most["threshold"] > 0.2, "paraphrases answer to their edits"
    assert 0 <= half["locality"] <= most["locality"] <= 1


def test_tune_baselines(measured):
    config = {
        "testbeds": ["claims"], "methods": ["ke"], "rates": [5e-4], "edit_weights": [0.1, 1.0], "steps": 1,
        "requests": 2, "seed": 0,
    }  # fmt: skip
    rows = measured(tune_baselines, config)["rows"]
    assert [row["edit_weight"] for row in rows] == [0.1, 1.0]
    assert all(0 <= row[metric] <= 1 for row in rows for metric in tune_baselines.METRICS)
