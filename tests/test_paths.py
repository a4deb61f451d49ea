"""There is one list of paths, `models.config.PATH_NAMES`; everything else asks it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.config import PATH_NAMES
from models.fp8.operations import Operations
from models.moe.paths import PATHS

ROOT = Path(__file__).parent.parent
ROOMS = (".ci", "models", "scripts", "slurm", "train")
TEXT = {"", ".py", ".sh", ".sbatch", ".css", ".js"}
MAY_LIST = (Path("models/config.py"), Path("models/moe/paths"))

NAME = rf"\b(?:{'|'.join(PATH_NAMES)})\b"
ROW = re.compile(rf"{NAME}(?:\W+{NAME}){{2,}}")
"""Three names or more with nothing but spaces, quotes and the like between them."""


def sources() -> Iterator[Path]:
    """What is run, from the root: no documents, no configs, no tests."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.is_file() and path.suffix in TEXT:
                yield path.relative_to(ROOT)


def lists_paths(text: str) -> bool:
    return ROW.search(text) is not None


def test_every_name_has_its_code():
    assert tuple(PATHS) == PATH_NAMES


def test_nobody_else_lists_them():
    found = [
        str(path)
        for path in sources()
        if not any(path.is_relative_to(allowed) for allowed in MAY_LIST)
        and lists_paths((ROOT / path).read_text(encoding="utf-8"))
    ]
    assert not found, f"these should ask models.config.PATH_NAMES: {found}"
    assert lists_paths((ROOT / MAY_LIST[0]).read_text()), "this test finds no list any more"


@pytest.mark.parametrize("text", ["README.md", "docs/how-it-works.md"])
def test_the_diff_that_is_shown_is_the_diff(text):
    shown = re.search(r"^```\n\$ (diff \S+ \S+)\n(.*?)^```", (ROOT / text).read_text(), re.M | re.S)
    assert shown, "it shows none any more"
    done = subprocess.run(shown[1].split(), cwd=ROOT, capture_output=True, text=True)
    assert shown[2] == done.stdout


def test_what_a_list_is():
    assert lists_paths("for path in bf16 fp8_baseline fp8_compact; do")
    assert lists_paths('PATHS = (\n    "bf16",\n    "fp8_compact",\n    "fp8_direct",\n)')
    assert not lists_paths('FROM = ("fp8_baseline", "fp8_direct")')
    assert not lists_paths('{"bf16": 0, "fp8_baseline": 5, "fp8_compact": 2}')


def test_a_shell_can_ask():
    """As scripts/demo.sh and slurm/compare.sh do; and neither waits for PyTorch."""
    ask = "import sys; from models.config import PATH_NAMES; print(*PATH_NAMES); "
    ask += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == list(PATH_NAMES), done.stderr


def test_the_lesson_is_the_difference():
    """docs/how-it-works.md shows `diff` of two paths as it is."""
    text = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    ((command, shown),) = re.findall(r"^\$ (diff models/.*)\n((?:.*\n)*?)```$", text, re.M)
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
    assert shown == done.stdout


def names_used(path: Path) -> set[str]:
    """Every name and attribute that a file mentions, imports included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.name.rpartition(".")[2])
        elif isinstance(node, ast.Attribute):
            # `trip.relayout` is the one that counts.
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            found.add(f"trip.{node.attr}" if owner == "trip" else node.attr)
    return found


def test_only_a_trip_makes_relayouts():
    """It counts them; a path or a layer that called `tensor.relayout` would not be counted."""
    users = [p for p in (ROOT / "models").rglob("*.py") if "relayout" in names_used(p)]
    assert [str(p.relative_to(ROOT)) for p in users] == ["models/moe/dispatch/trip.py"]


def test_what_a_gpu_takes_from_others_is_an_operation():
    """A name misspelt in models/fp8/gpu would leave Triton's function where it was."""
    for path in (ROOT / "models/fp8/gpu").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign):
                (target,) = node.targets
                assert isinstance(target, ast.Name)
                assert target.id in vars(Operations), f"{path.name}: {target.id}"
