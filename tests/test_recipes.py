"""Recipes: those that ship are what they say they are, and each runs from end to end with a small model."""

import json
import random
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
import transformers as hf

import families
import worlds
from remend.cli import run
from remend.data.source_names import parse_source_name
from remend.editors import Mend
from remend.errors import ConfigError, FileError
from remend.evaluation.reports.report_reader import read_report
from remend.models.editable_matrices import editable_modules
from remend.recipes import load_recipe, recipes, run_recipe
from remend.recipes.inputs import (
    UNRELATED_PROMPTS,
    RunInputs,
    add_unrelated_prompts,
    local_file,
)
from remend.recipes.recipe import RECIPE_FOLDER, TaskKind
from remend.request import EditRequest
from remend.training.checkpoint import checkpoints_folder
from remend.training.resource_estimate import dry_run

# The tokenizer of the small models does not know all words of the prompts that the recipes make.
pytestmark = pytest.mark.filterwarnings("ignore:the tokenizer cannot write")

SHIPPED = recipes()
PAPER = {
    "gpt-neo-2.7b": (".81", ".057"), "gpt-j-6b": (".88", ".031"), "t5-xl": (".88", ".001"),
    "t5-xxl": (".89", "<.001"), "bert-base-fever": (">.99", "<.001"), "bart-base-zsre": (".98", ".002"),
    "distilgpt2": (".86", ".225"),
}  # fmt: skip
FAMILY = {
    "gpt_neo": "gpt-neo", "gptj": "gpt-j", "gpt2": "gpt2", "t5": "t5-gated", "bart": "bart", "llama": "llama",
    "qwen3": "qwen3", "gemma3": "gemma3", "mistral": "mistral",
}  # fmt: skip


def small(recipe):
    """A random model of the recipe's class, with its tokenizer."""
    kind = recipe.config["model_type"]
    if kind == "bert":
        encoder = families._ENCODERS["bert"]
        torch.manual_seed(0)
        return encoder[0](encoder[1](id2label={0: "REFUTES", 1: "SUPPORTS"})), worlds.word_tokenizer()
    return families.make(FAMILY[kind]), worlds.tokenizer()


def passages(count, seed):
    """Text of few words, in passages that are long enough."""
    draw = random.Random(seed)
    words = [*worlds.CITIES, *worlds.COUNTRIES, "capital", "city", "rules", "has", "is", "of", "the"]
    return "\n\n".join("The " + " ".join(draw.choices(words, k=27)) for _ in range(count)) + "\n"


def rows(source, split):
    """A file's content in the form in which a recipe's data set was published; of every split, other subjects."""
    places = {"train": range(6), "validation": range(6, 8), "test": range(8, 10)}[split]
    found = []
    for i in places:
        country, city, other = worlds.COUNTRIES[i], worlds.CITIES[i], worlds.CITIES[(i + 3) % 10]
        far, there = worlds.COUNTRIES[(i + 5) % 10], worlds.CITIES[(i + 5) % 10]
        asked, rephrased = f"The capital of {country} is", f"{country} has the capital"
        found.append(
            {
                "zsre": {
                    "subject": country, "src": asked, "rephrase": rephrased, "alt": other, "answers": [city],
                    "loc": f"nq question: which city rules {far}", "loc_ans": there,
                },
                "zsre of MEND": {
                    "id": i, "input": asked, "output": [{"answer": city}], "alternatives": [other],
                    "filtered_rephrases": [rephrased],
                },
                "counterfact": {
                    "case_id": i, "subject": country, "prompt": asked, "target_new": other, "ground_truth": city,
                    "rephrase_prompt": rephrased, "locality_prompt": f"The capital of {far} is",
                    "locality_ground_truth": there,
                },
                "fever": {
                    "id": i, "input": f"{city} rules {country}", "output": [{"answer": ("SUPPORTS", "REFUTES")[i % 2]}],
                    "filtered_rephrases": [f"It is {city} rules {country}"],
                },
            }[source]
        )  # fmt: skip
    return found


