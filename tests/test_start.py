"""What a command says and loads before it does anything."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_packages_take_no_time_to_import():
    """So that a spelling mistake in a config, or a list of runs, need not wait for PyTorch."""
    done = python("import sys, train, scripts; print(*sys.modules)")
    loaded = done.stdout.split()
    assert "train" in loaded, done.stderr
    assert not {"torch", "megatron", "pydantic"} & set(loaded)


@pytest.mark.slow
def test_megatron_is_quiet_in_every_script():
    done = python("import scripts; import models.gpt")
    assert (done.returncode, done.stderr) == (0, "")
