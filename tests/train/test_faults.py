"""Each fault, provoked: it ends in a run that continues, or in one clear line."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.support.fake_wandb import fake_wandb
from tests.support.faults import hang, hang_with_the_lock, poison, quick_watchdog
from tests.support.ranks import Training, read_metrics, run_train
from tests.support.tiny import TINY, argv, checkpoints, differences, repeated, slow_saves
from train.config import ConfigError, load

LONG = "train.steps=2000"


def logged(run_dir: Path) -> int:
    """The last step in metrics.jsonl, which may be half written."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def has_logged(run_dir: Path, step: int) -> bool:
    return logged(run_dir) >= step


def is_saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("step_*.unfinished"))


def errors(training: Training) -> list[str]:
    log = training.log.read_text()
    assert "Traceback" not in log, log
    return [line for line in log.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_ten_kills(tmp_path):
    """-9 to a random rank at a random moment, five times anywhere and five times in a save. Each
    time the run resumes from the newest checkpoint, and in the end nothing shows that it ever
    happened."""
    chance = random.Random(6)
    keys = argv(tmp_path, "a", LONG, "checkpoint.every=2", "data.workers=1")
    run_dir, lost = tmp_path / "a", []
    for kill in range(10):
        start = max(checkpoints(run_dir), default=0)
        with Training(2, keys, tmp_path / "log") as training:
            training.wait_until(lambda: "start     step" in training.log.read_text())
            begun = logged(run_dir)
            assert begun <= start, "steps that no checkpoint holds were kept"
            training.wait_until(partial(has_logged, run_dir, begun + chance.randint(1, 5)))
            if kill % 2:
                training.wait_until(partial(is_saving, run_dir))
            time.sleep(chance.uniform(0, 0.05 if kill % 2 else 0.15))
            victim = chance.randrange(2)
            training.signal(victim, signal.SIGKILL)
            codes = training.exit_codes()
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] != 0
        assert f"start     step {start} of" in training.log.read_text(), "another one was newest"
        newest = max(checkpoints(run_dir), default=0)
        assert newest >= start
        lost.append(logged(run_dir) - newest)
        # Every second step is saved, and of a save that was under way nothing counts.
        assert 0 <= lost[-1] <= 4, f"kill {kill}: {lost[-1]} steps lost"
    with Training(2, keys, tmp_path / "log") as training:
        training.wait_until(lambda: "start     step" in training.log.read_text())
        last = logged(run_dir) + 3
        training.wait_until(lambda: logged(run_dir) >= last)
    got = repeated(run_dir)
    assert sorted(got) == list(range(1, max(got) + 1))
    assert max(got) > 10

    with Training(2, argv(tmp_path, "whole", LONG), tmp_path / "log") as training:
        training.wait_until(lambda: logged(tmp_path / "whole") >= max(got), timeout=120)
    want = repeated(tmp_path / "whole")
    assert got == {step: want[step] for step in got}
    print(f"10 kills, {max(got)} steps, lost each time: {lost}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for two checkpoints of the tiny model and not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip("a small file system cannot be mounted here: " + made.stderr.decode().strip())
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_during_a_save(small_disk, tmp_path):
    """Training continues, with the checkpoint before; when there is room again it is used."""
    run_dir = small_disk / "a"
    keys = argv(small_disk, "a", LONG, "checkpoint.every=2", "checkpoint.keep=1")
    with Training(2, keys, tmp_path / "log") as training:
        training.wait_until(lambda: checkpoints(run_dir))
        filler = small_disk / "filler"
        fill(filler, leave=100_000)
        said = "was not saved (rank"
        training.wait_until(lambda: said in training.log.read_text())
        kept = checkpoints(run_dir)
        assert len(kept) == 1
        trained = training.log.read_text().count("\nstep ")
        training.wait_until(lambda: training.log.read_text().count("\nstep ") >= trained + 2)
        assert checkpoints(run_dir) == kept, "nothing saved is lost"
        filler.unlink()
        training.wait_until(lambda: checkpoints(run_dir) > kept)
        # At the end there is nothing left to continue with: one line.
        fill(filler, leave=100_000)
        training.signal(0, signal.SIGTERM)
        assert training.exit_codes() == [1, 1]
    warnings = [line for line in training.log.read_text().splitlines() if said in line]
    assert re.fullmatch(
        r"WARNING: the checkpoint of step \d+ was not saved \(rank \d: .*No space left on device.*"
        r"\); the newest is .*step_\d+",
        warnings[0],
    )
    (line,) = set(errors(training))  # each rank says it where no torchrun ends the others
    assert "could not be saved" in line
    assert "free some space and start again" in line
    assert len(checkpoints(run_dir)) == 1
    filler.unlink()
    with Training(2, keys, tmp_path / "log") as training:
        training.wait_until(lambda: "start     step" in training.log.read_text())
    assert f"start     step {max(checkpoints(run_dir))} of" in training.log.read_text()


def fill(path: Path, leave: int) -> None:
    """Fill the disk except for `leave` bytes."""
    with path.open("wb") as file:
        while (room := shutil.disk_usage(path.parent).free - leave) > 4096:
            file.write(b"\0" * room)
            file.flush()


def test_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "pictures").write_text("not a folder")
    keys = ["train.steps=2", "tracking.pictures_every=1"]
    with Training(2, argv(tmp_path, "a", *keys), tmp_path / "log") as training:
        assert training.exit_codes() == [0, 0]
    assert "training continues" in training.log.read_text()
    assert len(read_metrics(tmp_path / "a")) == 2


