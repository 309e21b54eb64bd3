"""The pages: their commands and code, run as they stand, and that they name what there is."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import remend
from remend.apps.acceptance import AcceptanceCriteria
from remend.cli import run
from remend.data.request_files import read_requests
from remend.registries import METRICS
from remend.request import parse_request

DOCS = Path(__file__).parent.parent / "docs"
PUBLIC_MODULES = [
    "data", "editors", "evaluation", "formats", "models", "tasks", "training",
    "apps.acceptance", "apps.hub", "apps.patch_registry", "apps.studio",
]  # fmt: skip
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page(page, tmp_path, monkeypatch):
    """In order, in one folder; Python blocks share their names; a JSON block is a request, a set or acceptance.json."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, block in re.findall(r"```(\w+)\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL):
        if language == "python":
            exec(compile(block, page, "exec"), names)
        elif language == "json" and "must_stay" in block:
            (tmp_path / "acceptance.json").write_text(block)
            assert AcceptanceCriteria.read(tmp_path / "acceptance.json").must_stay
        elif language == "json" and '"item"' in block:
            (tmp_path / "example.jsonl").write_text(block, encoding="utf-8")
            (request,) = read_requests(tmp_path / "example.jsonl")
            assert all((request.given_paraphrases, request.given_near, request.given_portability))
        elif language == "json":
            assert parse_request(json.dumps(json.loads(block)), page)
        elif language == "bash":
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                assert words[0] == "remend", line
                assert run(words[1:]) == 0, line
        else:
            assert language == "console", "shown, and not run"


@pytest.mark.parametrize("module", ["", *PUBLIC_MODULES])
def test_every_public_name_is_in_the_api(module):
    """Under its shortest name; and whatever the pages name exists."""
    documented = re.findall(r"^::: ([\w.]+)$", "".join(page.read_text() for page in (DOCS / "api").glob("*.md")), re.M)
    prefix = f"remend.{module}".rstrip(".")
    public = importlib.import_module(prefix).__all__
    names = [f"remend.{name}" if name in remend.__all__ else f"{prefix}.{name}" for name in public]
    assert not sorted(set(names) - set(documented))
    for name in documented:
        if name.rpartition(".")[0] == prefix:
            assert hasattr(importlib.import_module(prefix), name.rpartition(".")[2]), name


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{page}" for page in PAGES)])
def test_modules_and_files_that_a_page_names_exist(page):
    text = (DOCS.parent / page).read_text(encoding="utf-8")
    for name in re.findall(r"`(remend(?:\.\w+)+)", text):
        if name.removeprefix("remend.") not in registry_groups():
            assert resolves(name), name
    for link in re.findall(r"\]\(((?:src|tests|benchmarks|scripts|examples|docs)/[^)#]+)\)", text):
        assert (DOCS.parent / link).exists(), link


def registry_groups():
    """The entry-point groups, which look like modules."""
    registries = importlib.import_module("remend.registries")
    groups = [registry.group for registry in vars(registries).values() if isinstance(registry, registries.Registry)]
    return [group.removeprefix("remend.") for group in groups]


def resolves(name):
    """Whether a dotted name is a module or an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", (DOCS / page).read_text(encoding="utf-8")):
            assert (DOCS / page).parent.joinpath(link).exists(), (page, link)


def test_the_site_is_built_strictly(tmp_path):
    """Every page, every link and every public name, without a network."""
    pytest.importorskip("mkdocs")
    program = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    made = subprocess.run(program, cwd=DOCS.parent, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "remend.Edit" in (tmp_path / "site" / "api" / "edits.html").read_text(encoding="utf-8")
    metrics = (tmp_path / "site" / "api" / "evaluation.html").read_text(encoding="utf-8")
    assert all(f"<code>{name}</code>" in metrics for name in METRICS.registered_names()), "the table of the registry"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT's
@pytest.mark.parametrize("example", ["fix_and_serve", "compare_editors", "audit_a_lora"])
def test_the_examples(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(DOCS.parent / "examples")
    module = importlib.import_module(example)
    module.main(*((3,) if example == "compare_editors" else ()))
    if example == "fix_and_serve":
        with pytest.raises(SystemExit, match="delete it first"):
            module.main()
    told = capsys.readouterr().out
    wanted = {"fix_and_serve": "is Toronto", "compare_editors": "mend", "audit_a_lora": "an edit by MEND: accepted"}
    assert wanted[example] in told
