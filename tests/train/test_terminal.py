"""The lines that a run prints fit a terminal, and a log file of 100 columns."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from train.metrics import terminal
from train.metrics.terminal import WIDTH, Progress, joined

FACTS = {
    "runs on": "operations by Triton, grouped_mm by cuBLAS 13.6 through TransformerEngine, "
    "grouped_gemm by DeepGEMM; dispatch by DeepEP v1 (not deep_ep_v2: NCCL 2.28.9 is loaded: it "
    "needs 2.30.4 or newer); room for the experts' rows by what was needed lately",
    "data": "the standard library of Python: 799 text file(s), 796 document(s); 96,636 training "
    "and 1,061 validation sequences; tokenizer bytes, 257 tokens",
    "tracking": "",
}
METRICS = {
    "loss/train": 11.6512,
    "loss/valid": 11.8360,
    "optim/grad_norm": 106.80,
    "optim/lr": 6.25e-05,
    "throughput/tokens_per_sec": 1_216_594.0,
    "throughput/tflops_per_gpu": 418.2,
    "throughput/mfu": 0.423,
    "memory/peak_allocated_gib": 101.5,
    "moe/max_expert_load": 13.12,
}


def printed(columns: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that a run of many steps prints on a terminal of that many columns, or into a file."""
    out = io.StringIO()

    def console(**options: Any) -> Console:
        tty = columns is not None
        return Console(file=out, width=columns, force_terminal=tty, no_color=True, **options)

    monkeypatch.setattr(terminal, "Console", console)
    progress = Progress(100_000, 0)
    progress.bar.disable = True
    progress.start({"run": str(folder), **FACTS})
    progress.line(100_000, METRICS)
    progress.finish(METRICS, {"throughput/tokens_per_sec_median": 1e6}, folder)
    return out.getvalue().splitlines()


@pytest.mark.parametrize(
    ("columns", "width"), [(80, 80), (100, 100), (220, WIDTH), (0, WIDTH), (None, WIDTH)]
)
def test_lines_fit_and_lose_nothing(columns, width, monkeypatch):
    lines = printed(columns, Path("runs/a demo/bf16"), monkeypatch)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for value in FACTS.values():
        assert value in text
    assert "tracking" in text
    assert "run runs/a demo/bf16 " in text
    for part in ("loss 11.6512", "valid 11.8360", "tok/s 1,216,594", "MFU 42.3%", "load 13.12"):
        assert any(part in line for line in lines)
    assert "training loss 11.6512, validation loss 11.8360; median 1,000,000 tokens/s" in text


def test_a_path_is_never_broken(monkeypatch):
    folder = Path("/scratch") / ("a folder " * 15) / "bf16"
    lines = printed(80, folder, monkeypatch)
    assert f"run       {folder}" in lines
    assert f"everything is in {folder}:" in lines


def test_parts_are_joined_up_to_the_width():
    assert list(joined(["ab", "cd"], 6)) == ["ab  cd"]
    assert list(joined(["ab", "cd"], 5)) == ["ab", " " * terminal.INDENT + "cd"]