def test_a_data_worker_that_dies(tmp_path):
    keys = argv(tmp_path, "a", LONG, "checkpoint.every=2", "data.workers=1")
    run_dir = tmp_path / "a"
    with Training(2, keys, tmp_path / "log") as training:
        training.wait_until(lambda: checkpoints(run_dir))
        own = training.processes[1].pid
        children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        (worker,) = [
            c for c in children if Path(f"/proc/{c}/comm").read_text() == "pt_data_worker\n"
        ]
        os.kill(int(worker), signal.SIGKILL)
        codes = training.exit_codes()
    assert codes[1] == 1
    start = max(checkpoints(run_dir))
    with Training(2, keys, tmp_path / "log") as training:
        training.wait_until(lambda: f"start     step {start} of" in training.log.read_text())


@pytest.mark.parametrize("line", ['{"text": "cut off in the mid', '{"text": 5}', "\x00\x01"])
def test_a_corrupt_record_is_one_line_before_anything_starts(tmp_path, line):
    data = tmp_path / "data.jsonl"
    good = [json.dumps({"text": f"document {n}. " * 20}) for n in range(50)]
    data.write_text("\n".join([*good, line, *good]) + "\n")
    keys = argv(tmp_path, "a", LONG, f"data.path={data}", "parallel.expert_parallel=1")
    with Training(1, keys, tmp_path / "log") as training:
        assert training.exit_codes() == [2]
    (said,) = errors(training)
    assert f"data.path={data} " in said
    assert "cannot be read as json: " in said or "not text; name a column of strings" in said
    assert not (tmp_path / "a").exists() or not checkpoints(tmp_path / "a")


def test_a_corrupt_record_among_the_first_of_a_stream(monkeypatch):
    import datasets

    from train.data import sources

    def records():
        yield {"text": "a document"}
        raise OSError("record 2 of part-0.parquet: checksum does not match")

    monkeypatch.setattr(
        sources, "_open_hub", lambda config: datasets.IterableDataset.from_generator(records)
    )
    config = load(TINY[0], [*TINY[1:], "data.path=null", "data.name=some/text"])
    with pytest.raises(
        ConfigError, match=r"data\.name=some/text cannot be read: record 2 of part-0"
    ):
        sources.load_stream(config)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_record_in_a_stream(tmp_path, monkeypatch, workers):
    """It is met in mid-training, by one rank."""
    import datasets

    from train.data import sources

    def records():
        for n in range(10_000):
            if n == 1500:
                raise OSError("record 1500 of part-7.parquet: checksum does not match")
            yield {"text": f"{n} "}  # short: the thousand that are packed at once last 20 steps

    monkeypatch.setattr(
        sources, "_open_hub", lambda config: datasets.IterableDataset.from_generator(records)
    )
    keys = [
        "data.path=null",
        "data.name=some/text",
        f"data.workers={workers}",
        "data.shuffle_buffer=8",
    ]
    keys += ["data.valid_documents=20", "checkpoint.every=2", "parallel.expert_parallel=1", LONG]
    with Training(1, argv(tmp_path, "a", *keys), tmp_path / "log") as training:
        assert training.exit_codes() == [1]
    (said,) = errors(training)
    assert "data.name=some/text cannot be read any further" in said
    assert "record 1500 of part-7.parquet: checksum does not match" in said
    assert checkpoints(tmp_path / "a"), "what was trained before is saved"


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "nan"), (float("inf"), "infinite")])
def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_batch(tmp_path, value, word):
    """Lines of metrics are further apart than that, and so are checkpoints."""
    keys = argv(tmp_path, "a", "train.steps=20", "train.log_every=8", "checkpoint.every=3")
    with Training(2, keys, tmp_path / "log", poison(4, rank=1, value=value)) as training:
        assert training.exit_codes() == [1, 1]
    line = errors(training)[0]
    # Step 5 holds sequences 32 to 39: micro-batches of 2, rank 1's second is the last.
    assert (
        f"the loss of step 5 is {word}: rank 1, micro-batch 1, which holds sequences 38 to 39"
        in line
    )
    assert "train.on_nonfinite=skip" in line
    assert checkpoints(tmp_path / "a") == [3], "the weights after it are not worth saving"


