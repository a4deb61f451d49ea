"""Broken packages are taken for missing ones, by megatron-core and by every command."""

import importlib
import inspect
import os
import subprocess
import sys
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import pytest

import train  # noqa: F401  (which guards them)
from models.moe.dispatch.deep_ep import GUIDE, no_package

VERSION_2 = {
    "__init__.py": "from .utils.event import EventHandle, EventOverlap\nBuffer = object",
    "utils/__init__.py": "from .event import EventHandle",
    "utils/event.py": "class EventHandle: ...\nclass EventOverlap: ...",
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


def test_megatron_core_finds_what_it_looks_for(package):
    package("deep_ep", VERSION_2)
    from deep_ep import Buffer  # type: ignore[import-not-found]  # noqa: F401
    from deep_ep.utils import EventHandle, EventOverlap  # type: ignore[import-not-found]

    assert EventOverlap is importlib.import_module("deep_ep").EventOverlap is not EventHandle


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deep_ep", "transformer_engine"])
def test_a_command_that_needs_neither_does_not_mind(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('built for CUDA 12')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "scripts.evaluate", str(tmp_path / "nothing")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
