"""The comparison of made-up runs: its figures, its pictures, its page, and bad input."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from scripts.compare.__main__ import main
from scripts.compare.arms import arm_of, group_arms
from scripts.compare.page.html import Html, fill, join
from scripts.compare.reading import reading, warnings
from scripts.compare.runs import (
    Run,
    choose_baseline,
    find_group,
    profiled_rows,
    read_run,
    read_runs,
    step_parts,
)
from scripts.compare.table import ABSENT, make_table
from tests.support.made_up_runs import STEPS, write_run
from train.metrics.recorder import record_changes


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """bf16, and two FP8 runs whose losses are 1 % higher and equal to each other."""
    bf16 = [5 - step / 100 for step in STEPS]
    fp8 = [loss * 1.01 for loss in bf16]

    def metrics(speed: float, forward: float, backward: float) -> dict[str, float]:
        return {
            "throughput/tokens_per_sec": speed,
            "moe/scale_relayouts": forward,
            "moe/scale_relayouts_backward": backward,
        }

    runs = tmp_path / "runs"
    return [
        write_run(runs / "a", "bf16", bf16, metrics(1000.0, 0.0, 0.0)),
        write_run(runs / "b", "fp8_baseline", fp8, metrics(800.0, 5.0, 3.0)),
        write_run(runs / "c", "fp8_compact", fp8, metrics(900.0, 2.0, 1.0)),
    ]


def table_of(folders: list[Path], baseline: str | None = None) -> dict[str, list[str]]:
    runs = read_runs(folders)
    arm = arm_of(group_arms(runs), choose_baseline(runs, baseline))
    rows = make_table(runs, arm)
    return {row.label: [cell.text for cell in row.cells] for row in rows}


def reading_of(folders: list[Path], baseline: str | None = None) -> list[str]:
    runs = read_runs(folders)
    arms = group_arms(runs)
    return reading(runs, arms, arm_of(arms, choose_baseline(runs, baseline)))


def run_main(*arguments: object) -> tuple[int, str]:
    output = io.StringIO()
    status = main([str(a) for a in arguments], Console(file=output, width=120))
    return status, output.getvalue()


def test_figures(three: list[Path]) -> None:
    table = table_of(three)
    # The last two of 20 logged steps are 190 and 200: losses 3.1 and 3.0.
    assert table["final train loss"] == ["3.0500", "3.0805", "3.0805"]
    assert table["train loss gap to bf16"] == ["–", "+1.000 %", "+1.000 %"]  # noqa: RUF001
    assert table["relayouts/layer, forward"] == ["0", "5", "2"]
    assert table["relayouts/layer, backward"] == ["0", "3", "1"]
    assert table["tokens/s"] == ["1,000", "800", "900"]
    assert table["speed / bf16"] == ["1.000x", "0.800x", "0.900x"]


def test_baseline_can_be_chosen(three: list[Path]) -> None:
    table = table_of(three, "b")
    assert table == table_of(three, "fp8_baseline")
    assert table["speed / fp8_baseline"] == ["1.250x", "1.000x", "1.125x"]
    assert table["train loss gap to fp8_baseline"] == ["-0.990 %", "–", "+0.000 %"]  # noqa: RUF001


def test_baseline_is_bf16_wherever_it_stands(three: list[Path]) -> None:
    assert "train loss gap to bf16" in table_of(three[::-1])


def test_figures_that_no_run_has_are_left_out(three: list[Path]) -> None:
    assert not [label for label in table_of(three) if "MFU" in label or "memory" in label]


def test_figures_that_some_runs_have(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", "bf16", metrics={"memory/peak_allocated_gib": 3.0}),
        write_run(
            tmp_path / "b",
            "fp8_direct",
            metrics={
                "moe/dispatched_mib": 12.0,
                "throughput/mfu": 0.25,
                "throughput/tokens_per_sec": 5.0,
            },
        ),
    ]
    table = table_of(folders)
    assert table["peak GPU memory GiB"] == ["3.00", "–"]  # noqa: RUF001
    assert table["dispatched MiB/step"] == ["–", "12.0"]  # noqa: RUF001
    assert table["tokens/s"] == ["–", "5"]  # noqa: RUF001
    assert "speed / bf16" not in table
    assert table["MFU"] == ["–", "25.0 %"]  # noqa: RUF001


def test_gap_is_taken_at_steps_that_both_have(tmp_path: Path) -> None:
    whole = [5 - step / 100 for step in STEPS]
    folders = [
        write_run(tmp_path / "a", "bf16", whole),
        write_run(tmp_path / "b", "fp8_compact", [loss * 1.02 for loss in whole[:10]]),
    ]
    assert table_of(folders)["train loss gap to bf16"][1] == "+2.000 %"
    assert any("different steps: 200 (a), 100 (b)" in w for w in warnings_of(folders))


def test_equal_losses_of_runs_that_ended_elsewhere(tmp_path: Path) -> None:
    losses = [5 - step / 1000 for step in range(60)]
    steps = list(range(1, 61))
    folders = [write_run(tmp_path / name, path, losses) for name, path in BOTH]
    for folder, count in zip(folders, (60, 55), strict=True):
        rows = [
            {"progress/step": step, "progress/tokens": step, "loss/train": loss}
            for step, loss in zip(steps[:count], losses, strict=False)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = reading_of(folders)
    assert (
        "b had, up to step 55, the last that both logged, a training loss equal to that of a."
        in said
    )

    short = [write_run(tmp_path / f"short-{name}", path, losses[:2]) for name, path in BOTH]
    assert not any("equal to that" in sentence for sentence in reading_of(short)), "of one step"


def test_several_runs_that_ended_elsewhere(tmp_path: Path) -> None:
    whole = [5 - step / 100 for step in STEPS]
    seeds = [
        write_run(tmp_path / f"b{seed}", "fp8_compact", losses, config={"train": {"seed": seed}})
        for seed, losses in enumerate(([loss * 1.02 for loss in whole[:10]], whole))
    ]
    (said,) = (
        one
        for one in reading_of([write_run(tmp_path / "a", "bf16", whole), *seeds])
        if one.startswith("The 2 runs")
    )
    assert "fp8_compact had, up to step 100, the last that both logged, training losses 1." in said


BOTH = [("a", "bf16"), ("b", "fp8_compact")]


def test_what_changed_on_resume_is_said(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, path) for name, path in BOTH]
    assert not any("changed" in one for one in warnings_of(folders))
    record_changes(folders[0], {"moe.path": ("fp8_fused", "bf16"), "optim.lr": (0.1, 0.2)}, 40)
    record_changes(folders[0], {"optim.lr": (0.2, 0.3)}, 60)
    assert [one for one in warnings_of(folders) if "changed" in one] == [
        "a changed at step 41: moe.path from fp8_fused to bf16, optim.lr from 0.1 to 0.2; all its "
        "steps are shown as bf16.",
        "a changed at step 61: optim.lr from 0.2 to 0.3.",
    ]
    record_changes(folders[0], {}, 40)  # resumed from there once more, with the first path
    assert not any("changed" in one for one in warnings_of(folders))
    (folders[0] / "changes.jsonl").write_text("[1]")
    assert not any("changed" in one for one in warnings_of(folders))


def warnings_of(folders: list[Path]) -> list[str]:
    return warnings(read_runs(folders))


def test_diverged_run_is_called_so(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", "bf16"),
        write_run(tmp_path / "b", "fp8_direct", [3.0] * 19 + [None]),
    ]
    table = table_of(folders)
    assert table["final train loss"][1] == "not finite"
    assert table["train loss gap to bf16"][1] == "not finite"
    assert run_main(*folders)[0] == 0


def test_validation_loss_is_the_last_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", "bf16")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[9]["loss/valid"], rows[14]["loss/valid"] = 4.5, 4.25
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert table_of([folder])["final valid loss"] == ["4.2500"]


def test_differences_of_configs_are_named(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", "bf16", config={"run": {"group": "x"}}),
        write_run(tmp_path / "b", "fp8_compact", config={"optim": {"lr": 2e-3}}),
    ]
    (warning,) = warnings_of(folders)
    assert "optim.lr is 0.001 (a), 0.002 (b)" in warning
    assert "optim.lr" in run_main(*folders)[1]


def test_fair_runs_have_no_warning(three: list[Path]) -> None:
    assert warnings_of(three) == []


def test_different_machines_are_named(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", "bf16"),
        write_run(tmp_path / "b", "fp8_compact", device_name="NVIDIA H200"),
    ]
    (warning,) = warnings_of(folders)
    assert "2 x NVIDIA H200 (b)" in warning


def test_losses_and_relayouts_come_first_on_a_cpu(tmp_path: Path) -> None:
    losses = [5 - step / 100 for step in STEPS]
    folders = [
        write_run(
            tmp_path / name,
            path,
            [loss * times for loss in losses],
            {"throughput/tokens_per_sec": speed, "moe/scale_relayouts": 2.0},
            device="cpu",
            device_name="some processor",
        )
        for name, path, times, speed in (("a", "bf16", 1, 10.0), ("b", "fp8_compact", 1.01, 5.0))
    ]
    loss, relayouts, speed = reading_of(folders)
    assert loss.startswith("The final training losses differ")
    assert relayouts.startswith("Scale relayouts per layer")
    assert speed.startswith("Speed on a CPU, where FP8 is emulated, says nothing about speed on a ")
    assert warnings_of(folders) == []

    status, output = run_main(*folders)
    page = (tmp_path / "compare" / "compare.html").read_text()
    assert status == 0
    for text in (output, page):
        words = " ".join(text.split())
        assert words.count("Speed on a CPU") == 1
        assert words.index("final training losses") < words.index("Speed on a CPU")
        assert "faster" not in words
        assert "slower" not in words
    assert 'class="card"' not in page
    data = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert data["speed"][0]["verdict"] == "says nothing about GPUs"
    assert data["speed"][0]["ratio"] == pytest.approx(0.5)


def test_speed_is_told(three: list[Path]) -> None:
    said = reading_of(three)
    assert said[:2] == [
        "b was slower than a: 20.0 % fewer tokens/s, outside the noise (ratio 0.800, 95 % interval "
        "0.800 to 0.800).",
        "c was slower than a: 10.0 % fewer tokens/s, outside the noise (ratio 0.900, 95 % interval "
        "0.900 to 0.900).",
    ]
    assert any("Not every path was run more than once" in sentence for sentence in said)
    assert (
        "Scale relayouts per layer, forward and backward: a 0 and 0, b 5 and 3, c 2 and 1." in said
    )
    assert any("b and c have the same training loss, to the last bit" in s for s in said)
    assert not any("a and b have the same" in sentence for sentence in said)


def test_gap_on_few_steps_is_not_called_a_finding(three: list[Path]) -> None:
    (told,) = (s for s in reading_of(three) if "final training losses" in s)
    assert told.endswith("too few logged steps to tell it from noise: b +1.000 %, c +1.000 %.")


def test_without_environment_the_device_is_unknown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", "bf16", device=None)
    assert read_run(folder).device is None
    assert run_main(folder)[0] == 0
    cpu = write_run(tmp_path / "b", "bf16", device=None, config={"train": {"device": "cpu"}})
    assert read_run(cpu).device == "cpu"


class Page(HTMLParser):
    """Collects what a browser would load, and checks that every tag is closed."""

    void = ("meta", "br", "link", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        self.loads += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#")
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_and_picture(three: list[Path]) -> None:
    status, output = run_main(*three)
    out = three[0].parent / "compare"
    assert status == 0
    for text in ("fp8_baseline", "+1.000 %", "0.800x", "compare.html"):
        assert text in output
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")

    text = (out / "compare.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    # The links to what it was made from, and nothing else, lead out of the page.
    files = ("config.yaml", "metrics.jsonl", "environment.json")
    assert page.loads == [f"../{name}/{file}" for name in "abc" for file in files]
    assert all((out / link).exists() for link in page.loads)
    # Vega could fetch data; that nothing does, the policy sees to (and test_page.py that it holds).
    assert "default-src 'none'" in text
    without_library = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert len(without_library) < 100_000 < len(text)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttp|import\(", without_library)
    for color in ("#767676", "#d55e00", "#0072b2"):
        assert color in text.lower()
    for expected in ("prefers-color-scheme: dark", "width=device-width", "Training loss", "tokens"):
        assert expected in text
    assert "abc123" in text


def test_names_are_escaped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a<b>&[red]", "bf16", config={"run": {"name": "a"}})
    status, output = run_main(folder)
    page = (tmp_path / "compare" / "compare.html").read_text()
    assert status == 0
    assert "a<b>" not in page
    assert "a&lt;b&gt;&amp;[red]" in page
    assert "[red]" in output


def test_out_folder(three: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "some" / "where"
    assert run_main(*three, "--out", out)[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["compare.html", "compare.json", "compare.png"]


def test_runs_of_one_name_keep_apart(tmp_path: Path) -> None:
    first = write_run(tmp_path / "x" / "a", "bf16")
    second = write_run(tmp_path / "y" / "a", "bf16")
    names = [run.name for run in read_runs([first, second])]
    assert names == [str(first), str(second)]
    assert run_main(first, second)[0] == 0
    assert (tmp_path / "compare" / "compare.html").exists()


def test_row_being_written_is_left_out(three: list[Path]) -> None:
    with (three[0] / "metrics.jsonl").open("a") as file:
        file.write('{"progress/step": 210, "loss/tr')
    assert len(read_run(three[0]).rows) == 20


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "no run folder"),
        (lambda d: (d / "config.yaml").unlink(), "config.yaml"),
        (lambda d: (d / "config.yaml").write_text("moe: 3"), "is not a run"),
        (lambda d: (d / "metrics.jsonl").unlink(), "metrics.jsonl: No such file"),
        (lambda d: (d / "metrics.jsonl").write_text(""), "no logged step"),
        (lambda d: (d / "metrics.jsonl").write_text('{"a": 1}\n{"a": 1}\n'), "line 1"),
    ],
)
def test_bad_input_is_one_line(
    three: list[Path], capsys: pytest.CaptureFixture[str], damage: Any, says: str
) -> None:
    damage(three[1])
    assert run_main(*three)[0] == 2
    error = capsys.readouterr().err
    assert says in error
    assert str(three[1]) in error
    assert error.count("\n") == 1
    assert not (three[0].parent / "compare").exists()


def test_group_is_found(three: list[Path], tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "d", "bf16", config={"run": {"group": "g"}})
    write_run(tmp_path / "runs" / "deeper" / "e", "fp8_direct", config={"run": {"group": "g"}})
    (tmp_path / "runs" / "just-started").mkdir()
    (tmp_path / "runs" / "just-started" / "metrics.jsonl").touch()
    assert run_main("--group", "g", "--runs", tmp_path / "runs", "--out", tmp_path / "o")[0] == 0
    data = json.loads((tmp_path / "o" / "compare.json").read_text())
    assert [row["run"] for row in data["rows"]] == ["d", "e"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "which runs? give run folders, or --group NAME"),
        (["--group", "x"], "no run of group x below"),
        (["--group", "x", "a-folder"], "give run folders or --group x, not both"),
    ],
)
def test_no_runs_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run_main(*arguments, "--runs", tmp_path)[0] == 2
    error = capsys.readouterr().err
    assert error.startswith(f"compare: {says}")
    assert error.count("\n") == 1


def test_runs_without_a_group_leave_no_place_for_its_folder(
    three: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(*three, "--runs", "elsewhere")[0] == 2
    assert "--runs elsewhere is where a --group is looked for" in capsys.readouterr().err


def test_a_run_is_no_repeat_of_itself(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "newest"
    link.symlink_to(three[0])
    for again in (three[0], link):
        assert run_main(*three, again)[0] == 2
        assert f"{three[0]} and {again} are one run" in capsys.readouterr().err


def test_what_cannot_be_written_is_one_line(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o" / "compare.html").mkdir(parents=True)
    assert run_main(*three, "--out", tmp_path / "o")[0] == 2
    error = capsys.readouterr().err
    assert "compare.html cannot be written: Is a directory" in error
    assert error.count("\n") == 1
    assert not [*tmp_path.glob("o/*.unfinished")]


def test_a_group_is_read_once(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(folder: Path) -> Run:
        read.append(folder)
        return read_run(folder)

    monkeypatch.setattr("scripts.compare.runs.read_run", counted)
    group = read_run(three[0]).config.run.group
    assert group is not None
    found = find_group(three[0].parent, group)
    assert len(found) == 3
    assert [run.folder for run in found] == read


def test_json_has_the_ratios(three: list[Path]) -> None:
    run_main(*three)
    data = json.loads((three[0].parent / "compare" / "compare.json").read_text())
    assert data["baseline"] == "a"
    assert data["speed"][0] == {
        "arm": "b",
        "runs": ["b"],
        "ratio": 0.8,
        "interval": [0.8, 0.8],
        "verdict": "slower",
    }
    assert data["rows"][1]["folder"] == str(three[1])


def test_json_tells_which_runs_are_repeats_and_their_load_over_time(tmp_path: Path) -> None:
    def one(seed: int, bias: bool) -> Path:
        keys: dict[str, dict[str, Any]]
        keys = {"moe": {"expert_bias": bias}, "train": {"seed": seed}}
        load = {"moe/max_expert_load": 1.5 + seed, "moe/load_entropy": 0.5}
        return write_run(tmp_path / f"{bias}-{seed}", "bf16", metrics=load, config=keys)

    run_main(*(one(seed, bias) for bias in (False, True) for seed in (1, 2)))
    rows = json.loads((tmp_path / "compare" / "compare.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["False-1"] * 2 + ["True-1"] * 2
    assert [row["differs"] for row in rows] == [
        {"moe.expert_bias": bias} for bias in ("False", "False", "True", "True")
    ]
    assert rows[1]["moe/max_expert_load"] == [3.5] * len(STEPS)
    assert rows[1]["moe/load_entropy"] == [0.5] * len(STEPS)
    assert (rows[1]["final busiest expert / mean"], rows[1]["final load entropy"]) == (
        "3.50",
        "0.500",
    )


def test_the_busiest_expert_in_the_middle_at_worst_and_at_the_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", "bf16", metrics={"moe/max_expert_load": 4.0})
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for place, load in ((-2, 1.0), (-1, 6.0)):
        lines[place] = lines[place].replace("4.0", str(load))
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    found = table_of([folder])
    assert found["busiest expert / mean"] == ["4.00"]
    assert found["worst busiest expert / mean"] == ["6.00"]
    assert found["final busiest expert / mean"] == ["3.50"]


def test_different_code_is_named(three: list[Path]) -> None:
    path = three[1] / "environment.json"
    path.write_text(path.read_text().replace("abc123", "def456"))
    (warning,) = warnings_of(three)
    assert warning == ("The runs were made with different code: commit abc123 (a, c), def456 (b).")


def test_many_runs_that_agree_are_counted(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, "bf16") for name in "acdefg"]
    folders[1:1] = [write_run(tmp_path / "b", "bf16", config={"optim": {"lr": 2e-3}})]
    (warning,) = warnings_of(folders)
    assert warning.endswith("optim.lr is 0.002 (b), 0.001 (the 6 others).")


def test_unknown_baseline_is_one_line(
    three: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(*three, "--baseline", "z")[0] == 2
    assert capsys.readouterr().err == "compare: --baseline z is none of the runs: a, b, c\n"


def test_a_stalled_step_is_not_the_breakdown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", "bf16")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row, other in zip(rows, (10.0, 800.0, 12.0, 11.0), strict=False):
        row |= {"time/combine_ms": 5.0, "time/other_ms": other, "time/profiled_step_ms": other + 5}
    rows[7]["time/data_ms"] = 1.0  # not profiled
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(folder)
    assert step_parts(run) == {"time/combine_ms": 5.0, "time/other_ms": 11.5}
    assert profiled_rows(run)[1] == 4
    assert step_parts(replace(run, rows=rows[4:])) == {}


EVIL = "<img src=x onerror=alert(1)>\"'& {x}"


def test_no_value_of_a_run_is_html(tmp_path: Path) -> None:
    """Whatever a run's files hold, and whatever its folder is called."""
    run = {"name": "a", "group": EVIL}
    speed = {"throughput/tokens_per_sec": 5.0}
    folders = [
        write_run(tmp_path / "runs" / name, path, metrics=speed, config={"run": run})
        for name, path in ((f"a{EVIL}", "bf16"), ("$x$[b]", "fp8_direct"))
    ]
    environment = json.loads((folders[0] / "environment.json").read_text())
    environment |= {"commit": EVIL, "device_name": EVIL, "world_size": EVIL}
    environment["versions"] = {EVIL: EVIL}
    (folders[0] / "environment.json").write_text(json.dumps(environment))
    # Each value in a row that is right otherwise.
    good = [[1.0, 1.0]]
    loads: list[tuple[object, object]] = [(10, [[1.0, EVIL]]), (10, good), (10, [[]]), (10, EVIL)]
    for step, load in (*loads, (EVIL, good)):
        row = {"progress/step": step, "moe/expert_load": load}
        (folders[0] / "routing.jsonl").write_text(json.dumps(row) + "\n")
        status, output = run_main(*folders, "--out", tmp_path / "out")
        assert status == 0
        assert "$x$[b]" in output
        page = (tmp_path / "out" / "compare.html").read_text()
        parsed = Page()
        parsed.feed(page)
        assert "section" in parsed.tags
        assert "img" not in parsed.tags
        assert ('id="routing"' in page) == (load == good and step == 10), (load, step)