@pytest.fixture
def kitchen(tmp_path):
    """A function that lays out a small model and files for a recipe: the options that name them."""

    def lay_out(recipe):
        model, tokenizer = small(recipe)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        given = {"model": str(tmp_path / "model"), "device": "cpu"}
        for split in ("train", "validation", "test"):
            if (source := getattr(recipe, split)) is None:
                continue
            kind, name = parse_source_name(source)
            file = tmp_path / name
            if kind == "passages":
                file.write_text(passages(6, split), encoding="utf-8")
            else:
                form = "zsre of MEND" if "structured" in name else kind
                listed = rows(form, split)
                lines = "\n".join(map(json.dumps, listed)) if file.suffix == ".jsonl" else json.dumps(listed)
                file.write_text(lines, encoding="utf-8")
            given[split] = f"{kind}:{file}"
        if recipe.text is not None:
            (tmp_path / "text.txt").write_text(passages(1, "text"), encoding="utf-8")
            given |= {"text": str(tmp_path / "text.txt"), "writer": given["model"]}
        return given

    return lay_out


def counted_from_configuration(recipe, folder):
    """What the recipe's model and editor take, without any weights."""
    (folder / "config.json").write_text(json.dumps(recipe.config), encoding="utf-8")
    network, _ = recipe.settings()
    return dry_run(str(folder), network, recipe.modules, recipe.layers, getattr(torch, recipe.dtype))


# -- what ships ------------------------------------------------------------------------------------------------------


def test_the_paper_s_rows_and_models_of_today():
    assert {name: (r.paper.edit_success, r.paper.drawdown) for name, r in SHIPPED.items() if r.paper} == PAPER
    today = [recipe for recipe in SHIPPED.values() if recipe.paper is None]
    assert len(today) == 8
    assert {recipe.preset for recipe in today} == {"default"}
    assert list(SHIPPED)[: len(PAPER)] == sorted(PAPER), "the paper's rows come first"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe(name):
    recipe = load_recipe(name)
    assert recipe == SHIPPED[name]
    assert (RECIPE_FOLDER / f"{recipe.name}.json").is_file()
    network, settings = recipe.settings()
    assert settings.seed == recipe.seeds[0]
    assert recipe.task in get_args(TaskKind)
    if recipe.paper is not None:
        assert (recipe.preset, recipe.network, recipe.training) == ("paper", {}, {})
        assert network.outputs_only is False
        assert (recipe.paper.measure == "perplexity") == (recipe.text is not None)
    for source in (recipe.train, recipe.validation, recipe.test):
        if source is not None:
            assert parse_source_name(source)[0] in ("passages", "zsre", "counterfact", "fever")
            assert recipe.origin(local_file(source)), "where the file is to be had"
    assert recipe.text is None or recipe.origin(recipe.text)
    assert "ot measured" in recipe.time_basis


@pytest.mark.parametrize("name", SHIPPED)
def test_memory_is_what_a_dry_run_counts(name, tmp_path):
    recipe = SHIPPED[name]
    found = counted_from_configuration(recipe, tmp_path)
    assert recipe.memory_gb == pytest.approx(found.gpu_bytes(1) / 1e9, rel=0.02)
    # As many matrices as the paper edits; of today's models those that write to the residual stream.
    wanted = 3 if recipe.paper is None else 8 if recipe.task == "seq2seq" else 6
    assert len(found.matrices) == wanted
    billions = {"gpt-neo": 2.7, "gpt-j": 6, "t5-xl": 2.8, "t5-xxl": 11, "bert": 0.11, "bart": 0.14, "distil": 0.082}
    billions |= {"llama": 8, "qwen3": 8.2, "gemma": 4.3, "mistral": 7.2}
    size = next(size for start, size in reversed(billions.items()) if name.startswith(start))
    assert found.parameters / 1e9 == pytest.approx(size, rel=0.03)


