"""Where metrics go: the terminal, the run's files, and W&B or TensorBoard. Rank 0 has one."""

import json
import logging
from pathlib import Path

from train.checkpoint.changed import Changed, changed_keys
from train.config import Config
from train.metrics.artifacts import Artifacts
from train.metrics.environment import Environment, describe_environment
from train.metrics.metrics_file import LoadRow, MetricsFile
from train.metrics.routing_picture import save_heat_map
from train.metrics.tensorboard import TensorBoard
from train.metrics.terminal import Progress, facts
from train.metrics.tracking import Tracker
from train.parallel import Ranks

log = logging.getLogger(__name__)


class Recorder:
    """Records the metrics of one run; closed by `finish`, or by `give_up` where the run ends
    early."""

    def __init__(
        self, config: Config, run_dir: Path, environment: Environment, first_step: int
    ) -> None:
        self.run_dir = run_dir
        self.file = MetricsFile(run_dir / "metrics.jsonl", first_step)
        self.routing_file = MetricsFile(run_dir / "routing.jsonl", first_step)
        self.pictures_every = config.tracking.pictures_every
        self.last_picture = first_step
        self.tracker: Tracker | TensorBoard
        if config.tracking.backend == "tensorboard":
            self.tracker = TensorBoard(config, run_dir, environment, first_step)
        else:
            self.tracker = Tracker(config, run_dir, environment, resumed=first_step > 0)
        self.artifacts = Artifacts(config, run_dir, self.tracker, first_step)
        self.progress = Progress(config.train.steps, first_step)
        self.last: dict[str, float] = {}

    def write(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        row = {"progress/step": step, "progress/tokens": tokens, **metrics}
        self.file.write(row)
        self.tracker.log(row, step)
        self.artifacts.look()
        self.progress.line(step, row)
        self.last.pop("loss/train", None)  # an older one is not how the run ended
        self.last |= row

    def wants_picture(self, step: int) -> bool:
        """Whether a picture of the routing is due at this logged step."""
        every = self.pictures_every
        return bool(every) and step // every > self.last_picture // every

    def picture(self, row: LoadRow) -> None:
        """The expert load of one logged step, as data, as a PNG and in W&B or TensorBoard."""
        step = self.last_picture = row["progress/step"]
        self.routing_file.write(row)
        path = self.run_dir / "pictures" / f"expert_load_{step:08d}.png"
        try:
            save_heat_map(path, row["moe/expert_load"], step)
            self.tracker.picture("moe/expert_load", path, step)
        except OSError as error:
            log.warning("%s cannot be written (%s); training continues", path, error.strerror)

    def give_up(self, exit_code: int) -> None:
        """Close what is open when the run ends early, so that nothing logged is lost."""
        self.progress.bar.stop()
        self.file.close()
        self.routing_file.close()
        self.tracker.finish(exit_code)

    def finish(self, summary: dict[str, float]) -> None:
        final = {f"{name}_final": v for name, v in self.last.items() if name.startswith("loss/")}
        self.tracker.summary(summary | final)
        self.artifacts.finish()
        self.tracker.finish()
        self.file.close()
        self.routing_file.close()
        self.progress.finish(self.last, summary, self.run_dir)


def describe(
    config: Config, ranks: Ranks, runs_on: str, data: str, first_step: int
) -> Recorder | None:
    """Report what runs where: in the run's folder, to W&B and on the terminal.

    `runs_on` says which library runs what of the path, `data` what is read. Returns rank 0's
    Recorder, for the steps after `first_step`; the other ranks have none.
    """
    if not ranks.is_first:
        return None
    run_dir = config.run_dir
    environment = describe_environment(ranks.device, ranks.world_size)
    config.save(run_dir / "config.yaml")
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    recorder = Recorder(config, run_dir, environment, first_step)
    checkpoint = run_dir / "checkpoints" / f"step_{first_step:08d}"
    changed = changed_keys(checkpoint, config) if first_step else {}
    record_changes(run_dir, changed, first_step)
    origin = str(run_dir / "checkpoints") if first_step else config.model.init_from
    recorder.progress.start(
        {
            **facts(config, ranks, environment["device_name"], runs_on),
            "data": data,
            "tracking": recorder.tracker.describe(),
            "start": f"step {first_step} of {config.train.steps}"
            + (f", from {origin}" if origin else ""),
        }
        | ({"changed": _in_one_line(changed)} if changed else {})
    )
    return recorder


def record_changes(run_dir: Path, changed: Changed, first_step: int) -> None:
    """Add to `changes.jsonl` what has changed for the steps after `first_step`. What it has of them
    is dropped, as they are trained again."""
    path = run_dir / "changes.jsonl"
    if changed or path.exists():
        file = MetricsFile(path, first_step)
        if changed:
            file.write({"progress/step": first_step + 1, "changed": changed})
        file.close()


def _in_one_line(changed: Changed) -> str:
    return ", ".join(f"{key}={now} (was {before})" for key, (before, now) in changed.items())
