"""Throughput with a clock the test moves, the table of peaks, and the metrics file."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from train.metrics.metrics_file import MetricsFile
from train.metrics.throughput import GIB, Meter, peak_bf16_flops

CPU = torch.device("cpu")


class Clock:
    """Time that passes when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


def make_meter(clock: Clock, warmup_steps: int = 0, peak_flops: float | None = None) -> Meter:
    return Meter(
        flops_per_token=1e9,
        world_size=4,
        device=CPU,
        warmup_steps=warmup_steps,
        peak_flops=peak_flops,
        clock=clock,
    )


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100", None),
        ("NVIDIA H20", None),
        ("AMD Instinct MI300X", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_is_known_or_absent(name: str, tflops: float | None) -> None:
    assert peak_bf16_flops(name) == (None if tflops is None else tflops * 1e12)


def test_throughput_of_an_interval() -> None:
    clock = Clock()
    meter = make_meter(clock, peak_flops=1e12)
    for _ in range(5):
        clock.tick(2.0)
        meter.step(tokens=800, data_seconds=0.5)
    metrics = meter.interval()
    assert metrics["throughput/tokens_per_sec"] == pytest.approx(400)
    assert metrics["throughput/tokens_per_sec_per_gpu"] == pytest.approx(100)
    assert metrics["throughput/tflops_per_gpu"] == pytest.approx(0.1)
    assert metrics["throughput/mfu"] == pytest.approx(0.1)
    assert metrics["time/step_ms"] == pytest.approx(2000)
    assert metrics["time/data_ms"] == pytest.approx(500)


def test_intervals_do_not_leak_into_each_other() -> None:
    clock = Clock()
    meter = make_meter(clock)
    clock.tick(1.0)
    meter.step(100, data_seconds=1.0)
    meter.interval()
    clock.tick(2.0)
    meter.step(100)
    metrics = meter.interval()
    assert metrics["throughput/tokens_per_sec"] == pytest.approx(50)
    assert metrics["time/data_ms"] == 0


def test_no_peak_no_mfu() -> None:
    clock = Clock()
    meter = make_meter(clock)
    clock.tick(1.0)
    meter.step(100)
    assert "throughput/mfu" not in meter.interval()


def test_warmup_steps_are_left_out() -> None:
    clock = Clock()
    meter = make_meter(clock, warmup_steps=3)
    for seconds in (100, 50, 20, 1, 1):
        clock.tick(seconds)
        meter.step(10, data_seconds=seconds / 10)
    metrics = meter.interval()
    assert metrics["time/step_ms"] == pytest.approx(1000)
    assert metrics["throughput/tokens_per_sec"] == pytest.approx(10)
    assert metrics["time/data_ms"] == pytest.approx(100)


def test_interval_inside_the_warmup_has_no_throughput() -> None:
    clock = Clock()
    meter = make_meter(clock, warmup_steps=3)
    for _ in range(2):
        clock.tick(50)
        meter.step(10)
    assert not [k for k in meter.interval() if k.startswith(("throughput/", "time/"))]
    clock.tick(50)
    meter.step(10)
    assert not [k for k in meter.interval() if k.startswith(("throughput/", "time/"))]
    clock.tick(1)
    meter.step(10)
    assert meter.interval()["time/step_ms"] == pytest.approx(1000)


def test_pauses_are_left_out_wherever_they_fall() -> None:
    clock = Clock()
    meter = make_meter(clock, warmup_steps=1)
    clock.tick(9)
    with meter.pause():
        clock.tick(77)  # in the warm-up
    meter.step(10)
    with meter.pause():
        clock.tick(30)  # right after it
    for _ in range(2):
        clock.tick(1)
        meter.step(10)
        with meter.pause():
            clock.tick(60)
    assert meter.interval()["time/step_ms"] == pytest.approx(1000)
    with meter.pause():
        clock.tick(60)  # after logging
    clock.tick(3)
    meter.step(10)
    assert meter.interval()["time/step_ms"] == pytest.approx(3000)


def test_pause_ends_when_its_body_raises() -> None:
    clock = Clock()
    meter = make_meter(clock)

    def failing_validation() -> None:
        with meter.pause():
            clock.tick(60)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing_validation()
    clock.tick(1)
    meter.step(10)
    assert meter.interval()["time/step_ms"] == pytest.approx(1000)


def test_start_sets_the_clock_again() -> None:
    clock = Clock()
    meter = make_meter(clock)
    clock.tick(500)  # building the model
    meter.start()
    clock.tick(1)
    meter.step(10)
    assert meter.interval()["time/step_ms"] == pytest.approx(1000)


def test_cpu_memory_has_its_own_name() -> None:
    metrics = make_meter(Clock()).interval()
    memory = {k: v for k, v in metrics.items() if k.startswith("memory/")}
    assert list(memory) == ["memory/peak_rss_gib"]
    # PyTorch alone takes more than 50 MiB; a wrong unit is off by 1024.
    assert 0.05 < memory["memory/peak_rss_gib"] < 50


def test_summary_is_the_median_over_intervals() -> None:
    clock = Clock()
    meter = make_meter(clock, warmup_steps=1)
    clock.tick(100)
    meter.step(10)
    meter.interval()
    for seconds in (1, 2, 10):
        clock.tick(seconds)
        meter.step(10)
        meter.interval()
    summary = meter.summary()
    assert summary["time/step_ms_median"] == pytest.approx(2000)
    assert summary["throughput/tokens_per_sec_median"] == pytest.approx(5)
    assert summary["memory/peak_rss_gib_max"] > 0


@pytest.mark.gpu
def test_gpu_memory_peak_is_reset() -> None:
    meter = Meter(1e9, world_size=1, device=torch.device("cuda"))
    big = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    del big
    assert meter.interval()["memory/peak_allocated_gib"] >= 1
    second = meter.interval()
    assert second["memory/peak_allocated_gib"] < 1
    assert second["memory/peak_reserved_gib"] >= second["memory/peak_allocated_gib"]


@pytest.mark.gpu
def test_gpu_work_is_waited_for() -> None:
    a = torch.randn(8192, 8192, device="cuda")
    a @ a
    meter = Meter(1e9, world_size=1, device=torch.device("cuda"))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        a @ a
    end.record()
    meter.step(1)  # all of it still queued
    with meter.pause():
        pass
    assert meter.interval()["time/step_ms"] >= begin.elapsed_time(end)


def read(path: Path) -> list[dict[str, float]]:
    def reject(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=reject) for line in path.read_text().splitlines()]


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    rows = [{"progress/step": 1, "loss/train": 2.5}, {"progress/step": 2, "loss/valid": 3.0}]
    for number, row in enumerate(rows, start=1):
        file.write(row)
        assert read(path) == rows[:number]