def test_the_dry_run_is_of_the_recipe_s_own_choice(tmp_path):
    recipe = SHIPPED["t5-xl"]
    chosen = counted_from_configuration(recipe, tmp_path)
    everything = dry_run(str(tmp_path), recipe.settings()[0])
    assert len(everything.matrices) == 12
    assert chosen.matrices.items() < everything.matrices.items()


# -- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_runs(name, kitchen, tmp_path):
    recipe = SHIPPED[name]
    given, out = kitchen(recipe), tmp_path / "out"
    told = []
    report = run_recipe(recipe, out, **given, limit=3 if recipe.text else 8, max_steps=2, on_progress=told.append)
    metrics = report.metrics()
    measured = "perplexity_drawdown" if recipe.text else "accuracy_drawdown"
    assert {"edit_success", "generality", "locality_far", measured} <= metrics.keys()
    assert report.settings["steps"] == 2
    assert read_report(out / "report.json").metrics() == metrics
    summary = (out / "summary.md").read_text(encoding="utf-8")
    assert f"| edit success (Eq. 1) | {metrics['edit_success']['generated'].mean:.3f} | " in summary
    assert recipe.paper is None or f"| {recipe.paper.edit_success} |" in summary
    assert recipe.paper is None or f"| {recipe.paper.drawdown} |" in summary
    assert f"run_recipe(load_recipe({name!r}), {str(out)!r}, model=" in summary
    assert "reproduces nothing" in summary
    model, _ = small(recipe)
    editor = Mend.load(out / "editor")
    network, _ = recipe.settings()
    chosen = editable_modules(model, recipe.modules, network.outputs_only, recipe.layers)
    assert editor.shapes.keys() == chosen.keys()
    assert editor.config == network
    assert told[0] == "loading the model"
    assert "training: step 2, 100%" in told
    assert not (out / "report.json.partial").exists()


def test_a_stopped_run_goes_on(kitchen, tmp_path):
    """Stopped in training, then in evaluation: in the end everything is as if it had never been."""
    recipe = SHIPPED["distilgpt2"]
    given = {**kitchen(recipe), "limit": 3, "max_steps": 3}
    whole = run_recipe(recipe, tmp_path / "whole", **given)

    def stopping(at):
        def stop(what):
            if what.startswith(at):
                raise KeyboardInterrupt

        return stop

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out, **given, on_progress=stopping("training: step 2"))
    assert checkpoints_folder(out / "editor").exists()
    written = (out / "requests" / "test.jsonl").stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out, **given, on_progress=stopping("evaluating:"))
    assert not checkpoints_folder(out / "editor").exists()
    report = run_recipe(recipe, out, **given)
    assert (out / "requests" / "test.jsonl").stat().st_mtime_ns == written
    assert report.metrics() == whole.metrics()
    assert report.settings["steps"] == 3
    told = []
    again = run_recipe(recipe, out, **given, on_progress=told.append)
    assert (again.metrics(), again.settings) == (report.metrics(), report.settings)
    assert told == [], "of one that had ended, nothing is done again"

    with pytest.raises(ConfigError, match="is of a run with another seed: give the same to go on with it"):
        run_recipe(recipe, out, **given, seed=7)
    with pytest.raises(FileError, match="holds an editor or an edit already"):
        run_recipe(recipe, out, **given, resume=False)


def test_a_run_whose_editor_was_deleted_begins_anew(kitchen, tmp_path):
    """What is left of the evaluation of the deleted editor is no part of it, whether that had ended or not."""
    recipe = SHIPPED["bert-base-fever"]
    given, out = {**kitchen(recipe), "limit": 8, "max_steps": 1}, tmp_path / "out"

    def stop(what):
        if what.startswith("evaluating:"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out, **given, on_progress=stop)
    assert (out / "report.json.partial").exists()
    (out / "report.json.partial" / "about.json").write_text('{"about": "another editor"}')
    shutil.rmtree(out / "editor")
    run_recipe(recipe, out, **given)
    shutil.rmtree(out / "editor")
    told = []
    run_recipe(recipe, out, **given, on_progress=told.append)
    assert "training: step 1, 100%" in told
    assert "(its last session)" in (out / "summary.md").read_text()