def test_a_save_under_way_is_finished_before_a_loss_that_is_not_finite_ends_it(tmp_path):
    def plant(rank: int) -> None:
        slow_saves(1)
        poison(4, rank=1, value=float("nan"))(rank)

    keys = argv(tmp_path, "a", "train.steps=20", "train.log_every=1", "checkpoint.every=4")
    with Training(2, keys, tmp_path / "log", plant) as training:
        assert training.exit_codes() == [1, 1]
    assert checkpoints(tmp_path / "a") == [4]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_skipped_by_config(tmp_path):
    keys = ["train.steps=8", "train.on_nonfinite=skip"]
    with Training(
        2, argv(tmp_path, "a", *keys), tmp_path / "log", poison(4, 0, float("nan"))
    ) as training:
        assert training.exit_codes() == [0, 0]
    log = training.log.read_text()
    assert log.count("WARNING: the loss of step 5 is nan: rank 0") == 1
    assert "its update is skipped" in log
    rows = read_metrics(tmp_path / "a")
    assert "loss/train" not in rows[4]
    assert rows[4]["optim/skipped_steps"] == 1
    assert all(row["loss/train"] > 0 for row in rows if row["progress/step"] != 5)
    # The steps before it are those of a healthy run; the one after it has seen one update fewer.
    assert run_train(2, argv(tmp_path, "b", *keys)) == [0, 0]
    healthy = repeated(tmp_path / "b")
    skipped = repeated(tmp_path / "a")
    assert [skipped[step] for step in range(1, 5)] == [healthy[step] for step in range(1, 5)]
    assert skipped[6] != healthy[6]


@pytest.mark.slow
def test_a_hung_collective_names_the_ranks(tmp_path):
    """Rank 1 never comes to step 4: after parallel.timeout_s that is said, and all have ended."""

    keys = argv(tmp_path, "a", LONG, "checkpoint.every=1", "parallel.timeout_s=5")
    begin = time.monotonic()
    with Training(2, keys, tmp_path / "log", hang) as training:
        assert training.exit_codes() == [1, 1]
    assert time.monotonic() - begin < 30
    (line,) = errors(training)
    assert (
        "nothing moved for parallel.timeout_s=5: rank 1 did not come, "
        "being at tests/support/faults.py" in line
    )
    assert re.search(r"rank 0 waits at (train|models)/[a-z_/]+\.py:\d+", line)
    assert "stuck" in (tmp_path / "a" / "stalled" / "rank_00001.txt").read_text()
    assert run_train(2, argv(tmp_path, "a", "train.steps=4", "checkpoint.every=1")) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("stuck", [0, 1])
def test_a_rank_that_hangs_with_pythons_lock_is_named(tmp_path, stuck):
    """No thread of it runs, so it cannot report, and the rank that waits for it does."""
    keys = argv(tmp_path, "a", LONG, "parallel.timeout_s=5")
    with Training(2, keys, tmp_path / "log", hang_with_the_lock({stuck})) as training:
        codes = training.exit_codes()
    assert codes[1 - stuck] == 1
    assert codes[stuck] == -signal.SIGALRM
    (line,) = errors(training)
    assert f"rank {stuck} did not come, being at tests/support/faults.py:" in line
    assert re.search(rf"rank {1 - stuck} waits at (train|models)/[a-z_/]+\.py:\d+", line)
    assert " in sleeping" in (tmp_path / "a" / "stalled" / f"rank_{stuck:05d}.txt").read_text()


