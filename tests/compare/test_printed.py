"""The table of a comparison on narrow terminals: no cell wraps, and no run is lost."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from models.config import PATH_NAMES
from scripts.compare.arms import arm_of, group_arms
from scripts.compare.printed import broken, print_table
from scripts.compare.runs import choose_baseline, read_runs
from scripts.compare.table import make_table
from tests.support.made_up_runs import write_gpu_run, write_run

METRICS = {"throughput/tokens_per_sec": 123_456.7, "moe/kept_mib": 1234.5, "time/step_ms": 1234.5}


def printed(folders: list[Path], width: int) -> tuple[list[str], list[list[str]]]:
    """The lines, and the words that each row of the table must have on one line."""
    runs = read_runs(folders)
    arms = group_arms(runs)
    table = make_table(runs, arm_of(arms, choose_baseline(runs, None)))
    out = io.StringIO()
    print_table(Console(file=out, width=width), runs, table)
    rows = [[row.label, *(c.short or c.text for c in row.cells)] for row in table]
    return out.getvalue().splitlines(), [row for row in rows if row[0] != "path"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_five_paths_fit_80_columns(tmp_path, device):
    if device == "cpu":
        folders = [write_run(tmp_path / p, p, device="cpu", metrics=METRICS) for p in PATH_NAMES]
    else:
        folders = [write_gpu_run(tmp_path / p, p, 123_456) for p in PATH_NAMES]
    lines, rows = printed(folders, 80)
    assert max(map(len, lines)) <= 80
    body = [line.split() for line in lines]
    for row in rows:
        assert " ".join(row).split() in body
    heading = lines[: next(i for i, line in enumerate(lines) if set(line) == {"─"})]
    assert " ".join(heading).split() == [*["fp8_"] * 4, "run", "bf16", *NAMES]
    assert len(lines) == len(heading) + 1 + len(rows) + 1


NAMES = [name.removeprefix("fp8_") for name in PATH_NAMES if name != "bf16"]


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_runs_that_do_not_fit_beside_each_other_go_below(tmp_path, width):
    names = [f"experiment-{p}-seed-{i}" for p in ("bf16", "fp8_direct") for i in range(3)]
    folders = [
        write_run(tmp_path / name, name.split("-")[1], device="cpu", metrics=METRICS)
        for name in names
    ]
    lines, rows = printed(folders, width)
    assert max(map(len, lines)) <= width
    tables = sum(line.startswith("final train loss") for line in lines)
    assert tables > 1
    for label, *cells in rows:
        here = [line.removeprefix(label) for line in lines if line.startswith(label)]
        assert len(here) == tables
        assert " ".join(here).split() == " ".join(cells).split()


def test_a_wide_terminal_gets_whole_names(tmp_path):
    folders = [write_run(tmp_path / p, p, device="cpu", metrics=METRICS) for p in PATH_NAMES]
    lines, _ = printed(folders, 120)
    assert lines[0].split() == ["run", *PATH_NAMES]
    assert "fp32, FP8 emulated" in "\n".join(lines)


def test_names_break_where_a_reader_expects_it():
    assert broken("fp8_baseline", 8) == "fp8_\nbaseline"
    assert broken("a-b_c.d-efgh", 8) == "a-b_c.d-\nefgh"
    assert broken("averylongname", 8) == "averylongname"
    assert broken("a__b--c", 4) == "a__\nb--c"
