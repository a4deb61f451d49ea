"""W&B: what it records offline, and that no failure of it reaches the run."""

import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from train.config import Config, load
from train.metrics import tracking
from train.metrics.environment import Environment
from train.metrics.tracking import Tracker, resolve_mode

# Generated code, of whose names a type checker knows nothing.
Record: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]
FAKE_KEY = "0" * 40

ENVIRONMENT: Environment = {
    "device": "cpu",
    "device_name": "a CPU",
    "world_size": 2,
    "versions": {"python": "3.11"},
    "commit": None,
    "allocator": None,
}


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the developer's key nor their settings reach a test."""
    for name in os.environ:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def config() -> Config:
    return Config.model_validate(
        {
            "run": {"name": "trial", "group": "experiment", "tags": ["a", "b"]},
            "model": {
                "num_layers": 1,
                "hidden_size": 128,
                "num_heads": 2,
                "num_kv_heads": 1,
                "vocab_size": 257,
                "seq_len": 16,
            },
            "moe": {"path": "fp8_compact", "num_experts": 4, "top_k": 2, "ffn_hidden_size": 128},
            "optim": {"lr": 1e-3},
            "train": {"steps": 2, "micro_batch": 1},
            "tracking": {"project": "a-project"},
        }
    )


def records(path: Path) -> Iterator[Any]:
    """Read a `.wandb` file: a header of 7 bytes, then LevelDB's log format (32 KiB blocks of
    chunks, each with a checksum, a length and a type: whole, first, middle, last)."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def read_offline_run(run_dir: Path) -> list[Any]:
    """All records, once W&B's own process has written the last: `finish` may return before."""
    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30
    while True:
        found = list(records(path))
        if any(record.HasField("exit") for record in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def test_offline_run_holds_everything(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logged = [
        {"progress/step": 1, "progress/tokens": 32, "loss/train": 5.5, "moe/scale_relayouts": 2.0},
        {"progress/step": 2, "progress/tokens": 64, "loss/train": 4.25, "moe/scale_relayouts": 2.0},
    ]
    tracker = Tracker(config, tmp_path, ENVIRONMENT)
    for row in logged:
        tracker.log(row, step=int(row["progress/step"]))
    tracker.summary({"throughput/tokens_per_sec_median": 123.0})
    assert "scripts/sync.sh" in tracker.describe()
    tracker.finish()

    found = read_offline_run(tmp_path)
    run = next(r.run for r in found if r.HasField("run"))
    assert (run.run_group, run.job_type, run.display_name, run.project) == (
        "experiment",
        "fp8_compact",
        "trial",
        "a-project",
    )
    assert list(run.tags) == ["a", "b"]
    assert run.run_id == (tmp_path / "wandb_id").read_text()
    recorded = {item.key: json.loads(item.value_json) for item in run.config.update}
    expected = {
        **config.model_dump(mode="json"),
        "environment": ENVIRONMENT,
    }
    assert {key: recorded[key] for key in expected} == expected

    history = [
        {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in found
        if r.HasField("history")
    ]
    assert [{k: v for k, v in row.items() if not k.startswith("_")} for row in history] == logged
    assert [row["_step"] for row in history] == [1, 2]
    summary = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for r in found
        if r.HasField("summary")
        for item in r.summary.update
    }
    assert summary["throughput/tokens_per_sec_median"] == 123.0
    axes = {r.metric.glob_name or r.metric.name: r.metric for r in found if r.HasField("metric")}
    assert axes["loss/*"].step_metric == "progress/tokens"
    assert axes["throughput/*"].step_metric == "progress/step"
    assert next(r.exit.exit_code for r in found if r.HasField("exit")) == 0
    output = capfd.readouterr()
    assert "wandb" not in output.out + output.err  # the terminal belongs to the run


VARIABLES = {
    "WANDB_PROJECT": "their-project",
    "WANDB_NAME": "their name",
    "WANDB_RUN_GROUP": "their-group",
    "WANDB_TAGS": "c,d",
}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], ("their-project", "their name", "their-group", ["c", "d"])),
        (
            ["tracking.project=p", "run.name=n", "run.group=g", "run.tags=[t]"],
            ("p", "n", "g", ["t"]),
        ),
    ],
)
def test_variables_of_wandb_win_over_defaults_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overrides: list[str], said: tuple[Any, ...]
) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    given: dict[str, Any] = {}

    def init(**kwargs: Any) -> FakeRun:
        given.update(kwargs)
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    config = load("configs/demo_cpu.yaml", overrides)
    Tracker(config, tmp_path)
    found = (given["project"], given["name"], given["group"], list(given["tags"]))
    assert found == said
    if not overrides:
        assert config.run.name == "demo_cpu-bf16", "the folder's name is not W&B's"


