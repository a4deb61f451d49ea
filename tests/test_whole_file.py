"""What a command writes is whole or not there, and what cannot be written is known before."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench.results import write_json
from tests.support import ctrl_c
from train.config import ConfigError
from train.whole_file import check_out, whole


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_file_before_and_nothing_else(tmp_path, error):
    file = tmp_path / "a.json"
    file.write_text("before")

    def fail() -> None:
        with whole(file) as new:
            new.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert file.read_text() == "before"
    assert [*tmp_path.iterdir()] == [file]


def test_two_processes_do_not_write_into_one_another(tmp_path):
    file = tmp_path / "a.json"
    code = "import sys; from pathlib import Path; from scripts.bench.results import write_json\n"
    code += "write_json(Path(sys.argv[1]), {'rows': [1]})"
    with whole(file) as new, new.open("w") as mine:
        print("[1,", file=mine, flush=True)
        subprocess.run([sys.executable, "-c", code, file], check=True, timeout=60)
        print("2]", file=mine, flush=True)
        assert json.loads(file.read_text()) == {"rows": [1]}
    assert json.loads(file.read_text()) == [1, 2]
    assert [*tmp_path.iterdir()] == [file]


def test_a_folder_of_that_name_leaves_nothing(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_json(tmp_path / "a.json", {"rows": []})
    assert [*tmp_path.iterdir()] == [tmp_path / "a.json"]


def test_json_touches_no_file_but_its_own(tmp_path):
    (tmp_path / "a.tmp").write_text("theirs")
    write_json(tmp_path / "a.json", {"rows": []})
    assert json.loads((tmp_path / "a.json").read_text()) == {"rows": []}
    assert (tmp_path / "a.tmp").read_text() == "theirs"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("folder", "is a folder; name the file to write"),
        ("pipe", "is a device or a pipe; name a file"),
        ("file/a", "cannot be written: Not a directory"),
        ("file/b/a", "Not a directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_written_is_known_before(tmp_path, path, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=f"--out {tmp_path / path} .*{says}"):
        check_out(tmp_path / path)


def test_a_check_leaves_nothing(tmp_path):
    check_out(tmp_path / "a")
    check_out(tmp_path / "new" / "a")
    check_out(None)
    assert not [*tmp_path.iterdir()]


def test_ctrl_c_ends_a_command_in_one_line():
    code = "import time\nfrom scripts import terminal\n"
    code += "terminal.run(lambda: print('begun', flush=True) or time.sleep(60))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=ctrl_c.heard,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "stopped\n")


def test_every_command_ends_so():
    """What a user starts with `python -m`, except for what starts more processes of its own."""
    ending = {
        path.relative_to("scripts"): path.read_text(encoding="utf-8").splitlines()[-1].strip()
        for path in Path("scripts").rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    }
    others = {str(path) for path, last in ending.items() if last != "terminal.run(main)"}
    assert others == {
        "bench/kernels/__main__.py", "bench/layer/__main__.py", "bench/measure/__main__.py",
        "bench/pairs.py", "bench/torchrun.py", "bench/train/__main__.py",
    }  # fmt: skip