def test_on_a_full_disk_all_lines_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Disk:
        """Has room for this many bytes; takes a part of what is too much."""

        def __init__(self, file: Any, room: int) -> None:
            self.file, self.name, self.room = file, file.name, room

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

        def close(self) -> None:
            self.file.close()

        def fileno(self) -> int:
            return self.file.fileno()

    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    disk = file._file = Disk(file._file, 5000)  # type: ignore[assignment]
    rows = [{"progress/step": n} | {f"metric_{k}": n * k for k in range(100)} for n in range(31)]
    for row in rows[:-1]:
        file.write(row)
    assert len([r for r in caplog.records if "No space left on device" in r.message]) == 1
    disk.room = 2**30
    file.write(rows[-1])
    file.close()
    assert read(path) == rows


def test_not_finite_becomes_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write({"progress/step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0})
    assert read(tmp_path / "m.jsonl") == [
        {"progress/step": 1, "a": None, "b": None, "c": None, "d": 0.0}
    ]


def test_a_row_needs_its_step(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        MetricsFile(tmp_path / "m.jsonl").write({"loss/train": 1.0})


def test_resume_drops_what_will_be_logged_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    killed = MetricsFile(path)
    for step in (10, 20, 30, 40):
        killed.write({"progress/step": step, "loss/train": 1.0})
    with path.open("a") as file:
        file.write('{"progress/step": 50, "loss')
    resumed = MetricsFile(path, resume_step=20)
    assert [row["progress/step"] for row in read(path)] == [10, 20]
    resumed.write({"progress/step": 30, "loss/train": 2.0})
    assert [row["progress/step"] for row in read(path)] == [10, 20, 30]
    assert read(path)[-1]["loss/train"] == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_resume_the_file_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write({"progress/step": 10})
    MetricsFile(path).write({"progress/step": 5})
    assert read(path) == [{"progress/step": 5}]


def test_crash_while_dropping_lines_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in (10, 20, 30):
        first.write({"progress/step": step})
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(path, resume_step=20)
    monkeypatch.undo()
    assert len(read(path)) == 3
    MetricsFile(path, resume_step=20)
    assert len(read(path)) == 2


@pytest.mark.parametrize("moved", [True, False])
def test_a_metrics_file_that_is_removed_while_it_is_written(tmp_path, caplog, moved):
    """Otherwise later lines would be lost."""
    path = tmp_path / "a" / "metrics.jsonl"
    path.parent.mkdir()
    file = MetricsFile(path)
    file.write({"progress/step": 1})
    if moved:
        path.parent.rename(tmp_path / "b")
    else:
        path.unlink()
        path.parent.rmdir()
    for step in (2, 3):
        file.write({"progress/step": step})
    file.close()
    steps = [json.loads(line)["progress/step"] for line in path.read_text().splitlines()]
    assert steps == [2, 3]
    assert caplog.messages == [
        f"{path} was removed while it was written; it begins again with this step"
    ]


def test_a_metrics_file_whose_folder_is_gone_for_good(tmp_path, caplog):
    path = tmp_path / "a" / "metrics.jsonl"
    path.parent.mkdir()
    file = MetricsFile(path)
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file")
    for step in (1, 2):
        file.write({"progress/step": step})
    (said,) = caplog.messages
    assert "lines wait" in said
    path.parent.unlink()
    file.write({"progress/step": 3})
    file.close()
    assert len(path.read_text().splitlines()) == 3
