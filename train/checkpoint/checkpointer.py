"""Checkpoints with torch.distributed.checkpoint (DCP): saved in the background, by all ranks.

    runs/<name>/checkpoints/step_00000200/
      __0_0.distcp, .metadata    weights and optimizer, readable by any number of ranks
      rank_00000.pt              what only that rank knows: random states, sums of metrics
      config.yaml training.json  the config; step, ranks, sequences that were trained on
      checksums.sha256           of all the others

The schedule and the place in the data follow from the step. A checkpoint is written under another
name and renamed when it is whole, so a reader never sees half of one. Checksums detect later
damage.
"""

import datetime
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from models.gpt import GPT
from train.checkpoint import checksums, files, progress, rng
from train.checkpoint.host_copy import HostCopy
from train.checkpoint.same_run import check_checkpoint
from train.checkpoint.writer import OfOneRank, Writer
from train.config import Config, ConfigError
from train.failure import RESUMES, TrainingFailed
from train.metrics.step import Gathered
from train.optim import OwnAdamW
from train.parallel import Ranks

log = logging.getLogger(__name__)

FAILURES = (Exception, dcp.CheckpointException)
"""DCP's own is not an Exception."""


class Checkpointer:
    """Saves and restores one run. Every rank has one and calls it at the same steps."""

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        ranks: Ranks,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        """`fingerprint` is the data's; see `train.data.fingerprint`."""
        self.folder = files.folder_of(run_dir)
        self.config, self.ranks, self.fingerprint = config, ranks, fingerprint
        self.state = _ModelAndOptimizer(model, optimizer)
        self.saved: int | None = None
        """Step of the last save that was started."""
        self.before_next: Callable[[], None] = lambda: None
        """Called when the last save is whole, if it is, before the next can rotate it away."""
        self._stalls: list[float] = []
        self._pending: Future | None = None
        self._copy = HostCopy(ranks.device)
        optimizer.register_step_pre_hook(lambda *_: self._copy.wait_before_update())
        # A group of its own, since a save communicates while training does.
        self.group = dist.new_group(
            backend="gloo", timeout=datetime.timedelta(seconds=config.parallel.timeout_s)
        )
        if ranks.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.drop_left_overs(self.folder)
        dist.barrier(group=self.group)

    def restore(self) -> tuple[int, Gathered | None]:
        """Load the newest whole checkpoint, resharded for the ranks that are here now.

        Returns its step (0 without one), and what this rank passed to `save` as `metrics` if there
        were as many ranks then. Raises ConfigError if it is of another run, or if there are
        checkpoints, all of them damaged, and TrainingFailed if a whole one cannot be loaded.
        """
        path, damaged = self._newest_whole()
        if path is None:
            return 0, None
        self._check_same_run(path)
        if self.ranks.is_first:
            _set_aside(damaged)
        size = files.size_of(path)
        try:
            with progress.said(f"loading {path.name}", size, speaks=self.ranks.is_first):
                dcp.load({"training": self.state}, checkpoint_id=path, process_group=self.group)
            about = json.loads((path / checksums.ABOUT).read_text(encoding="utf-8"))
            own: OfOneRank | None = None
            if about["world_size"] == self.ranks.world_size:
                own = torch.load(path / files.rank_file(self.ranks.rank), weights_only=True)
        except FAILURES as error:
            raise TrainingFailed(f"{path} cannot be loaded: {_cause(error)}") from error
        self.saved = about["step"]
        if self.fingerprint is not None and not about.get("data") and self.ranks.is_first:
            log.warning(
                "%s is of a version that did not record its data: it may be other data than now, "
                "and documents that are held out now may have been trained on",
                path,
            )
        if own is None:
            return about["step"], None
        rng.restore(own["rng"], self.ranks.device)
        return about["step"], own["metrics"]

    def allocate(self) -> None:
        """Allocate the memory that saves copy to, so that the first does not wait for it. Call it
        after an optimizer step, which makes the state."""
        self._copy.allocate({"training": self.state.state_dict()})

    def save(self, step: int, metrics: Gathered | None = None) -> None:
        """Copy the state after `step` steps, and write it while training continues.

        `metrics` must not change afterwards. Waits for the save before this one. A save that fails
        is reported; training continues, and the next save tries again.
        """
        begin = time.perf_counter()
        self.wait()
        self.before_next()
        self._begin(step, metrics, self._copy)
        self._stalls.append(time.perf_counter() - begin)

    def _begin(self, step: int, metrics: Gathered | None, copy: HostCopy | None) -> None:
        """Start to write. Without `copy` nothing may change until that is done."""
        self.saved = step
        batch = self.config.global_batch(self.ranks.world_size)
        about: dict[str, object] = {
            "step": step,
            "world_size": self.ranks.world_size,
            "global_batch": batch,
            "sequences": step * batch,
        }
        if self.fingerprint is not None:
            about["data"] = dict(self.fingerprint)
        own: OfOneRank = {"rng": rng.state(self.ranks.device), "metrics": metrics}
        final = files.checkpoint_of(self.folder, step)
        size = self.state.size // self.ranks.world_size
        writer = Writer(final, self.config, about, self.ranks.rank, own, copy, size)
        pending = dcp.async_save(
            {"training": self.state}, storage_writer=writer, process_group=self.group
        )
        # A state that is still being copied comes back with a future of its own.
        self._pending = pending if isinstance(pending, Future) else pending.upload_completion

    def metrics(self) -> dict[str, float]:
        """How long a save since the last call delayed the next step, on average."""
        if not self._stalls:
            return {}
        mean = sum(self._stalls) / len(self._stalls)
        self._stalls.clear()
        return {"time/checkpoint_ms": mean * 1e3}

    def wait(self) -> str | None:
        """Wait until the save that was started is on disk; returns why it is not, in a few words,
        if it failed."""
        if self._pending is None:
            return None
        assert self.saved is not None
        path = files.checkpoint_of(self.folder, self.saved)
        half = files.unfinished(path)
        try:
            with progress.said(
                *(f"saving {path.name}", self.state.size, lambda: files.size_of(half)),
                self.ranks.is_first,
            ):
                self._pending.result()
        except FAILURES as error:
            reason = _cause(error)
            if self.ranks.is_first:
                shutil.rmtree(half, ignore_errors=True)
                whole = files.newest(self.folder)
                log.warning(
                    "the checkpoint of step %d was not saved (%s); the newest is %s",
                    self.saved,
                    reason,
                    whole[1] if whole else "none",
                )
            self.saved = None
            return reason
        finally:
            self._pending = None
        return None

    def finish(self, step: int, metrics: Gathered | None = None) -> None:
        """Have step `step` on disk when this returns. Raises TrainingFailed if that fails.

        Written in place, without a copy: no training runs meanwhile.
        """
        self.wait()
        if self.saved != step:
            self.before_next()
            self._begin(step, metrics, copy=None)
            reason = self.wait()
            if reason:
                raise TrainingFailed(
                    f"the checkpoint of step {step} could not be saved in {self.folder}: {reason}; "
                    f"free some space and start again, which {RESUMES}"
                )

    def _newest_whole(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and a line for each damaged one that is newer.

        Every rank checks a share of the files; all come to the same answer.
        """
        listed = [files.finished(self.folder)]
        dist.broadcast_object_list(listed, group=self.group)
        damaged: list[str] = []
        rank, ranks = self.ranks.rank, self.ranks.world_size
        for path in reversed(listed[0]):
            problems: list[str | None] = [None] * ranks
            count, share = progress.Count(), files.size_of(path) // ranks
            with progress.said(f"checking {path.name}", share, count.get, self.ranks.is_first):
                mine = checksums.damage(path, rank, ranks, count.add)
                dist.all_gather_object(problems, mine, group=self.group)
            problem = next(filter(None, problems), None)
            if problem is None:
                return path, damaged
            damaged.append(f"{path}: {problem}")
        if damaged:
            raise ConfigError(
                f"every checkpoint is damaged ({'; '.join(damaged)}); to start from scratch, move "
                "the folder away or choose another run.name"
            )
        return None, []

    def _check_same_run(self, path: Path) -> None:
        """Raise ConfigError, on all ranks, if a checkpoint is of another run."""
        refused: list[str | None] = [None]
        if self.ranks.is_first:
            try:
                check_checkpoint(path, self.config, self.ranks.world_size, self.fingerprint)
            except ConfigError as error:
                refused = [str(error)]
        dist.broadcast_object_list(refused, group=self.group)
        if refused[0] is not None:
            raise ConfigError(refused[0])


def _set_aside(damaged: list[str]) -> None:
    for line in damaged:
        log.warning("damaged checkpoint %s; it is renamed, and the one before it is used", line)
        path = Path(line.partition(": ")[0])
        aside = path.with_name(f"{path.name}.damaged")
        if aside.is_symlink():
            aside.unlink()
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


class _ModelAndOptimizer(Stateful):
    """Model and optimizer as one state, under parameter names instead of numbers."""

    # Not strict: keys that `files.is_of_model` leaves out may be missing.
    options = StateDictOptions(flatten_optimizer_state_dict=True, strict=False)

    def __init__(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    @property
    def size(self) -> int:
        """About this many bytes, on all ranks together: a weight has two running means."""
        return 3 * sum(p.numel() * p.element_size() for p in self.model.parameters())

    def state_dict(self) -> STATE_DICT_TYPE:
        if isinstance(self.optimizer, OwnAdamW):
            self.optimizer.make_state()
        is_new = not self.optimizer.state
        model, optimizer = get_state_dict(self.model, self.optimizer, options=self.options)
        if is_new:  # PyTorch has made the state by a step without gradients, which does not count
            for of_one in self.optimizer.state.values():
                of_one["step"].zero_()
        model = {key: value for key, value in model.items() if files.is_of_model(key)}
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: STATE_DICT_TYPE) -> None:
        # How a step is computed is this optimizer's setting, not that of the one that was saved.
        for key in state["optimizer"]:
            name = key.rpartition(".")[2]
            if key.startswith("param_groups.") and name in ("fused", "foreach", "capturable"):
                state["optimizer"][key] = self.optimizer.defaults[name]
        result = set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=self.options,
        )
        missing = [key for key in result.missing_keys if files.is_of_model(key)]
        if missing or result.unexpected_keys:
            raise ValueError(f"weights missing: {missing}, not known: {result.unexpected_keys}")
        self.model.forget_prepared_weights()


def _cause(error: BaseException) -> str:
    """What the operating system said, out of DCP's report of every rank's traceback."""
    if isinstance(error, dcp.CheckpointException):
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {failure}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