def test_overlap_with_training_is_told(kitchen, tmp_path):
    recipe = SHIPPED["bert-base-fever"]
    given = kitchen(recipe)
    with pytest.raises(ConfigError, match="are the same source"):
        run_recipe(recipe, tmp_path / "out", **{**given, "test": given["train"]}, limit=6, max_steps=1)
    file = Path(local_file(given["train"]))
    again = given["train"].replace(str(file), str(shutil.copy(file, tmp_path / f"again{file.suffix}")))
    report = run_recipe(recipe, tmp_path / "out", **{**given, "test": again}, limit=6, max_steps=1)
    assert report.settings["shared_with_training"]["subjects"] > 0
    assert "its figures may be too good" in (tmp_path / "out" / "summary.md").read_text()
    assert "command" in report.settings


def test_requests_without_unrelated_prompts_get_those_of_other_requests():
    def asked(number, **more):
        return EditRequest(prompt=f"p{number}", target="new", subject=f"s{number}", **more)

    bare = [asked(number, ground_truth=f"t{number}") for number in range(8)]
    for number, request in enumerate(add_unrelated_prompts(bare, 0)):
        assert len(request.locality) == UNRELATED_PROMPTS
        assert {(probe.prompt, probe.target) for probe in request.locality} <= {
            (f"p{other}", f"t{other}") for other in range(8) if other != number
        }
    assert add_unrelated_prompts(bare, 0) == add_unrelated_prompts(bare, 0)
    given = asked(9, locality=({"prompt": "own", "target": "o"},))
    assert add_unrelated_prompts([*bare, given], 0)[-1] == given
    assert add_unrelated_prompts([asked(number) for number in range(8)], 0)[0].locality == ()


# -- what goes wrong -------------------------------------------------------------------------------------------------


def written(tmp_path, **changes):
    content = json.loads((RECIPE_FOLDER / "gpt-j-6b.json").read_text(encoding="utf-8"))
    path = tmp_path / "own.json"
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return path


def test_a_recipe_of_one_s_own(tmp_path):
    changes = {"name": "own", "training": {"learning_rate": 1e-5}, "network": {"rank": 64}, "edits": 10}
    recipe = load_recipe(written(tmp_path, **changes))
    network, settings = recipe.settings(max_steps=5, seed=3)
    assert (network.rank, network.alpha) == (64, 1e-4)
    assert (settings.learning_rate, settings.max_steps, settings.seed) == (1e-5, 5, 3)
    assert load_recipe(str(tmp_path / "own.json")) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presett": "paper"}, "a recipe has no key 'presett'; did you mean 'preset'?"),
        ({"paper": {"tabel": "3"}}, "the key 'paper.table' is missing"),
        ({"preset": "papr"}, "preset: there is no preset 'papr'; did you mean 'paper'?"),
        ({"training": {"learning_rat": 1.0}}, "TrainingConfig has no setting 'learning_rat'; did you mean"),
        ({"network": {"rank": "many"}}, "MendConfig.rank must be a whole number of at least 1, not 'many'"),
        ({"test": "zrse:file.json"}, "test: there is no data set 'zrse'"),
        ({"dtype": "float23"}, "dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
        ({"model": None}, "give a model, or say in 'needs' what has to be given"),
        ({"task": "seq2seq"}, "perplexity is measured only for causal language models"),
        ({"config": {"n_embd": float("inf")}}, "config: a number in the model's configuration is not finite"),
        ({"edits": 0}, "edits: Input should be greater than or equal to 1"),
    ],
)
def test_what_is_no_recipe(changes, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        load_recipe(written(tmp_path, **changes))
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "own.json"))