def test_a_row_that_is_no_numbers_is_bad_input(tmp_path: Path, capsys: Any) -> None:
    folder = write_run(tmp_path / "a", "bf16")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for row in ({"progress/step": EVIL}, {"progress/step": 1, "loss/train": EVIL}, [1], 5):
        (folder / "metrics.jsonl").write_text("\n".join([json.dumps(row), *lines]) + "\n")
        assert run_main(folder)[0] == 2
        assert "metrics.jsonl line 1 is not a row of metrics" in capsys.readouterr().err


def test_templates_escape_by_default() -> None:
    assert fill("<b>{x}</b>", x="<i>") == "<b>&lt;i&gt;</b>"
    assert fill('<b title="{x}">', x="\"'") == '<b title="&quot;&#x27;">'
    assert fill("{x}", x=fill("<i>{y:.1f}</i>", y=1)) == "<i>1.0</i>"
    assert fill("{x:>5}", x="<") == "    &lt;"
    assert join(["<", Html("<br>")], Html("&")) == "&lt;&<br>"


def test_runs_that_dropped_rows_computed_another_function(tmp_path: Path) -> None:
    limited = {"moe": {"capacity": 1.25}}
    folders = [
        write_run(tmp_path / name, path, metrics={"moe/dropped_rows": rows}, config=limited)
        for name, path, rows in (("a", "bf16", 3.0), ("b", "fp8_baseline", 0.0))
    ]
    (warning,) = warnings_of(folders)
    assert (
        "computed different functions: with moe.capacity=1.25 a (bf16) dropped up to 3 " in warning
    )
    assert "rows a step, b (fp8_baseline) none. A number is another function than auto" in warning
    folders[0] = write_run(
        tmp_path / "c", "bf16", metrics={"moe/dropped_rows": 0.0}, config=limited
    )
    assert warnings_of(folders) == []


