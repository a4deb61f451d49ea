"""The curves' data, and `compare.png`'s specification drawn as SVG, in which all can be read."""

import csv
import json
import re
from pathlib import Path

import pytest
import vl_convert

from models.config import PATH_NAMES
from scripts.compare.arms import Arm, arm_of, group_arms
from scripts.compare.curves import DASHES, PAPER, choose_charts, make_rows, title_of
from scripts.compare.picture import make_picture
from scripts.compare.runs import Run, choose_baseline, read_runs
from tests.support.made_up_runs import STEPS, write_run

BF16 = [5 - step / 100 for step in STEPS]


def read(folders: list[Path]) -> tuple[list[Run], Arm]:
    runs = read_runs(folders)
    return runs, arm_of(group_arms(runs), choose_baseline(runs, None))


def rows_of(folders: list[Path]) -> list[dict[str, str]]:
    return [*csv.DictReader(make_rows(*read(folders)).splitlines())]


def draw(folders: list[Path]) -> str:
    return vl_convert.vegalite_to_svg(make_picture(*read(folders)))


def lines(svg: str) -> list[dict[str, str]]:
    """The curves of a drawing, panel after panel: the attributes of each."""
    found = re.findall(r'<path aria-label="[^"]*"[^>]*"line mark"[^>]*>', svg)
    return [dict(re.findall(r'([\w-]+)="([^"]*)"', tag)) for tag in found]


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """The second's loss is 1 % higher, and not finite at the third step."""
    higher: list[float | None] = [loss * 1.01 for loss in BF16]
    higher[2] = None
    return [
        write_run(tmp_path / "a", "bf16", BF16),
        write_run(tmp_path / "b", "fp8_baseline", higher, {"optim/grad_norm": 1.25}),
    ]


def add(folder: Path, place: int, **metrics: float) -> None:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[place] |= {name.replace("__", "/"): value for name, value in metrics.items()}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_row_for_each_logged_step(two: list[Path]) -> None:
    add(two[0], 4, loss__valid=4.25)
    rows = rows_of(two)
    assert [row["place"] for row in rows] == ["0"] * 20 + ["1"] * 20
    assert [int(row["step"]) for row in rows] == STEPS * 2
    assert [int(row["tokens"]) for row in rows] == [step * 32 for step in STEPS] * 2
    assert [float(row["loss"]) for row in rows[:20]] == pytest.approx(BF16)
    assert rows[22]["loss"] == rows[22]["gap"] == ""
    gaps = [float(row["gap"]) for row in rows if row["gap"]]
    assert gaps == pytest.approx([0] * 20 + [1] * 19, abs=1e-5)
    assert [row["norm"] for row in rows] == [""] * 20 + ["1.25"] * 20
    assert [row["valid"] for row in rows if row["valid"]] == ["4.25"]
    assert "memory" not in rows[0]  # no run has logged it


def test_picture_has_a_curve_for_each_run(two: list[Path]) -> None:
    svg = draw(two)
    curves = lines(svg)
    assert [curve["aria-label"] for curve in curves] == ["a", "b"] * 2
    assert [curve["stroke"] for curve in curves] == [
        PAPER.color("bf16"),
        PAPER.color("fp8_baseline"),
    ] * 2
    # The third point is missing, which breaks the line.
    assert [curve["d"].count("M") for curve in curves] == [1, 2, 1, 2]
    assert [len(re.findall("[ML]", curve["d"])) for curve in curves] == [20, 19] * 2
    # From the first step to the last: the width of what is drawn. The first run's curve is wide.
    x = [float(x) for x in re.findall(r"[ML]([\d.]+),", curves[0]["d"])]
    assert x == pytest.approx([440 * n / 19 for n in range(20)], abs=0.01)
    assert [float(curve["stroke-width"]) for curve in curves] == [5, 1.8] * 2
    text = re.sub("<[^>]*>", " ", svg)
    for expected in ("Training loss ", "Gap of the training loss to a, %", " a ", " b ", "6k"):
        assert expected in text
    assert "dots" not in text
    assert "symbol mark" not in svg


def test_dots_are_validation_losses(two: list[Path]) -> None:
    add(two[1], 9, loss__valid=4.5)
    add(two[1], 19, loss__valid=3.5)
    svg = draw(two)
    assert "Training loss (dots: validation)" in svg
    dots = re.findall(r'aria-label="tokens: ([^;]*); [^:]*: ([^;]*); run: (\w)"', svg)
    assert dots == [("3.2k", "4.5", "b"), ("6.4k", "3.5", "b")]


def test_repeats_are_told_apart_by_dashes(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{path}{seed}", path, config={"train": {"seed": seed}})
        for path in ("bf16", "fp8_direct")
        for seed in range(2)
    ]
    solid, dashed = (",".join(map(str, dash)) for dash in DASHES[:2])
    found = [curve["stroke-dasharray"] for curve in lines(draw(folders))[:4]]
    assert found == [solid, dashed] * 2


@pytest.mark.parametrize(
    ("paths", "wide"),
    [
        (PATH_NAMES, {"fp8_baseline", "fp8_direct"}),
        (["bf16", "fp8_direct"], {"bf16"}),
        (["bf16", "fp8_direct", "fp8_fused"], {"fp8_direct"}),
        (["bf16"], set()),
    ],
)
def test_a_curve_below_another_is_wide(tmp_path: Path, paths: list[str], wide: set[str]) -> None:
    folders = [write_run(tmp_path / path, path, BF16) for path in paths]
    drawn = lines(draw(folders))[: len(paths)]
    widths = {line["stroke-width"] for line in drawn}
    assert len(widths) == 1 + bool(wide)
    most = max(widths, key=float)
    found = {path for path, line in zip(paths, drawn, strict=True) if line["stroke-width"] == most}
    assert found == (wide or {*paths})


def test_one_run_has_no_gap_and_no_tokens_mean_steps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", "bf16")
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace("progress/tokens", "progress/other"))
    runs, baseline = read([folder])
    assert [title_of(chart, runs, baseline) for chart in choose_charts(runs)] == ["Training loss"]
    svg = draw([folder])
    assert len(lines(svg)) == 1
    assert ">step</text>" in svg
    assert ">tokens</text>" not in svg