@pytest.mark.slow
def test_all_ranks_hang_with_pythons_lock(tmp_path):
    """No rank can print a line; every process ends, with its stack on the terminal."""
    keys = argv(tmp_path, "a", LONG, "parallel.timeout_s=5", "parallel.expert_parallel=1")
    with Training(1, keys, tmp_path / "log", hang_with_the_lock({0})) as training:
        assert training.exit_codes() == [-signal.SIGALRM]
    assert " in sleeping" in training.log.read_text()


@pytest.mark.slow
def test_a_stopped_rank_is_named_too(tmp_path):
    """SIGSTOP, like a machine that is gone: the rank cannot even report where it is."""
    keys = argv(tmp_path, "a", LONG, "parallel.timeout_s=4")
    with Training(2, keys, tmp_path / "log", quick_watchdog) as training:
        training.wait_until(lambda: logged(tmp_path / "a") >= 2)
        training.signal(1, signal.SIGSTOP)
        training.processes[0].join(30)
        assert training.processes[0].exitcode == 1
    (line,) = errors(training)
    assert "rank 1 did not come and gives no sign of life" in line


@pytest.mark.slow
def test_torchrun_starts_a_killed_rank_again(tmp_path):
    keys = ["train.steps=6", "checkpoint.every=1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", "-m", "tests.support.failing_rank", *argv(tmp_path, "a", *keys)]
    environment = {**os.environ, "PLANNED": "kill"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    started = re.findall(r"start     step (\d) of 6", done.stdout)
    assert started[0] == "0"
    assert started[1:] in (["1"], ["2"])
    assert run_train(2, argv(tmp_path, "whole", *keys)) == [0, 0]
    assert not differences(repeated(tmp_path / "a"), repeated(tmp_path / "whole"))


@pytest.mark.slow
def test_training_ends_well_where_wandb_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there

    def hurry(rank: int) -> None:
        from train.metrics import tracking

        tracking.INIT_TIMEOUT_S = 2

    keys = argv(tmp_path, "a", "train.steps=4", "tracking.mode=auto")
    with Training(2, keys, tmp_path / "log", hurry) as training:
        assert training.exit_codes() == [0, 0]
    log = training.log.read_text()
    assert log.count("WARNING: W&B cannot be reached; this run is recorded offline") == 1
    assert len(repeated(tmp_path / "a")) == 4
    assert list((tmp_path / "a").glob("wandb/offline-run-*"))


@pytest.mark.slow
def test_training_goes_on_where_the_network_to_wandb_fails_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)

    def hurry(rank: int) -> None:
        from train.metrics import tracking

        tracking.FINISH_TIMEOUT_S = 2

    keys = argv(tmp_path, "a", "train.steps=40", "tracking.mode=online")
    with ExitStack() as server:
        fake, url = server.enter_context(fake_wandb())
        monkeypatch.setenv("WANDB_BASE_URL", url)
        command = [*keys, "parallel.expert_parallel=1"]
        with Training(1, command, tmp_path / "log", hurry) as training:
            training.wait_until(lambda: logged(tmp_path / "a") >= 3 and fake.runs)
            server.close()  # nobody answers any more
            assert training.exit_codes(150) == [0]
    assert "Traceback" not in training.log.read_text()
    assert len(repeated(tmp_path / "a")) == 40
    # What could not be sent is there, to be sent later.
    assert list((tmp_path / "a").glob("wandb/run-*/run-*.wandb"))


@pytest.mark.slow
def test_training_goes_on_where_wandb_dies_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    keys = argv(tmp_path, "a", "train.steps=60", "tracking.mode=offline")
    with Training(1, [*keys, "parallel.expert_parallel=1"], tmp_path / "log") as training:
        training.wait_until(lambda: logged(tmp_path / "a") >= 3)
        own = training.processes[0].pid
        children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        assert children, "W&B has a process of its own"
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        assert training.exit_codes(90) == [0]
    log = training.log.read_text()
    assert "Traceback" not in log
    assert log.count("WARNING: W&B failed; training continues without it") == 1
    assert len(repeated(tmp_path / "a")) == 60
