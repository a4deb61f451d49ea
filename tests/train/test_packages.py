"""Broken packages are taken for missing ones, by megatron-core and by every command."""

import copy
import importlib
import inspect
import os
import subprocess
import sys
import types
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import train  # noqa: F401  (which guards them)
from models.moe.dispatch.deep_ep import GUIDE, no_package
from tests.support.tiny import argv
from train.safety.packages import guard

VERSION_2 = {
    "__init__.py": "from .utils.event import EventHandle, EventOverlap\nBuffer = object",
    "utils/__init__.py": "from .event import EventHandle",
    "utils/event.py": "class EventHandle: ...\nclass EventOverlap: ...",
}

LIKE_TE = {
    "__init__.py": "try:\n    from . import pytorch\nexcept (ImportError, OSError):\n    pass",
    "pytorch/__init__.py": "",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package's files; they are found until the test ends."""

    def write(name: str, files: dict[str, str]) -> None:
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("deep_ep", "transformer_engine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield write
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("deep_ep", "transformer_engine"):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["deep_ep", "transformer_engine"])
@pytest.mark.parametrize("error", ["AssertionError", "OSError", "ImportError", "RuntimeError"])
def test_a_broken_one_says_why(package, name, error):
    package(name, {"__init__.py": f"raise {error}('two NCCLs')"})
    for _ in range(2):  # the second time it is no other error
        with pytest.raises(ModuleNotFoundError, match=r"^two NCCLs$"):
            importlib.import_module(name)
    assert find_spec(name) is not None
    if name == "deep_ep":
        assert no_package("Buffer") == f"the package deep_ep does not load (two NCCLs); {GUIDE}"


def test_what_a_package_misses_is_told(package):
    package("deep_ep", {"__init__.py": "import deep_ep_cpp"})
    with pytest.raises(ModuleNotFoundError, match="'deep_ep_cpp'") as raised:
        importlib.import_module("deep_ep")
    assert raised.value.name == "deep_ep_cpp"


def test_a_sound_one_is_as_it_was(package):
    package("deep_ep", {**VERSION_2, "data.txt": "here"})
    deep_ep = importlib.import_module("deep_ep")
    assert Path(str(deep_ep.__file__)).name == "__init__.py"
    assert "EventOverlap" in inspect.getsource(deep_ep)
    assert (resources.files("deep_ep") / "data.txt").read_text() == "here"
    assert importlib.reload(deep_ep) is deep_ep
    loader: Any = deep_ep.__spec__ and deep_ep.__spec__.loader
    assert copy.copy(loader).get_filename("deep_ep") == deep_ep.__file__


def test_megatron_core_finds_what_it_looks_for(package):
    package("deep_ep", VERSION_2)
    from deep_ep import Buffer  # type: ignore[import-not-found]  # noqa: F401
    from deep_ep.utils import EventHandle, EventOverlap  # type: ignore[import-not-found]

    assert EventOverlap is importlib.import_module("deep_ep").EventOverlap is not EventHandle


@pytest.mark.parametrize("error", ["AssertionError", "OSError", "ImportError"])
def test_transformer_engine_is_broken_where_its_half_for_pytorch_is(package, error):
    package("transformer_engine", LIKE_TE | {"pytorch/__init__.py": f"raise {error}('no cuda')"})
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match=r"^no cuda$"):
            importlib.import_module("transformer_engine.pytorch")


def test_transformer_engine_that_is_sound(package):
    package("transformer_engine", LIKE_TE | {"pytorch/__init__.py": "here = True"})
    assert importlib.import_module("transformer_engine").pytorch.here


@pytest.mark.parametrize(
    ("raised", "ends_with"),
    [("SystemExit(3)", SystemExit), ("KeyboardInterrupt", KeyboardInterrupt)],
)
def test_what_is_no_error_passes(package, raised, ends_with):
    package("deep_ep", {"__init__.py": f"raise {raised}"})
    with pytest.raises(ends_with):
        importlib.import_module("deep_ep")


def test_an_error_without_a_text_says_what_it_is(package):
    package("deep_ep", {"__init__.py": "assert False"})
    with pytest.raises(ModuleNotFoundError, match=r"^AssertionError$") as raised:
        importlib.import_module("deep_ep")
    assert isinstance(raised.value.__cause__, AssertionError)


def test_other_finders(package, monkeypatch):
    """One of an older kind, and a folder that is not a package."""
    older = types.SimpleNamespace(find_module=lambda name, path=None: None)
    monkeypatch.setattr(sys, "meta_path", [older, *sys.meta_path])
    package("deep_ep", {"README": "remains"})
    assert importlib.import_module("deep_ep").__file__ is None


def test_it_is_there_once():
    before = list(sys.meta_path)
    guard()
    assert sys.meta_path == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [("deep_ep", "__init__.py"), ("transformer_engine", "pytorch/__init__.py")],
)
def test_training_on_a_cpu_does_not_mind(package, tmp_path, name, file):
    package(name, LIKE_TE | {file: "raise RuntimeError('built for CUDA 12')"})
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    keys = ["train.device=cpu", "train.steps=1", "parallel.expert_parallel=1"]
    done = subprocess.run(
        [sys.executable, "-m", "train", *argv(tmp_path, "run", *keys)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
