"""The training benchmark on a CPU: its file, its order, and stacks that fail. Peers need GPUs."""

import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from scripts.bench import results, stacks
from scripts.bench.measure import __main__ as measure
from scripts.bench.measure import window
from scripts.bench.measure.window import Window
from scripts.bench.stacks import inputs, ours
from scripts.bench.stacks.spec import config_of, parse, parse_all
from scripts.bench.train import __main__ as train
from scripts.bench.train import process, sitting
from scripts.bench.train import rows as train_rows
from tests.support.ranks import _run, run_ranks
from tests.support.tiny import TINY_MODEL
from train import parallel
from train.config import load
from train.metrics import flops

TINY = [*TINY_MODEL, "model.num_layers=1"]
SPREADS = ("step_ms", "single_step_ms", "tokens_per_sec_per_gpu", "tflops_per_gpu")


def measuring(rank: int, argv: list[str]) -> int:
    return measure.main(argv)


def failing(rank: int, argv: list[str]) -> int:
    """Rank 1 runs out of memory when it builds a stack at micro-batch 4, and rank 0 does not."""
    real = stacks.build

    def build(spec, config, ranks):
        if config.train.micro_batch == 4 and rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 TiB")
        return real(spec, config, ranks)

    stacks.build = build
    return measure.main(argv)


def failing_for_good(rank: int, argv: list[str]) -> int:
    """Rank 1's GPU fails in a step, and then rank 0 misses it in that step."""

    def step(self, batches):
        if rank == 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        dist.barrier()

    ours.Ours.step = step  # type: ignore[method-assign, assignment]
    return measure.main(argv)


class Uneven:
    """A stack whose step takes rank 1 longer; no rank waits for another."""

    def __init__(self, rank: int) -> None:
        self.seconds = 0.01 + 0.05 * rank
        self.dispatch, self.description = "", ""
        self.model = nn.Module()
        self.done = 0

    def step(self, batches) -> torch.Tensor:
        time.sleep(self.seconds)
        self.done += 1
        return torch.tensor(self.seconds / self.done)

    def dropped_rows(self) -> int:
        return 2

    def redone_steps(self) -> int:
        return 3

    def waited_steps(self) -> int:
        return 1

    def room(self) -> float:
        return 1.25

    def close(self) -> None: ...


def measured(rank: int) -> Window:
    ranks: Any = SimpleNamespace(device=torch.device("cpu"))
    batches: Any = [None]
    return window.measure(Uneven(rank), batches, ranks, warmup=1, steps=3)


def test_the_slowest_rank_counts():
    windows = run_ranks(2, measured)
    assert windows[0] == windows[1]
    assert windows[0].step_ms >= 60
    assert min(windows[0].single_step_ms) >= 60
    assert windows[0].first_loss == pytest.approx(0.07), "the ranks' shares add up"
    assert windows[0].final_loss == pytest.approx(0.07 / 4)
    assert windows[0].dropped_rows == 4, "of all ranks"
    assert (windows[0].redone_steps, windows[0].waited_steps, windows[0].room) == (3, 1, 1.25)


