"""Weights & Biases, which never gets in the way of training.

Online with an API key, offline without one. An offline run is complete: `scripts/sync.sh` uploads
it later. Whatever W&B or the network does, training continues: the first failure prints one line,
and from then on `metrics.jsonl` is the only record.
"""

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.config import Section
from train.config import Config

if TYPE_CHECKING:  # each takes a second to import, which a disabled run need not pay
    from wandb import Run

    from train.metrics.environment import Environment

log = logging.getLogger(__name__)

ID_FILE = "wandb_id"
FINISHED_FILE = "finished"
"""A file in the folder of an offline run that has ended."""

INIT_TIMEOUT_S = 30
FINISH_TIMEOUT_S = 60
"""W&B's own defaults are 90 s and forever, during which the GPUs of a job would idle."""

ARTIFACT_TIMEOUT_S = 600
"""Instead of the latter where checkpoints are uploaded, for which the user accepts idle GPUs."""


class Tracker:
    """One W&B run. Only rank 0 makes one.

    No method raises an error of W&B's, asks for anything, or waits longer than the time-outs above.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        environment: "Environment | None" = None,
        resumed: bool = False,
    ) -> None:
        """Start the run, in `run_dir/wandb/`.

        `environment` (device, world size, versions, commit) goes into the run's config under that
        name. With `resumed` the W&B run whose id is in the folder continues; otherwise a new one
        begins, since W&B ignores a step that a run has already logged.
        """
        self._run: Run | None = None
        self._run_dir = run_dir
        self.mode = resolve_mode(config.tracking.mode)
        if config.tracking.backend == "none":
            self.mode = "disabled"
        if self.mode == "disabled":
            return
        if self.mode == "online":
            try:
                self._run = _start(config, run_dir, environment, resumed, "online")
                return
            except Exception as error:
                _warn("W&B cannot be reached; this run is recorded offline", error)
                # The id is written by now, and the second attempt is the same run; W&B's process
                # still holds it, so that process has to go.
                self.mode, resumed = "offline", True
                _stop_service()
        try:
            self._run = _start(config, run_dir, environment, resumed, "offline")
        except Exception as error:
            self._give_up("W&B does not start", error)

    def describe(self) -> str:
        """One line for the user: where the run can be seen."""
        if self._run is None:
            return "W&B: off"
        if self.mode == "online":
            return f"W&B: {self._run.url}"
        return f"W&B: offline; to upload: bash scripts/sync.sh {self._run_dir}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one step's metrics under their names."""
        self._try(lambda run: run.log(dict(metrics), step=step))

    def picture(self, name: str, path: Path, step: int) -> None:
        """Log a PNG with a step's metrics."""

        def log_image(run: "Run") -> None:
            import wandb

            run.log({name: wandb.Image(str(path))}, step=step)

        self._try(log_image)

    def summary(self, values: Mapping[str, float]) -> None:
        """Set figures of the whole run, such as medians."""
        self._try(lambda run: run.summary.update(dict(values)))

    def checkpoint(self, folder: Path, step: int) -> None:
        """Log the files of a folder as a model artifact, a version of the run's one; online it
        returns when they are uploaded, so call it in a thread of its own. Alone here raises
        whatever W&B does."""
        if self._run is None:
            return
        import wandb

        run = self._run
        artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata={"step": step})
        for path in sorted(folder.iterdir()):
            # As it lies there: a copy of it in W&B's cache would take as much room again.
            artifact.add_file(str(path), skip_cache=True, policy="immutable")
        logged = run.log_artifact(artifact, aliases=["latest", f"step_{step}"])
        if self.mode == "online":
            logged.wait()

    def finish(self, exit_code: int = 0) -> None:
        """Upload what is left and end the run; not 0 marks it failed. A second call does nothing.

        What a dead network holds back stays in the folder for `wandb sync`.
        """
        folder = Path(self._run.dir).parent if self._run and self.mode == "offline" else None
        self._try(lambda run: run.finish(exit_code=exit_code))
        if self._run and folder:
            # scripts/sync.sh would otherwise wait: the record may still be growing.
            with contextlib.suppress(OSError):
                (folder / FINISHED_FILE).touch()
        self._run = None

    def _try(self, action: Callable[["Run"], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._give_up("W&B failed", error)

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        self.mode = "disabled"
        _warn(f"{what}; training continues without it", error)


def resolve_mode(mode: str) -> Literal["online", "offline", "disabled"]:
    """`online`, `offline` or `disabled`, from the config's `tracking.mode` and the environment.

    `WANDB_MODE=disabled` and `=offline` win over the config: they say what the machine can do.
    Without an API key it is never online, because W&B would then ask for one.
    """
    environment = os.environ.get("WANDB_MODE")
    if "disabled" in (mode, environment):
        return "disabled"
    if "offline" in (mode, environment):
        return "offline"
    try:
        if _has_api_key():
            return "online"
    except Exception as error:  # such as a key of the wrong length
        _warn("W&B's API key is unusable; this run is recorded offline", error)
        return "offline"
    if mode == "online":
        log.warning("W&B has no API key (see `wandb login`); this run is recorded offline")
    return "offline"


def _has_api_key() -> bool:
    """Whether W&B finds a key where it looks itself: the environment and ~/.netrc."""
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    host = wandb_setup.singleton().settings.base_url
    auth = wbauth.authenticate_session(
        host=host, source="train", prompt=False, update_session=False
    )
    return auth is not None


def _start(
    config: Config,
    run_dir: Path,
    environment: "Environment | None",
    resumed: bool,
    mode: Literal["online", "offline"],
) -> "Run":
    import wandb

    tags = _set_by("WANDB_TAGS", config.run, "tags")
    run = wandb.init(
        mode=mode,
        id=_run_id(run_dir, resumed),
        resume="allow" if mode == "online" else None,  # offline there is no server to ask
        project=_set_by("WANDB_PROJECT", config.tracking, "project"),
        group=_set_by("WANDB_RUN_GROUP", config.run, "group"),
        job_type=config.moe.path,
        name=_set_by("WANDB_NAME", config.run, "name"),
        tags=tags.split(",") if isinstance(tags, str) else tags,
        config={**config.model_dump(mode="json"), "environment": dict(environment or {})},
        dir=str(run_dir),
        settings=wandb.Settings(
            silent=True,
            console="off",  # the terminal belongs to the run
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S
            if config.tracking.artifacts == "none"
            else ARTIFACT_TIMEOUT_S,
        ),
    )
    # Losses are compared at equal data, everything else at equal steps.
    run.define_metric("progress/step")
    run.define_metric("progress/tokens")
    run.define_metric("loss/*", step_metric="progress/tokens")
    for group in ("optim", "throughput", "memory", "time", "moe"):
        run.define_metric(f"{group}/*", step_metric="progress/step")
    return run


def _set_by(variable: str, section: Section, key: str) -> Any:
    """A key's value where somebody has set it; otherwise that of W&B's own variable, and at last
    the default."""
    default = getattr(section, key)
    return default if key in section.model_fields_set else os.environ.get(variable) or default


def _stop_service() -> None:
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()


def _run_id(run_dir: Path, resumed: bool) -> str:
    """The id in the run's folder, so that a resumed run continues in the same W&B run."""
    path = run_dir / ID_FILE
    if not resumed or not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def _warn(what: str, error: Exception) -> None:
    log.warning("%s (%s: %s)", what, type(error).__name__, " ".join(str(error).split())[:200])
