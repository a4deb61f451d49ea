"""Tables between markers: from files of results, and never out of date in this repository."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import readme_tables

TEXT = "before\n\n<!-- table: {} -->\nold\n<!-- end of table -->\n\nafter\n"


def figure(median: float, spread: float = 0.0) -> dict[str, float]:
    return {"median": median, "min": median - spread, "max": median + spread}


def row(path: str, speed: float, stack: str = "ours", gpus: int = 4) -> dict[str, Any]:
    return {
        "stack": stack,
        "path": path,
        "micro_batch": 8,
        "gpus": gpus,
        "step_ms": figure(4e6 / speed, 1.5),
        "tokens_per_sec_per_gpu": figure(speed),
        "tflops_per_gpu": figure(speed / 100),
        "peak_allocated_gib": figure(60, 2),
    }


def write_results(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    result = {
        "machine": {"device": "cuda", "device_name": "NVIDIA H200", "devices": 4},
        "versions": {"torch": "2.11.0", "python": "3.12"},
        "commit": "abc",
        "config": {},
        "rows": rows,
    }
    (folder / "train_x.json").write_text(json.dumps(result))
    return folder


def run(folder: Path, text: str, *arguments: str) -> tuple[int, str]:
    path = folder / "README.md"
    path.write_text(text)
    results = str(folder / "results")
    status = readme_tables.main([*arguments, "--results", results], [path])
    return status, path.read_text()


def test_the_tables_of_this_repository_are_up_to_date() -> None:
    assert readme_tables.main(["--check"]) == 0


def test_training_table(tmp_path: Path) -> None:
    rows = [row("bf16", 10000), row("fp8_direct", 12500), row("bf16", 9000, "megatron-core")]
    write_results(tmp_path / "results", rows)
    status, text = run(tmp_path, TEXT.format("train_x.json"))
    assert status == 0
    assert text.startswith(
        "before\n\n<!-- table: train_x.json -->\n|  | GPUs | micro-batch | ms a step |"
    )
    assert text.endswith("<!-- end of table -->\n\nafter\n")
    assert "old" not in text
    lines = text.splitlines()
    assert (
        "| `fp8_direct` | 4 | 8 | 320.0 (318.5 to 321.5) | 12,500 | 125 | 62.0 | 1.250 |"
    ) in lines
    assert (
        "| megatron-core, `bf16` | 4 | 8 | 444.4 (442.9 to 445.9) | 9,000 | 90 | 62.0 | 1.000 |"
        in (lines)
    )
    assert any(
        line.startswith("4 x NVIDIA H200; torch 2.11.0; commit abc; [train_x.json](")
        for line in lines
    )
    # A second time nothing changes, and --check agrees; an edited figure is noticed, and kept.
    assert run(tmp_path, text) == (0, text)
    assert run(tmp_path, text, "--check") == (0, text)
    edited = text.replace("12,500", "12,600")
    assert run(tmp_path, edited, "--check") == (1, edited)


def test_what_failed_and_what_was_set_apart(tmp_path: Path) -> None:
    failed = {"stack": "ours", "path": "bf16", "micro_batch": 16, "gpus": 4, "error": "no memory"}
    apart = row("fp8_baseline", 9000) | {"operations": "as fp8_compact"}
    flagged = row("bf16", 8000, "megatron-core") | {"flags": ["fused"]}
    del flagged["peak_allocated_gib"]
    write_results(tmp_path / "results", [failed, row("bf16", 10000), apart, flagged])
    lines = run(tmp_path, TEXT.format("train_x.json"))[1].splitlines()
    assert lines[5] == "| `bf16` | 4 | 16 | no memory | – | – | – | – |"  # noqa: RUF001
    assert lines[7].startswith("| `fp8_baseline`, operations as fp8_compact | 4 | 8 |")
    assert lines[7].endswith("| 0.900 |")
    assert lines[8].startswith("| megatron-core, `bf16`, fused | 4 | 8 |")
    assert lines[8].endswith("| – | – |")  # noqa: RUF001


def test_no_ratio_without_its_bf16(tmp_path: Path) -> None:
    write_results(tmp_path / "results", [row("bf16", 10000, gpus=2), row("fp8_direct", 12500)])
    line = run(tmp_path, TEXT.format("train_x.json"))[1].splitlines()[6]
    assert line.startswith("| `fp8_direct` | 4 |")
    assert line.endswith("| – |")  # noqa: RUF001


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (TEXT.format("none.json"), "none.json: No such file"),
        ("<!-- table: train_x.json -->\n", "has no partner"),
        ("<!-- end of table -->\n", "has no partner"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    write_results(tmp_path / "results", [row("bf16", 1)])
    assert run(tmp_path, text) == (2, text)
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_row_without_a_figure_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = row("bf16", 1)
    del bad["tflops_per_gpu"]
    write_results(tmp_path / "results", [bad])
    assert run(tmp_path, TEXT.format("train_x.json"))[0] == 2
    assert "lacks 'tflops_per_gpu'" in capsys.readouterr().err