def test_a_misspelt_key_of_the_paper_s_figures(tmp_path):
    paper = {**SHIPPED["gpt-j-6b"].paper.model_dump(), "tabel": "3"}
    with pytest.raises(ConfigError, match=r"no key 'paper\.tabel'; did you mean 'table'\?"):
        load_recipe(written(tmp_path, paper=paper))


def test_no_recipe_of_that_name(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"there is no recipe 'gpt-j-6', nor a JSON file of that name with the same keys; did you mean 'gpt-j-6b'",
    ):
        load_recipe("gpt-j-6")
    (tmp_path / "bad.json").write_text('{"name": ')
    with pytest.raises(ConfigError, match=r"bad\.json: Invalid JSON"):
        load_recipe(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="cannot be read as UTF-8"):
        load_recipe(tmp_path / "bad.json")


def test_what_has_to_be_given_is_named_with_its_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        run_recipe(SHIPPED["bert-base-fever"], tmp_path / "out")
    told = str(error.value)
    assert "--model, a BERT-base fact checker" in told
    assert "--train, since there is no file fever-train-kilt.jsonl here (in the data that the authors" in told
    assert "--test, since" in told
    assert not (tmp_path / "out").exists(), "nothing was begun"
    with pytest.raises(ConfigError, match=r"--text, since there is no file wiki\.valid\.raw here \(the validation"):
        run_recipe(SHIPPED["gpt-j-6b"], tmp_path / "out")
    with pytest.raises(ConfigError, match="leave text away with t5-xl"):
        run_recipe(SHIPPED["t5-xl"], tmp_path / "out", text="some.txt")
    (tmp_path / "zsre_mend_train.json").write_text("[]")
    used = RunInputs.resolve(SHIPPED["t5-xl"], test="questions:test")
    assert (used.model, used.train) == ("google/t5-xl-ssm-nq", "zsre:zsre_mend_train.json")
    fetched = RunInputs.resolve(SHIPPED["t5-xl"], train="zsre:hf:owner/name/train.json", test="questions:test")
    assert fetched.train == "zsre:hf:owner/name/train.json"


def test_a_model_of_another_kind(kitchen, tmp_path):
    given = kitchen(SHIPPED["bert-base-fever"])
    files = {split: given[split] for split in ("train", "test")}
    hf.logging.disable_progress_bar()
    with pytest.raises(ConfigError, match=r"is for a classification model, but atlas is loaded as a .*, a causal-lm"):
        run_recipe(SHIPPED["bert-base-fever"], tmp_path / "out", model="atlas", device="cpu", **files)


# -- the command -----------------------------------------------------------------------------------------------------


def test_options_reach_the_run(tmp_path, monkeypatch):
    called = {}
    monkeypatch.setattr("remend.recipes.run_recipe", lambda *_, **given: called.update(given))
    assert run(["recipe", "run", "distilgpt2", "--out", "my out", "--seed", "0", "--max-steps", "3"]) == 0
    assert (called["seed"], called["max_steps"], called["device"]) == (0, 3, "auto")
    assert called["command"] == "remend recipe run distilgpt2 --out 'my out' --max-steps 3 --seed 0"


def test_recipes_are_listed(capsys):
    assert run(["recipe", "list"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "gpt-j-6b" in shown
    assert ".88 / .031" in shown


def test_a_recipe_that_is_shown_can_be_edited_and_loaded(tmp_path, capsys):
    for name, recipe in SHIPPED.items():
        assert run(["recipe", "show", name]) == 0
        (tmp_path / "copy.json").write_text(capsys.readouterr().out, encoding="utf-8")
        assert load_recipe(tmp_path / "copy.json") == recipe


def test_a_name_that_no_recipe_has(capsys):
    for command in ("show", "run"):
        assert run(["recipe", command, "gpt-jay"]) == 2
        assert "there is no recipe 'gpt-jay'" in " ".join(capsys.readouterr().err.split())
