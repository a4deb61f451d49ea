"""Every command and every path of this repository that a document or a script names is there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("configs", "docs", "models", "scripts", "slurm", "tests", "train")
PATTERNS = ("*.md", "docs/*.md", "configs/*.yaml", "slurm/*", "scripts/**/*.sh", ".ci/run")
TEXTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern) if path.is_file())

MODULE = re.compile(r"(?<!\S)-m ([a-z_][\w.]*\w)")
PATH = re.compile(rf"(?<![\w/.<-])(?:{'|'.join(ROOMS)})/[\w./*-]*")
LINK = re.compile(r"\]\(([^)#\s]+)")
FILE = re.compile(r"(?<![\w/.*-])([\w-]+\.(?:py|sh|sbatch|yaml))\b")
INSTALLED = {"compileall", "pip", "pytest", "venv"}
"""Modules of Python and of requirements-dev.txt."""
MADE_UP = re.compile(r"NAME|[a-z]/file")
"""Instead of a name that the reader chooses."""
OF_OTHERS = {"permutation.py", "storage.py", "setup.py", "config.yaml"}
"""Files of TransformerEngine, of DeepEP and of a run's folder."""


def is_module(name: str) -> bool:
    if name.split(".")[0] not in ROOMS:
        return name in INSTALLED
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def missing(text: str, folder: Path) -> Iterator[str]:
    """What `text`, which lies in `folder`, names and is not there."""
    for name in MODULE.findall(text):
        if not is_module(name):
            yield f"-m {name}"
    for path in PATH.findall(text):
        path = path.rstrip(".-")
        if not MADE_UP.search(path) and not any(ROOT.glob(path.rstrip("/"))):
            yield path
    for link in LINK.findall(text):
        if "://" not in link and not (folder / link).exists():
            yield f"link to {link}"
    for name in FILE.findall(text):
        if name not in OF_OTHERS and not any(any((ROOT / r).rglob(name)) for r in ROOMS):
            yield name


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_text_names_is_there(path):
    assert not sorted(set(missing(path.read_text(encoding="utf-8"), path.parent)))


def test_what_is_not_there_is_found():
    text = """
        python -m scripts.compare runs/A, scripts/demo.sh, `models/moe/paths/`, [a](../README.md)
        python -m scripts.bench_train; see `train/data.py`, [b](gone.md) and `reference.py`.
    """
    assert list(missing(text, ROOT / "docs")) == [
        "-m scripts.bench_train", "train/data.py", "link to gone.md", "reference.py",
    ]  # fmt: skip
