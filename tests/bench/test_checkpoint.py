"""The benchmark of checkpoints and disks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.checkpoint import __main__ as command


@pytest.mark.slow
def test_a_disk_is_measured(tmp_path):
    out, theirs = tmp_path / "disk.json", tmp_path / "disk" / "step_00000100"
    theirs.mkdir(parents=True)  # a folder of checkpoints is on the disk that a user asks about
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
    there = list((tmp_path / "disk").iterdir())
    assert theirs in there, "what was there before is gone"
    assert there == [theirs], "what was written is left"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "14"], "--steps 14: the saves of 15 steps are the fewest to measure"),
        (["--disk", "HERE/file"], "--disk HERE/file: File exists"),
        (["--out", "HERE/file/a"], "--out HERE/file/a cannot be written: Not a directory"),
        (["--disk", "HERE", "--out", "HERE/file/a"],
         "--out HERE/file/a cannot be written: Not a directory"),
        (["--disk", "HERE", "--gb", "-1"], "--gb -1 is not positive"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, arguments, said):
    (tmp_path / "file").touch()
    given = [argument.replace("HERE", str(tmp_path)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["checkpoint", *given])
    assert command.main() == 2
    assert capsys.readouterr().err == f"error: {said.replace('HERE', str(tmp_path))}\n"


@pytest.mark.parametrize("option", ["--repeats", "--steps"])
def test_counts_are_positive(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["checkpoint", option, "0"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert f"argument {option}: 0 is not positive" in capsys.readouterr().err


def test_the_stops_go_to_the_file_that_is_named(tmp_path, monkeypatch):
    rows = [{"time/step_ms": 10.0, "time/checkpoint_ms": 1.0}] * 3

    def trained(given: list[str]) -> subprocess.CompletedProcess[str]:
        folder = next(key for key in given if key.startswith("run.dir=")).partition("=")[2]
        (run := Path(folder) / "a").mkdir()
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return subprocess.CompletedProcess(given, 0)

    monkeypatch.setattr(subprocess, "run", trained)
    monkeypatch.setattr(command, "describe_machine", lambda *_: {})
    monkeypatch.setattr(command, "RESULT", tmp_path / "of_the_repository.json")
    out = tmp_path / "mine.json"
    monkeypatch.setattr(sys, "argv", ["checkpoint", "--out", str(out)])
    assert command.main() == 0
    assert json.loads(out.read_text())["stop_share_of_a_step"] == 0.1
    assert [*tmp_path.iterdir()] == [out]
