"""The benchmark of checkpoints and disks."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_disk_is_measured(tmp_path):
    out = tmp_path / "disk.json"
    command = [sys.executable, "-m", "scripts.bench.checkpoint", "--disk", str(tmp_path / "disk"),
               "--gb", "0.02", "--repeats", "2", "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["gb"] == pytest.approx(0.02, rel=0.01)
    names = ("copy_stop_s", "copy_s", "one_thread_s", "dd_s", "hash_s", "save_s")
    for name in names:
        assert 0 < found[name]["min"] <= found[name]["max"], name
    assert set(found["cpu_s"]) == set(names)
    assert not list((tmp_path / "disk").iterdir()), "what was written is left"