def test_resumed_run_keeps_its_id_and_a_new_one_does_not(
    monkeypatch: pytest.MonkeyPatch, config: Config, tmp_path: Path
) -> None:
    ids: list[str] = []

    def init(**kwargs: Any) -> FakeRun:
        ids.append(kwargs["id"])
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    Tracker(config, tmp_path)
    Tracker(config, tmp_path, resumed=True)
    Tracker(config, tmp_path)
    assert ids[0] == ids[1] != ids[2]
    (tmp_path / "wandb_id").unlink()
    Tracker(config, tmp_path, resumed=True)  # of a run that had no W&B before
    assert len(ids[3]) == 8


class FakeRun(SimpleNamespace):
    """A run in which nothing works but what a test sets."""

    dir = "somewhere/files"
    url = "https://example.org/run"

    def define_metric(self, *args: Any, **kwargs: Any) -> None: ...

    def finish(self, exit_code: int) -> None: ...


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the user reads; W&B's own log goes to its files."""
    return [r.getMessage() for r in caplog.records if r.name == "train.metrics.tracking"]


def boom(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("the network\nis gone")


def test_init_that_raises_leaves_the_training_alone(
    monkeypatch: pytest.MonkeyPatch,
    config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(wandb, "init", boom)
    tracker = Tracker(config, tmp_path)
    tracker.log({"loss/train": 1.0}, step=1)
    tracker.summary({"a": 1})
    tracker.finish(1)
    assert tracker.describe() == "W&B: off"
    (warning,) = warnings(caplog)
    assert "training continues" in warning
    assert "\n" not in warning


def test_unwritable_folder_leaves_the_training_alone(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Tracker(config, tmp_path / "missing").log({"loss/train": 1.0}, step=1)
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("part", ["log", "summary", "finish"])
def test_failure_in_the_middle_is_one_warning(
    monkeypatch: pytest.MonkeyPatch,
    config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    part: str,
) -> None:
    good = {"log": lambda *a, **k: None, "summary": {}, "finish": lambda *a, **k: None}
    bad = SimpleNamespace(update=boom) if part == "summary" else boom
    monkeypatch.setattr(wandb, "init", lambda **kwargs: FakeRun(**{**good, part: bad}))
    tracker = Tracker(config, tmp_path)
    for step in (1, 2):
        tracker.log({"loss/train": 1.0}, step=step)
    tracker.summary({"a": 1})
    tracker.finish()
    tracker.finish()
    assert len(warnings(caplog)) == 1


def test_unreachable_server_leaves_an_offline_run(
    monkeypatch: pytest.MonkeyPatch,
    config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # W&B reads its environment once in a process.
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 2)
    try:
        tracker = Tracker(config, tmp_path)
        tracker.log({"loss/train": 5.5}, step=1)
        tracker.finish()
    finally:
        wandb.teardown()
    (warning,) = warnings(caplog)
    assert "recorded offline" in warning
    assert any(r.HasField("history") for r in read_offline_run(tmp_path))


@pytest.mark.parametrize(
    ("mode", "environment", "key", "resolved"),
    [
        ("auto", None, None, "offline"),
        ("auto", None, FAKE_KEY, "online"),
        ("online", None, None, "offline"),  # W&B would ask for a key
        ("online", None, FAKE_KEY, "online"),
        ("offline", None, FAKE_KEY, "offline"),
        ("disabled", None, FAKE_KEY, "disabled"),
        ("auto", "online", None, "offline"),
        ("auto", "offline", FAKE_KEY, "offline"),
        ("online", "offline", FAKE_KEY, "offline"),
        ("online", "disabled", FAKE_KEY, "disabled"),
        ("offline", "disabled", None, "disabled"),
        ("disabled", "online", FAKE_KEY, "disabled"),
        ("auto", None, "short", "offline"),
    ],
)
def test_mode(
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    environment: str | None,
    key: str | None,
    resolved: str,
) -> None:
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr("builtins.input", boom)
    assert resolve_mode(mode) == resolved


def test_online_without_a_key_says_so(caplog: pytest.LogCaptureFixture) -> None:
    resolve_mode("auto")
    assert warnings(caplog) == []
    resolve_mode("online")
    (warning,) = warnings(caplog)
    assert "no API key" in warning


def test_key_in_netrc_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {FAKE_KEY}\n")
    assert resolve_mode("auto") == "online"


def test_disabled_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, config: Config, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(wandb, "init", boom)
    tracker = Tracker(config, tmp_path)
    tracker.log({"loss/train": 1.0}, step=1)
    tracker.finish()
    assert list(tmp_path.iterdir()) == []