class Noting(Uneven):
    """Writes down what happens."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.events: list[str] = []

    def step(self, batches) -> torch.Tensor:
        self.events.append("step")
        return super().step(batches)

    def dropped_rows(self) -> int:
        self.events.append("warm" if "warm" not in self.events else "timed")
        return super().dropped_rows()


def noted(rank: int) -> list[str]:
    ranks: Any = SimpleNamespace(device=torch.device("cpu"))
    batches: Any = [None]
    stack = Noting(rank)
    window.measure(stack, batches, ranks, 3, 2, quiet=lambda: stack.events.append("quiet"))
    return stack.events


def test_the_wait_for_a_quiet_host_comes_between_the_first_step_and_the_others():
    """Kernels are compiled in the first; the others warm up what was idle meanwhile."""
    (events,) = run_ranks(1, noted)
    first, others = ["step", "quiet"], ["step", "step"]
    assert events[:8] == [*first, *others, "warm", "step", "step", "timed"]


def dropping(rank: int, steps: list[int]) -> list[int]:
    """The rows dropped, as a stack says that is asked after each number of steps."""
    keys = [*TINY[1:], "train.global_batch=16"]
    config = config_of(parse("fp8_direct"), TINY[0], keys, "balanced", 8)
    ranks = parallel.start("cpu", 2, config.train.seed, timeout_s=60)
    inputs.seed_everything(config, ranks)
    stack = ours.Ours(config, ranks)
    # Not by the config: a CPU ignores a number.
    ours.use_runtime(stack.model, replace(stack.model.runtime, capacity=0.25))
    queue = itertools.cycle(inputs.batches(config, ranks, "balanced", 1))
    found = []
    for count in steps:
        for _ in range(count):
            stack.step(queue)
        found.append(stack.dropped_rows())
    parallel.stop()
    return found


def test_rows_dropped_in_any_step_count():
    for one_by_one, together in zip(
        _run(2, dropping, ([1, 1, 1],), 120), _run(2, dropping, ([3, 0],), 120), strict=True
    ):
        assert all(one_by_one)
        assert together == [sum(one_by_one), 0]


def run(
    tmp_path: Path, stack: str, sizes: str, target=measuring, *more: str, code: int = 0
) -> list[dict]:
    out = tmp_path / "measured.json"
    argv = [TINY[0], stack, *TINY[1:], "--out", str(out), "--warmup", "1", "--steps", "2"]
    argv += ["--micro-batches", sizes, *more]
    assert _run(2, target, (argv,), 180) == [code, code]
    report = json.loads(out.read_text())
    assert set(report) == {"machine", "versions", "commit", "gpus", "results"}
    assert report["machine"]["devices"] == 2
    return report["results"]


@pytest.mark.slow
def test_a_stack_is_measured_at_every_micro_batch(tmp_path, capfd):
    found = run(tmp_path, "fp8_baseline", "2,4")
    assert [one["micro_batch"] for one in found] == [2, 4]
    for one in found:
        assert (one["global_batch"], one["dispatch"], one["dropped_rows"]) == (8, "all_to_all", 0)
        assert one["peak_allocated_gib"] is None
        assert one["step_joules"] is None
        assert len(one["single_step_ms"]) == 2
        assert 5 < one["final_loss"] < 7, "random tokens: near ln 320 = 5.77"
        assert 5 < one["first_loss"] != one["final_loss"]
    (other,) = run(tmp_path, "fp8_baseline:triton", "2")
    assert other["final_loss"] == found[0]["final_loss"], "not the same weights, data and routing"
    (bf16,) = run(tmp_path, "bf16", "2")
    assert bf16["final_loss"] != other["final_loss"]
    assert "fp8_baseline:triton  micro-batch 2: " in capfd.readouterr().out


@pytest.mark.parametrize("told", [False, True])
def test_a_micro_batch_that_fails_on_one_rank_leaves_the_others_their_turn(tmp_path, told):
    file = tmp_path / "failure"
    more = ["--failure", str(file)] if told else []
    failed, measured = run(tmp_path, "bf16", "4,2", failing, *more)
    assert not file.exists(), "all ranks know"
    assert failed["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 TiB"
    assert "step_ms" not in failed
    assert measured["micro_batch"] == 2
    assert measured["step_ms"] > 0


def test_the_first_failure_is_the_one_that_is_reported(tmp_path):
    file = tmp_path / "failure"
    (found,) = run(tmp_path, "bf16", "4", failing_for_good, "--failure", str(file), code=1)
    why = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert found["error"] == why, "not what rank 0 met"
    assert file.read_text().splitlines()[0] == why


def test_bad_data_is_told(tmp_path):
    file, out = tmp_path / "failure", tmp_path / "measured.json"
    argv = [*TINY, "--out", str(out), "--failure", str(file), "--routing", "natural"]
    argv = [argv[0], "bf16", *argv[1:], f"data.path={tmp_path / 'nowhere'}"]
    assert _run(2, measuring, (argv,), 180) == [2, 2]
    assert file.read_text().startswith(f"ConfigError: data.path={tmp_path / 'nowhere'}")


class Machine:
    """Instead of processes: what each would find, and in which order they were started."""

    def __init__(self, monkeypatch, speeds: dict[str, dict[int, float | str]]) -> None:
        """speeds: seconds a step of each stack and micro-batch, or the error that it ends with."""
        self.started: list[tuple[str, str, list[int]]] = []
        self.speeds = speeds
        self.left: set[Planned] = set()
        self.processes = 0
        monkeypatch.setattr(sitting, "Process", lambda task, arguments: Planned(self, task))

    def measure(self, task: process.Task) -> tuple[dict[str, Any], str]:
        self.started.append((str(task.spec), task.routing, list(task.sizes)))
        found = []
        for size in task.sizes:
            seconds = self.speeds[str(task.spec)][size]
            one: dict[str, Any] = {"micro_batch": size, "global_batch": 8, "dispatch": "none",
                                   "warmup_steps": task.warmup}  # fmt: skip
            if isinstance(seconds, str):
                one["error"] = seconds
            else:
                one |= Window(seconds * 1e3, [seconds * 1e3] * task.steps, None, 6.0, 5.0).figures()
            found.append(one)
        origin = {"machine": {"device_name": "a GPU"}, "versions": {}, "commit": "abc"}
        return {**origin, "results": found}, "exit code 0"


class Planned:
    """Stands for one process."""

    def __init__(self, machine: Machine, task: process.Task) -> None:
        self.machine, self.task = machine, task
        machine.left.add(self)
        machine.processes += 1

    def measure(self, ahead: "Planned | None" = None) -> tuple[dict[str, Any], str]:
        assert self.machine.left == {self} | {ahead} - {None}, "what is ahead goes unseen"
        self.end()
        return self.machine.measure(self.task)

    def end(self) -> None:
        self.machine.left.discard(self)


def plan(tmp_path: Path, *argv: str) -> dict:
    keys = [TINY[0], *TINY[1:], "--gpus", "2", "--out", str(tmp_path), *argv]
    assert train.main(keys) == 0
    return json.loads((tmp_path / "train_demo_cpu.json").read_text())


def test_each_is_screened_and_then_repeated_at_its_best(tmp_path, monkeypatch, capsys):
    machine = Machine(monkeypatch, {
        "bf16": {2: 0.2, 4: 0.1}, "fp8_compact": {2: 0.1, 4: 0.3},
        "fp8_direct": {2: 0.1, 4: "OutOfMemoryError: no"}, "fp8_baseline": {2: "no", 4: "no"},
    })  # fmt: skip
    names = ",".join(machine.speeds)
    report = plan(tmp_path, "--stacks", names, "--screen", "2,4", "--repeats", "2",
                  "--steps", "3")  # fmt: skip
    screened, repeated = machine.started[:4], machine.started[4:]
    assert screened == [(name, "balanced", [2, 4]) for name in machine.speeds]
    order = [("bf16", [4]), ("fp8_compact", [2]), ("fp8_direct", [2])]
    assert [(name, sizes) for name, _, sizes in repeated] == [*order, *order[::-1]]
    config = load(TINY[0], TINY[1:])
    count = flops.count(config.model, config.moe).flops_per_token
    rows = report["rows"]
    assert [row["path"] for row in rows] == ["bf16", "fp8_compact", "fp8_direct"]
    for row, seconds, size in zip(rows, (0.1, 0.1, 0.1), (4, 2, 2), strict=True):
        assert (row["stack"], row["gpus"], row["routing"]) == ("ours", 2, "balanced")
        assert (row["repeats"], row["micro_batch"], row["dropped_rows"]) == (2, size, 0)
        for name in SPREADS:
            assert set(row[name]) == {"median", "min", "max"}
        # 8 sequences of 32 tokens a step, half of them on each rank.
        speed = row["tokens_per_sec_per_gpu"]["median"]
        assert speed == pytest.approx(128 / seconds)
        assert row["tflops_per_gpu"]["min"] == pytest.approx(speed * count / 1e12)
        assert row["seconds_per_mtoken"]["max"] == pytest.approx(seconds / 256 * 1e6)
        assert "mfu" not in row, "the peak of this GPU is not known"
    errors = [row.get("error") for row in report["screening"]]
    assert errors == [None, None, None, None, None, "OutOfMemoryError: no", "no", "no"]
    assert "fp8_direct" in capsys.readouterr().out


def test_it_goes_on_where_it_stopped_and_measures_the_anchor_again(tmp_path, monkeypatch):
    speeds: dict[str, dict[int, float | str]] = {
        "bf16": {2: 0.2, 4: "no"}, "fp8_compact": {2: 0.1, 4: "no"}
    }  # fmt: skip
    argv = ("--stacks", "bf16,fp8_compact", "--anchors", "bf16", "--screen", "2,4",
            "--repeats", "2")  # fmt: skip
    first = Machine(monkeypatch, speeds)
    first_argv = (*argv, "--ahead")
    over = iter([False, False, False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(sitting.Sitting, "is_over", lambda _: next(over))
        report = plan(tmp_path, *first_argv, "--sitting", "monday")
    assert not first.left, "a process that was started ahead is left behind"
    assert [name for name, _, _ in first.started] == ["bf16", "fp8_compact", "bf16", "fp8_compact"]
    assert [row["repeats"] for row in report["rows"]] == [1, 1]

    second = Machine(monkeypatch, speeds)
    report = plan(tmp_path, *argv, "--sitting", "tuesday")
    assert [name for name, _, _ in second.started] == [
        "bf16", "fp8_compact", "fp8_compact", "bf16",
    ]  # fmt: skip
    rows = [(row["path"], row["sitting"], row["repeats"]) for row in report["rows"]]
    assert rows == [("bf16", "monday", 1), ("fp8_compact", "monday", 1),
                    ("bf16", "tuesday", 2), ("fp8_compact", "tuesday", 2)]  # fmt: skip
    assert set(report["sittings"]) == {"monday", "tuesday"}

    path = tmp_path / "train_demo_cpu.json"
    older = json.loads(path.read_text())
    del older["config"]["model"]["init_from"]  # a key that the version of then did not have
    path.write_text(json.dumps(older))
    third = Machine(monkeypatch, speeds)
    plan(tmp_path, *argv, "--sitting", "wednesday")
    assert not third.started, "all is there"
    other = [TINY[0], *TINY[1:], "--gpus", "2", "--out", str(tmp_path), *argv, "model.num_layers=2"]
    assert train.main(other) == 2, "another config's rows are mixed with these"


def test_on_the_same_machine_the_last_sitting_continues(tmp_path, monkeypatch):
    """As `stopped; the same command continues` says, whatever the time is."""
    speeds: dict[str, dict[int, float | str]] = {"bf16": {4: 0.2}, "fp8_compact": {4: 0.1}}
    argv = ("--screen", "4", "--repeats", "2", "--stacks")
    times = iter(datetime(2026, 11, 27, 12, minute) for minute in range(60))
    monkeypatch.setattr(sitting, "datetime", SimpleNamespace(now=lambda: next(times)))

    def measured(*stacks: str) -> list[tuple[str, str, int]]:
        Machine(monkeypatch, speeds)
        rows = plan(tmp_path, *argv, ",".join(stacks))["rows"]
        return [(row["path"], row["sitting"], row["repeats"]) for row in rows]

    first = "2026-11-27 12:00"
    assert measured("bf16") == [("bf16", first, 2)]
    monkeypatch.setattr(sitting, "commit", lambda: "abc")
    one = measured("bf16", "fp8_compact")
    assert one == [("bf16", first, 2), ("fp8_compact", first, 2)]
    monkeypatch.setattr(sitting, "boot", lambda: "another")
    speeds["fp8_direct"] = {4: 0.1}
    assert measured("fp8_direct") == [*one, ("fp8_direct", "2026-11-27 12:01", 2)]
    monkeypatch.setattr(sitting, "commit", lambda: "another")
    speeds["fp8_baseline"] = {4: 0.1}
    assert measured("fp8_baseline")[-1] == ("fp8_baseline", "2026-11-27 12:02", 2)


def test_one_long_step_does_not_choose_the_micro_batch():
    """As where a kernel is compiled in it, which happens once on a machine. Steps that are repeated
    for lack of room come again and again, and count."""
    spec = parse("bf16")

    def best(steps_of: dict[int, list[float]]) -> int | None:
        rows: list[Any] = []
        for size, steps in steps_of.items():
            key = {"routing": "balanced", "gpus": 2, "micro_batch": size, "sitting": "monday"}
            row = train_rows.row_of(rows, {**spec.columns(), **key, "global_batch": 2 * size})
            found = Window(sum(steps) / len(steps), steps, None, 6.0, 5.0).figures()
            train_rows.add(row, found, load(TINY_MODEL[0], TINY_MODEL[1:]), "a GPU")
        return train_rows.best_micro_batch(rows, spec, "balanced", 2)

    assert best({4: [200.0] * 5, 8: [380.0, 380.0, 580.0, 380.0, 380.0], 10: [490.0] * 5}) == 8
    assert best({4: [200.0] * 5, 8: [390.0, 780.0, 390.0, 780.0, 390.0]}) == 4
    assert best({4: [200.0], 8: [390.0]}) == 8


def test_what_an_older_version_screened_still_counts():
    """Those rows have no single steps."""
    path = Path("docs/results/train_qwen3_30b_a3b_8l.json")
    screening = json.loads(path.read_text(encoding="utf-8"))["screening"]
    spec = parse("fp8_direct:prepare")
    rows = [row for row in screening if train_rows.is_of(row, spec, "balanced", 2)]
    assert {row["micro_batch"] for row in rows} == {4, 8}
    assert train_rows.best_micro_batch(screening, spec, "balanced", 2) == 8


def test_a_new_stack_is_measured_beside_the_anchor(tmp_path, monkeypatch):
    speeds: dict[str, dict[int, float | str]] = {
        "bf16": {2: 0.2, 4: "no"}, "fp8_compact": {2: 0.1, 4: "no"}
    }  # fmt: skip
    argv = ("--anchors", "bf16", "--screen", "2,4", "--repeats", "1")
    Machine(monkeypatch, speeds)
    plan(tmp_path, "--stacks", "bf16", *argv, "--sitting", "monday")
    machine = Machine(monkeypatch, speeds)
    report = plan(tmp_path, "--stacks", "bf16,fp8_compact", *argv, "--sitting", "tuesday")
    assert [name for name, _, _ in machine.started] == ["fp8_compact", "fp8_compact", "bf16"]
    assert [row["sitting"] for row in report["rows"]] == ["monday", "tuesday", "tuesday"]


def test_a_process_that_dies_leaves_a_row(tmp_path):
    report = plan(tmp_path, "--stacks", "bf16", "--screen", "2,4", "--repeats", "1",
                  "--process-minutes", "0.001")  # fmt: skip
    row, _ = report["screening"]
    assert row["error"] == "process ended: not done after 0.001 minutes"
    assert not report["rows"]


@pytest.mark.slow
def test_a_process_whose_data_is_bad_leaves_rows_that_say_so(tmp_path):
    report = plan(tmp_path, "--stacks", "bf16", "--screen", "2,4", "--routings", "natural",
                  f"data.path={tmp_path / 'nowhere'}")  # fmt: skip
    first, second = report["screening"]
    assert first["error"].startswith(f"ConfigError: data.path={tmp_path / 'nowhere'}")
    assert second["error"] == "not tried: micro-batch 2 ended the process"
    assert [first["micro_batch"], second["micro_batch"]] == [2, 4]


def test_what_failed_first_is_a_row_like_others_once_it_ran(tmp_path, monkeypatch):
    argv = ("--stacks", "bf16", "--screen", "4", "--repeats", "1", "--sitting", "monday")
    report = plan(tmp_path, *argv, "--process-minutes", "0.001")
    assert "error" in report["rows"][0]
    Machine(monkeypatch, {"bf16": {4: 0.1}})
    (row,) = plan(tmp_path, *argv)["rows"]
    assert "error" not in row
    assert (row["repeats"], row["version"], row["global_batch"]) == (1, "abc", 8)


def test_a_sitting_is_of_one_machine_and_one_commit(tmp_path, monkeypatch, capsys):
    argv = ("--stacks", "bf16", "--screen", "4", "--sitting", "monday", "--repeats")
    Machine(monkeypatch, {"bf16": {4: 0.1}})
    plan(tmp_path, *argv, "1")
    path = tmp_path / "train_demo_cpu.json"
    before = path.read_text().replace('"abc"', '"of last week"')
    path.write_text(before)
    keys = [TINY[0], *TINY[1:], "--gpus", "2", "--out", str(tmp_path), *argv, "2"]
    assert train.main(keys) == 2
    assert "--sitting monday was measured on another machine" in capsys.readouterr().err
    assert path.read_text() == before
    assert train.main([*keys, "--sitting", "tuesday"]) == 0


@pytest.mark.parametrize("screen", ["4", "2,4"])
@pytest.mark.parametrize("option", ["--steps", "--warmup"])
def test_a_row_gets_no_windows_of_another_length(tmp_path, monkeypatch, capsys, option, screen):
    machine = Machine(monkeypatch, {"bf16": {2: 0.2, 4: 0.1}, "fp8_direct": {2: 1, 4: 1}})
    argv = ("--screen", screen, "--steps", "4", "--warmup", "3", "--sitting", "monday")
    plan(tmp_path, "--stacks", "bf16", *argv, "--repeats", "1")
    path = tmp_path / "train_demo_cpu.json"
    before, processes = path.read_text(), machine.processes
    keys = [TINY[0], *TINY[1:], "--gpus", "2", "--out", str(tmp_path), *argv, "--repeats", "2"]
    others = [*keys, "--stacks", "fp8_direct,bf16", option, "7"]
    capsys.readouterr()
    assert train.main(others) == 2
    asked = {"--steps": 4, "--warmup": 3}[option]
    assert capsys.readouterr().err == (
        f"error: {option} 7: in sitting monday, {path} has windows of bf16, balanced, micro-batch "
        f"4, with {option} {asked}; give that, or another --sitting\n"
    )
    assert machine.processes == processes, "something was started"
    assert path.read_text() == before
    assert train.main([*keys, "--stacks", "bf16", option, "7", "--sitting", "tuesday"]) == 0
    assert train.main([*keys, "--stacks", "bf16"]) == 0
    if screen == "4":  # another micro-batch is another row
        others = [*keys, "--stacks", "bf16", option, "7", "--screen", "2"]
        assert train.main(others) == 0


def test_a_row_that_does_not_say_its_warm_up_is_continued(tmp_path, monkeypatch):
    Machine(monkeypatch, {"bf16": {4: 0.1}})
    argv = ("--stacks", "bf16", "--screen", "4", "--sitting", "monday", "--repeats")
    plan(tmp_path, *argv, "1")
    path = tmp_path / "train_demo_cpu.json"
    older = json.loads(path.read_text())
    del older["rows"][0]["warmup_steps"]
    path.write_text(json.dumps(older))
    assert plan(tmp_path, *argv, "2")["rows"][0]["repeats"] == 2


def test_minutes_are_used_as_far_as_the_longest_process_tells(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(sitting, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    machine = Machine(monkeypatch, {"bf16": {4: 0.1}})
    inner = machine.measure

    def measure(task: process.Task) -> tuple[dict[str, Any], str]:
        clock[0] += 10  # seconds
        return inner(task)

    monkeypatch.setattr(machine, "measure", measure)
    argv = ("--stacks", "bf16", "--screen", "4", "--repeats", "20", "--minutes", "2")
    (row,) = plan(tmp_path, *argv)["rows"]
    assert row["repeats"] == 12


def test_minutes_in_which_nothing_could_be_measured_are_refused(tmp_path, capsys):
    argv = [*TINY, "--gpus", "2", "--screen", "2", "--stacks", "bf16", "--out", str(tmp_path)]
    assert train.main([*argv, "--minutes", "1.5"]) == 2
    assert capsys.readouterr().err == (
        "error: --minutes 1.5: 1.5 are for the first process alone; give more\n"
    )


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "soon"])
@pytest.mark.parametrize("flag", ["--minutes", "--process-minutes"])
def test_minutes_are_positive(flag, minutes, capsys, tmp_path):
    with pytest.raises(SystemExit):
        train.main([*TINY, "--gpus", "2", "--out", str(tmp_path), flag, minutes])
    assert f"argument {flag}" in capsys.readouterr().err


def test_where_it_cannot_write_it_measures_nothing(tmp_path, monkeypatch, capsys):
    machine = Machine(monkeypatch, {"bf16": {4: 0.1}})
    file = tmp_path / "file"
    file.write_text("")
    argv = [*TINY, "--gpus", "2", "--stacks", "bf16", "--screen", "4", "--out", str(file)]
    assert train.main(argv) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err
    assert not machine.processes


def test_one_micro_batch_needs_no_screening(tmp_path, monkeypatch):
    machine = Machine(monkeypatch, {"bf16": {4: 0.1}})
    report = plan(tmp_path, "--stacks", "bf16", "--screen", "4", "--repeats", "2")
    assert [sizes for *_, sizes in machine.started] == [[4], [4]]
    assert report["rows"][0]["repeats"] == 2
    assert not report["screening"]


@pytest.mark.slow
def test_the_whole_plan_on_a_cpu(tmp_path):
    report = plan(tmp_path, "--stacks", "bf16", "--screen", "2", "--repeats", "2", "--steps", "1",
                  "--warmup", "1", "--routings", "balanced,natural", "--ahead")  # fmt: skip
    balanced, natural = report["rows"]
    assert (balanced["routing"], natural["routing"]) == ("balanced", "natural")
    assert (balanced["repeats"], natural["repeats"]) == (2, 2)
    assert 5 < balanced["final_loss"] < 7
    assert balanced["final_loss"] != natural["final_loss"]
    assert report["machine"]["devices"] == 2


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--stacks", "stock:bf16"], "stack stock:bf16: stock megatron-core trains on GPUs alone"),
        (["--stacks", "stock:fp16"], "stack stock:fp16: no path 'fp16'; known: bf16, fp8"),
        (["--stacks", "fp8_compact:triton"], "stack fp8_compact:triton: fp8_compact takes no "
                                             "'triton'"),
        (["--stacks", "bf16:per_expert"], "stack bf16:per_expert: bf16 takes no 'per_expert'"),
        (["--stacks", "stock:fp8:fast"], "stack stock:fp8:fast: fp8 takes no 'fast'"),
        (["--stacks", "bf16:prepare:prepare"], "stack bf16:prepare:prepare: 'prepare' is given "
                                               "twice; once does it"),
        (["--stacks", "stock:fp8:grouped:grouped"], "stack stock:fp8:grouped:grouped: 'grouped' is "
                                                    "given twice; once does it"),
        (["--stacks", ""], "no stack is named: nothing to measure"),
        (["--stacks", "bf16,bf16"], "a stack is named twice"),
        (["--stacks", "bf16", "data.document_mask=true"],
         "data.document_mask=true is not measured; leave it out"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(argv, line, capsys, tmp_path):
    keys = [TINY[0], *TINY[1:], "--gpus", "2", "--out", str(tmp_path), *argv]
    assert train.main(keys) == 2
    assert capsys.readouterr().err.strip() == f"error: {line}"
    assert not list(tmp_path.iterdir())


def test_another_configs_file_is_kept(tmp_path, capsys):
    path = tmp_path / "train_demo_cpu.json"
    path.write_text('{"rows": []}')
    argv = [*TINY, "--gpus", "2", "--screen", "2", "--stacks", "bf16", "--out", str(tmp_path)]
    assert train.main(argv) == 2
    assert "is of another config or of another version of this benchmark" in capsys.readouterr().err
    assert path.read_text() == '{"rows": []}'


def test_the_order_favours_nobody():
    specs = parse_all("bf16,fp8_compact,fp8_direct")
    orders = [train.in_turn(specs, repeat) for repeat in range(6)]
    for one in specs:
        for other in specs:
            before = sum(order.index(one) < order.index(other) for order in orders)
            assert one == other or before == 3
        assert {order.index(one) for order in orders} == {0, 1, 2}


def test_intervals_are_students():
    assert results.interval([1.0, 2.0, 3.0]) == {
        "mean": 2.0, "plus_minus": pytest.approx(4.303 / 3**0.5),
    }  # fmt: skip


def test_figures_are_made_of_all_repeats():
    config = load(TINY[0], TINY[1:])
    row: train_rows.TrainingRow = {"windows": [], "gpus": 2, "global_batch": 8}
    for ms, peak, loss in ((500.0, 3.0, 5.0), (100.0, 1.0, 4.0), (200.0, 2.0, float("nan"))):
        window = Window(ms, [ms] * 2, peak, 6.0, loss, step_joules=ms)
        train_rows.add(row, window.figures(), config, "NVIDIA H100 80GB HBM3")
    assert row["step_ms"] == pytest.approx({"median": 200, "min": 100, "max": 500})
    assert row["peak_allocated_gib"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert row["tokens_per_sec_per_gpu"]["median"] == pytest.approx(8 * 32 / 2 / 0.2)
    assert row["mfu"]["max"] == pytest.approx(row["tflops_per_gpu"]["max"] / 989.5, rel=1e-2)
    assert row["joules_per_mtoken"]["median"] == pytest.approx(200 / 256 * 1e6)
    assert row["tflops_per_gpu_mean"]["plus_minus"] > 0
    assert row["first_loss"] == 6.0
    assert row["final_loss"] is None, "JSON has no NaN"


def test_every_field_of_a_row_is_explained():
    files = sorted(Path("docs/results").glob("train_*.json"))
    assert files
    for path in files:
        content = json.loads(path.read_text())
        for row in content["rows"] + content.get("screening", []):
            assert set(row) <= set(train_rows.TrainingRow.__annotations__), path


def test_a_results_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    results.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.gpu
def test_one_gpu_trains_ours_and_the_peer(tmp_path):
    # Processes of their own: they start CUDA, and the tests fork.
    argv = ["--stacks", "bf16,fp8_compact,stock:bf16,stock:fp8", "--steps", "2", "--warmup", "1",
            "--repeats", "1", "--screen", "2", "--out", str(tmp_path), "--gpus", "1",
            "parallel.expert_parallel=1"]  # fmt: skip
    command = [sys.executable, "-m", "scripts.bench.train", "configs/demo_cpu.yaml", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "train_demo_cpu.json").read_text())["rows"]
    assert [row["stack"] for row in rows] == ["ours"] * 2 + ["megatron-core"] * 2
    for row in rows:
        assert "error" not in row, done.stderr
        assert row["peak_allocated_gib"]["min"] > 0
        assert 5 < row["final_loss"] < 7, "random tokens: near ln 320 = 5.77"


def test_nvml_is_loaded_once_a_process(monkeypatch):
    calls: list[str] = []
    fake = SimpleNamespace(
        nvmlInit=lambda: calls.append("init"),
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"GPU-abc": 2500}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    about = SimpleNamespace(uuid="abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    window._nvml_handle.cache_clear()
    ranks: Any = SimpleNamespace(device=torch.device("cuda", 0))
    assert [window._joules(ranks) for _ in range(3)] == [2.5] * 3
    assert calls == ["init"]
    window._nvml_handle.cache_clear()
    on_a_cpu: Any = SimpleNamespace(device=torch.device("cpu"))
    assert window._joules(on_a_cpu) is None


def test_ctrl_c_ends_what_was_started_with_one_line(tmp_path, monkeypatch, capsys):
    machine = Machine(monkeypatch, {"bf16": {4: 0.1}})

    def interrupted(task: process.Task) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "measure", interrupted)
    argv = ["--stacks", "bf16", "--screen", "4", "--repeats", "3", "--ahead"]
    assert train.main([*TINY, "--gpus", "2", "--out", str(tmp_path), *argv]) == 130
    assert capsys.readouterr().err == "stopped; the same command continues\n"
    assert not machine.left, "the one that was started ahead is left behind"


@pytest.mark.parametrize("ahead", [[], ["--ahead"]])
def test_what_failed_is_not_repeated(tmp_path, monkeypatch, ahead):
    machine = Machine(monkeypatch, {"bf16": {4: 0.1}, "fp8_direct": {4: "OutOfMemoryError: no"}})
    argv = ("--stacks", "bf16,fp8_direct", "--screen", "4", "--repeats", "3")
    report = plan(tmp_path, *argv, *ahead)
    names = [name for name, *_ in machine.started]
    assert names == ["bf16", "fp8_direct", "bf16", "bf16"]
    assert not machine.left
    assert machine.processes == 4 + len(ahead), "one too many only where it failed meanwhile"
    assert [row["repeats"] for row in report["rows"]] == [3, 0]
    assert report["rows"][1]["error"] == "OutOfMemoryError: no"
    # Another command tries it again: it may have been the machine.
    machine.speeds["fp8_direct"][4] = 0.2
    report = plan(tmp_path, *argv, "--sitting", "tuesday")
    assert [name for name, *_ in machine.started[4:]] == ["fp8_direct"] * 3
