"""What a command says and loads before it does anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import argv

ROOT = Path(__file__).parent.parent


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_packages_take_no_time_to_import():
    """A spelling mistake in a config, or a list of runs, need not wait for PyTorch."""
    done = python("import sys, train, scripts; print(*sys.modules)")
    loaded = done.stdout.split()
    assert "train" in loaded, done.stderr
    assert not {"torch", "megatron", "pydantic"} & set(loaded)


@pytest.mark.slow
def test_megatron_is_quiet_in_every_script():
    done = python("import scripts; import models.gpt")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_training_says_nothing_beside_what_it_means_to_say(tmp_path):
    """That megatron-core calls its GPTModel deprecated, once a model is built, for example."""
    alone = ("parallel.expert_parallel=1", "train.device=cpu", "train.steps=1")
    done = subprocess.run(
        [sys.executable, "-m", "train", *argv(tmp_path, "a", *alone)],
        cwd=ROOT,
        env=os.environ | {"CUDA_HOME": "/usr"},  # as where CUDA's compiler is, and no GPU
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    begin = ("run ", "machine ", "model ", "experts ", "path ", "runs on ", "batch ", "data ")
    for said, wanted in zip(done.stdout.splitlines(), begin, strict=False):
        assert said.startswith(wanted)


def fake_python(folder: Path, name: str, version: tuple[int, ...]) -> None:
    """An interpreter that takes itself for another version, and cannot make a venv."""
    (folder / name).write_text(
        f"""#!/bin/sh
        case $1 in
          --version) echo Python {".".join(map(str, version))} ;;
          -c) exec {sys.executable} -c "import sys; sys.version_info = {version}; $2" ;;
          *) exit 3 ;;
        esac
        """
    )
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("there", "code", "out", "err"),
    [
        ({"python3": (3, 12, 1)}, 3, "making .venv with Python 3.12.1\n", ""),
        (
            {"python3": (3, 14, 0), "python3.11": (3, 11, 7)},
            3,
            "making .venv with Python 3.11.7\n",
            "",
        ),
        (
            {"python3": (3, 10, 0), "python3.14": (3, 14, 0)},
            2,
            "",
            "error: no Python 3.11, 3.12 or 3.13",
        ),
    ],
)
def test_the_installation_takes_a_python_that_can_run_this(tmp_path, there, code, out, err):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    path = tmp_path / "bin"
    path.mkdir()
    (path / "dirname").symlink_to(shutil.which("dirname") or "")
    for name, version in there.items():
        fake_python(path, name, version)
    done = subprocess.run(
        [shutil.which("bash") or "", "-e", tmp_path / "scripts" / "setup.sh", "requirements.txt"],
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (code, out)
    assert done.stderr.startswith(err)
    assert done.stderr.count("\n") == bool(err)