@pytest.mark.parametrize(
    ("device", "dtype", "says"),
    [
        ("cpu", "auto", ["fp32", "fp32, FP8 emulated"]),
        ("cpu", "bf16", ["bf16", "bf16, FP8 emulated"]),
        ("cuda", "auto", ["bf16", "bf16"]),
        (None, "auto", ["not known", "not known"]),
    ],
)
def test_what_was_computed_in_is_said(
    tmp_path: Path, device: str | None, dtype: str, says: list[str]
) -> None:
    config = {"train": {"dtype": dtype}}
    folders = [
        write_run(tmp_path / name, path, device=device, config=config)
        for name, path in (("a", "bf16"), ("b", "fp8_compact"))
    ]
    assert table_of(folders)["computed in"] == says


def test_a_terminal_that_is_not_utf_8(three: list[Path]) -> None:
    command = [sys.executable, "-m", "scripts.compare", *map(str, three)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compare.html" in done.stdout


def test_steps_that_were_repeated_or_waited_are_counted(tmp_path: Path) -> None:
    counted = {"moe/redone_steps": 2.0, "moe/waited_steps": 0.0}
    folder = write_run(tmp_path / "a", "bf16", metrics=counted)
    other = write_run(tmp_path / "b", "fp8_direct")
    lines = table_of([folder, other])
    logged = len(read_runs([folder])[0].series("moe/redone_steps"))
    assert lines["repeated steps"] == [str(2 * logged), ABSENT]
    assert lines["steps that waited"] == ["0", ABSENT]


def test_values_that_train_alike_are_said_to(tmp_path: Path) -> None:
    capacities = (None, "auto", 1.25)
    folders = [
        write_run(tmp_path / str(value), "bf16", config={"moe": {"capacity": value}})
        for value in capacities
    ]
    (said,) = [line for line in warnings_of(folders[:2]) if "moe.capacity" in line]
    assert said.endswith("None (None), auto (auto), which train to the same bits.")
    (said,) = [line for line in warnings_of(folders[1:]) if "moe.capacity is" in line]
    assert "same bits" not in said
