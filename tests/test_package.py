"""The package as a whole: its public names, its rooms, and what importing it does."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import remend

SOURCE = Path(remend.__file__).parent
ROOMS = [
    "errors", "visible_text", "bounded_regex", "config", "progress", "registry", "registries", "staging",
    "saved_folders", "disk_cache", "hub_lookup", "request", "assets", "core", "fingerprint", "edit", "formats",
    "models", "tasks", "data", "editors", "expansion", "training", "evaluation", "recipes", "apps", "cli",
]  # fmt: skip
"""In order: a room imports only from rooms before it."""


def room(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_public_names():
    assert remend.__all__ == sorted(remend.__all__)
    for name in remend.__all__:
        assert getattr(remend, name).__doc__, f"{name} has no docstring"
    assert dir(remend) == remend.__all__
    stub = SOURCE.joinpath("__init__.py").read_text()
    assert all(f" {name}" in stub.split("_ROOMS")[0] for name in remend.__all__), "type checkers must see every name"


def test_rooms_import_only_from_rooms_above():
    for path in SOURCE.rglob("*.py"):
        if path.name in ("__init__.py", "__main__.py") and path.parent == SOURCE:
            continue
        own = ROOMS.index(room(path))
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                if module.startswith("remend."):
                    other = ROOMS.index(module.split(".")[1])
                    assert other <= own, f"{path.relative_to(SOURCE)} imports {module}"


def test_the_core_needs_torch_only():
    for path in (SOURCE / "core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                top = node.module.split(".")[0]
                assert top in {"torch", "jaxtyping", "remend", *sys.stdlib_module_names}, f"{path.name} imports {top}"


def test_dataclasses_that_hold_tensors_are_compared_by_identity():
    """Comparing tensors as fields raises: their elements have no one truth value."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            decorator = next((text for d in node.decorator_list if "dataclass" in (text := ast.unparse(d))), None)
            fields = [ast.unparse(item.annotation) for item in node.body if isinstance(item, ast.AnnAssign)]
            if decorator and any(re.search(r"\b(Tensor|LowRank)\b", field) for field in fields):
                assert "eq=False" in decorator, f"{path.relative_to(SOURCE)}: {node.name}"


def test_nothing_is_ever_pickled():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        assert "pickle" not in text.replace("unpickled", ""), path
        assert "torch.load" not in text, path
        assert "torch.save" not in text, path
        assert "trust_remote_code=True" not in text, path
        assert "weights_only" not in text, path


def test_importing_is_quick_and_has_no_effect():
    code = (
        "import sys, os; before = dict(os.environ); import remend, remend.cli;"
        "assert 'torch' not in sys.modules, 'importing remend imports torch'; assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


NAMED = {
    # Where a model's or a layer's class or name is compared with one, and why its structure does not tell.
    "core/layers.py": "Conv1D",  # [d_in, d_out] beside Linear's [d_out, d_in]: a square weight looks the same
}


def test_models_are_told_by_structure_not_by_name():
    """No comparison with a ``model_type`` or with the name of a class, but for the exceptions above."""
    families = CONFIG_MAPPING_NAMES.keys() | CONFIG_MAPPING_NAMES.values()
    found = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            calls = isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".endswith", ".startswith"))
            if not (isinstance(node, ast.Compare) or calls):
                continue
            text = ast.unparse(node)
            words = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and part.value}
            named = "__name__" in text and any(isinstance(word, str) for word in words)
            if named or "model_type" in text or words & families or any("For" in str(word) for word in words):
                found.setdefault(path.relative_to(SOURCE).as_posix(), []).append(text)
    assert found.keys() == NAMED.keys(), found
    assert all(NAMED[name] in text for name, texts in found.items() for text in texts)
