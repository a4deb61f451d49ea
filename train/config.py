"""The config: YAML to typed sections, `key=value` overrides, and one clear line for bad input.

    config = load("configs/demo_cpu.yaml", ["moe.path=fp8_compact", "train.steps=10"])

`python -m train --help` lists every key with its default.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from models.config import (
    FREE_ON_RESUME,
    SAID_ON_RESUME,
    FreeOnResume,
    ModelConfig,
    MoEConfig,
    SaidOnResume,
    SameTraining,
    Section,
)
from train import config_file

MOST = 2**31 - 1
"""Upper limit of what is counted in sequences."""


SMALLEST_SHARE = 1e-4
"""Smallest share of a source in a mixture."""


class ConfigError(Exception):
    """Bad input from the user. Its text is the one line to print: what, where, what would work."""


class RunConfig(Section):
    """The run's name and folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder under `dir`, and the run's name in W&B."""
    dir: str = "runs"
    """Parent folder of all runs."""
    group: str | None = None
    """The experiment: runs of one group are compared. By default the config file's name."""
    tags: tuple[str, ...] = Field(default=(), strict=False)
    """W&B tags."""


class ParallelConfig(Section):
    """How ranks share the model. All of them are data-parallel; experts are also distributed over
    ranks."""

    expert_parallel: PositiveInt = 1
    """Ranks that share one set of experts; divides the number of ranks and of experts."""
    reshard_after_forward: bool = False
    """Free gathered weights between forward and backward (ZeRO-3) instead of keeping them
    (ZeRO-2): less memory, more communication."""
    timeout_s: int = Field(default=600, gt=0, le=7 * 24 * 3600)
    """Seconds after which a collective that some rank did not join is an error."""


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: SaidOnResume[float] = Field(gt=0, le=1e6)
    """Peak learning rate."""
    schedule: SaidOnResume[Literal["cosine", "wsd", "constant"]] = "cosine"
    """After warm-up: cosine decay, warmup-stable-decay (linear at the end), or none."""
    warmup_steps: SaidOnResume[NonNegativeInt] = 0
    """Steps of linear warm-up."""
    decay_fraction: SaidOnResume[float] = Field(default=0.2, gt=0, le=1)
    """wsd: the share of all steps, at the end, in which the rate falls."""
    min_lr_ratio: SaidOnResume[float] = Field(default=0.1, ge=0, le=1)
    """Last learning rate as a share of the peak."""
    weight_decay: SaidOnResume[float] = Field(default=0.1, ge=0)
    """For matrices; norms and biases have none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    eps: float = Field(default=1e-8, gt=0)
    """What AdamW adds to the denominator."""
    clip_grad: SaidOnResume[float] = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient, experts included; 0 switches clipping off."""
    grad_dtype: SaidOnResume[Literal["fp32", "bf16"]] = "fp32"
    """Dtype in which gradients are summed over micro-batches and ranks; those of experts without
    replicas are kept in it until the update. bf16 halves memory and communication, and rounds every
    sum."""
    first_moment_dtype: SaidOnResume[Literal["fp32", "bf16"]] = "fp32"
    """Dtype of AdamW's running mean of the gradient; its arithmetic is fp32 with both."""
    prepare_weights: FreeOnResume[bool | Literal["auto"]] = "auto"
    """Cast or quantize experts' weights for the next step in the pass that updates them, not in a
    separate one. Only where no expert has replicas: parallel.expert_parallel = number of ranks.
    `auto` does so on GPUs; a CPU keeps PyTorch's AdamW, which rounds differently."""

    @field_validator("prepare_weights", mode="before")
    @classmethod
    def _check_prepare_weights(cls, value: object) -> object:
        """Checked here, or the error would name every type that the value is not."""
        if value in (True, False, "auto"):
            return value
        raise ValueError(f"{value!r} is neither auto, true nor false")


class TrainConfig(Section):
    """The loop."""

    steps: FreeOnResume[PositiveInt]
    """Optimizer steps of the whole run."""
    micro_batch: FreeOnResume[PositiveInt] = Field(le=MOST)
    """Sequences per rank and forward pass."""
    global_batch: FreeOnResume[PositiveInt | None] = Field(default=None, le=MOST)
    """Sequences per optimizer step over all ranks; more than `micro_batch` x ranks means gradient
    accumulation. By default `micro_batch` x ranks."""
    seed: int = Field(default=0, ge=0, lt=2**62)
    """Determines initial weights and the order of the data."""
    device: FreeOnResume[Literal["auto", "cpu", "cuda"]] = "auto"
    """`auto` is cuda where there is a GPU."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of the computation; the optimizer always holds fp32 weights. `auto` is bf16 on a GPU
    and fp32 on a CPU; fp32 runs on a CPU only."""
    deterministic: FreeOnResume[bool] = False
    """Use only operations that give the same bits every time: slower on a GPU; on a CPU always
    so."""
    log_every: FreeOnResume[PositiveInt] = 10
    """Steps between two lines of metrics."""
    valid_every: FreeOnResume[NonNegativeInt] = 100
    """Steps between two validations; 0 for none. Otherwise the last step is always validated."""
    valid_batches: FreeOnResume[PositiveInt] = 8
    """Batches of the global batch's size in one validation."""
    warmup_steps: FreeOnResume[NonNegativeInt] = 3
    """First steps, which the throughput figures leave out."""
    on_nonfinite: FreeOnResume[Literal["stop", "skip"]] = "stop"
    """What to do when a loss or gradient is NaN or infinite: `stop` the run and name the step and
    the batch, or `skip` that step's update, with a warning. skip waits for the GPU every step."""
    nonfinite_limit: FreeOnResume[PositiveInt] = 10
    """Skipped steps in a row after which the run stops anyway; between the first of them and the
    next good step nothing is saved, except on a signal."""
    profile: FreeOnResume[bool] = False
    """Log where the time of a step goes, `time/..._ms`, on chosen steps: attention, the five steps,
    GEMMs, combine, communication, optimizer."""
    profile_every: FreeOnResume[PositiveInt] = 10
    """One in this many lines of metrics has these times."""
    trace_step: FreeOnResume[NonNegativeInt] = 0
    """A step to record as a Chrome trace, `trace.json.gz` in the run's folder; 0 for none. Open it
    in chrome://tracing or Perfetto."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.trace_step > self.steps:
            raise ValueError(f"trace_step={self.trace_step} is after the last, steps={self.steps}")
        return self


class DataConfig(Section):
    """The text, its tokenizer, and the order of sequences."""

    path: str | None = None
    """Local text: a file, a folder or a glob of .txt, .jsonl, .json, .parquet, .arrow or source
    files, compressed or not; or a folder that `save_to_disk` wrote or that was downloaded from the
    hub; or a folder of tokens made by `scripts.prepare_data`. By default, and without `name`, the
    source of Python's standard library."""
    mixture: dict[str, float] = Field(default={})
    """Several sources instead of `path`, each with its weight: `{my/wiki: 3, my/code: 1}`. A source
    gets that share of the sequences; one that is used up starts again."""
    name: str | None = None
    """A data set on the Hugging Face hub, streamed; for example `HuggingFaceFW/fineweb-edu`."""
    subset: str | None = None
    """The hub data set's configuration name."""
    split: str = "train"
    """The split to train on, of a hub data set or of a folder with files named after splits."""
    text_column: str = "text"
    """Column that holds the text, in hub data sets, JSON, Parquet and Arrow; no other is read."""
    tokenizer: str = "bytes"
    """`bytes` (256 byte values and an end-of-document token), a `tokenizers` JSON file, a folder
    with a tokenizer.json, or the name of a tokenizer on the hub."""
    eod_token: str | None = None
    """The tokenizer's token that ends a document. By default the `eos_token` of the
    `tokenizer_config.json` beside it, or one of the usual names."""
    valid_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of the documents held out for validation. A hash of a document's text decides, so
    documents that are added later change nothing for the others."""
    valid_documents: PositiveInt = 512
    """Streamed data: validate on this many of the documents held out, the first ones. To find them,
    each start reads about `valid_documents / valid_fraction` documents."""
    shuffle_buffer: PositiveInt = 10_000
    """Sequences among which streamed data is shuffled."""
    document_mask: bool = False
    """Tokens attend within their own document only, and positions restart with it."""
    workers: FreeOnResume[NonNegativeInt] = Field(default=1, le=1024)
    """Processes that prepare batches ahead of the training thread; 0 prepares them in that thread.
    Streamed data takes at most one."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        given = {"path": self.path, "name": self.name, "mixture": self.mixture or None}
        both = [f"{key}={value}" for key, value in given.items() if value is not None]
        if len(both) > 1:
            raise ValueError(f"{' and '.join(both)} are both set; keep one")
        total = sum(self.mixture.values())
        for path, weight in self.mixture.items():
            if weight <= 0 or weight < SMALLEST_SHARE * total:
                raise ValueError(
                    f"mixture: {path} has the weight {weight:g} of {total:g}; give it a share of "
                    f"{SMALLEST_SHARE:.2%} or more, or leave it out"
                )
        return self


class CheckpointConfig(Section):
    """When the run is saved."""

    every: NonNegativeInt = 0
    """Steps between two checkpoints; 0 saves only at the end."""
    at_end: bool = True
    """Save after the last step, whatever `every` is. A signal to stop always saves."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every: NonNegativeInt = 0
    """A checkpoint whose step is a multiple of this is never deleted. 0 for none."""


class TrackingConfig(Section):
    """Where metrics go in addition to `metrics.jsonl`, under the same names."""

    backend: Literal["wandb", "tensorboard", "none"] = "wandb"
    """Weights & Biases; or TensorBoard's event files in the run's folder, which needs the package
    tensorboard; or neither, as `wandb` with `mode=disabled`."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """W&B's mode: `auto` is online with an API key and offline without one."""
    project: str = "moe-compact-fp8"
    """W&B project."""
    artifacts: Literal["none", "last", "all"] = "none"
    """Checkpoints that W&B gets as model artifacts: only that of a finished run's last step, or
    each one once it is whole. At its end the run waits up to ten minutes for the upload."""
    pictures_every: NonNegativeInt = 100
    """Steps between two heat maps of the expert load, each at the next logged step; 0 for none."""

    @model_validator(mode="after")
    def _check(self) -> "TrackingConfig":
        if self.artifacts != "none" and self.backend != "wandb":
            raise ValueError(
                f"artifacts={self.artifacts} with backend={self.backend}: only W&B takes "
                "checkpoints; set artifacts=none or backend=wandb"
            )
        return self


class Config(Section):
    """A whole config file. Its names are stable: scripts and dashboards rely on them."""

    run: FreeOnResume[RunConfig]
    model: ModelConfig
    moe: MoEConfig
    parallel: FreeOnResume[ParallelConfig] = ParallelConfig()
    optim: OptimConfig
    train: TrainConfig
    data: DataConfig = DataConfig()
    checkpoint: FreeOnResume[CheckpointConfig] = CheckpointConfig()
    tracking: FreeOnResume[TrackingConfig] = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        experts, ranks = self.moe.num_experts, self.parallel.expert_parallel
        if experts % ranks:
            raise ValueError(
                f"moe.num_experts={experts} is not divisible by parallel.expert_parallel={ranks}"
            )
        return self

    def global_batch(self, world_size: int) -> int:
        """Sequences per optimizer step."""
        return self.train.global_batch or self.train.micro_batch * world_size

    def tokens_per_step(self, world_size: int) -> int:
        """Tokens that an optimizer step learns from, over all ranks."""
        return self.global_batch(world_size) * self.model.seq_len

    @property
    def run_dir(self) -> Path:
        """The run's own folder."""
        return Path(self.run.dir).expanduser() / self.run.name

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step."""
        return self.global_batch(world_size) // (self.train.micro_batch * world_size)

    def save(self, path: Path) -> None:
        """Write the resolved config as YAML that `load` reads back; whole, or not at all, after a
        power cut too."""
        new = path.with_name(f"{path.name}.tmp")
        with new.open("w", encoding="utf-8") as file:
            yaml.safe_dump(self.model_dump(mode="json"), file, sort_keys=False)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and check the result.

    Raises ConfigError with one line that names the key, the value and what would work.
    """
    path = Path(path)
    try:
        tree = config_file.read(path)
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"config file {path}: {error}") from None
    try:
        for override in overrides or []:
            config_file.override(tree, override, Config)
        tree = config_file.typed(tree, Config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    run = tree.setdefault("run", {})
    given = set(run) if isinstance(run, dict) else set()
    if isinstance(run, dict):
        run.setdefault("group", path.stem)
        # Without a name a run is named after what distinguishes it from its neighbours.
        moe = tree.get("moe")
        moe_path = moe.get("path", "bf16") if isinstance(moe, dict) else "bf16"
        run.setdefault("name", _file_name(f"{path.stem}-{moe_path}"))
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e) for e in error.errors())) from None
    # A name that was not given is a default, and W&B's own variables override it.
    config.run.model_fields_set.intersection_update(given)
    return config


def with_keys(config: Config, overrides: list[str]) -> Config:
    """The config with `section.key=value` overrides. Raises ConfigError, as `load` does."""
    tree = config.model_dump(mode="json")
    try:
        for override in overrides:
            config_file.override(tree, override, Config)
        return Config.model_validate(config_file.typed(tree, Config))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e) for e in error.errors())) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_world(config: Config, world_size: int) -> None:
    """Check what depends on the number of ranks. Raises ConfigError."""
    ep = config.parallel.expert_parallel
    if world_size % ep:
        raise ConfigError(
            f"parallel.expert_parallel={ep} does not divide the {world_size} rank(s) started; "
            f"start a multiple of {ep} with torchrun --nproc-per-node, or set a divisor"
        )
    replicas = world_size // ep
    if config.optim.prepare_weights is True and replicas > 1:
        raise ConfigError(
            f"optim.prepare_weights=true with {replicas} replicas of each expert: a rank then "
            "updates a part of a weight and cannot quantize the whole; leave it at auto"
        )
    for name, size in (
        ("model.hidden_size", config.model.hidden_size),
        ("moe.ffn_hidden_size", config.moe.ffn_hidden_size),
    ):
        # FSDP cuts the rows of the experts' matrices, of which there are 2 * ffn and hidden.
        if size % replicas:
            raise ConfigError(
                f"the {replicas} replicas of each expert do not divide {name}={size}; "
                f"raise parallel.expert_parallel={ep} or start another number of ranks"
            )
    batch = config.global_batch(world_size)
    chunk = config.train.micro_batch * world_size
    if batch % chunk:
        raise ConfigError(
            f"train.global_batch={batch} is not a multiple of train.micro_batch x ranks = "
            f"{config.train.micro_batch} x {world_size} = {chunk}; change one of them, or leave it "
            "to train.global_batch=null: one micro-batch a rank"
        )


def world_size_from_env() -> int:
    """Ranks that torchrun or SLURM started; 1 for a plain `python -m train`."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or (text != "1" and "RANK" not in os.environ):
        raise ConfigError(
            f"WORLD_SIZE={text} is in the environment without what torchrun sets beside it; unset "
            "it, or start with torchrun"
        )
    return int(text)


def describe_keys() -> str:
    """Every key with its type, default and meaning, for --help."""
    lines = []
    for section in Config.model_fields:
        model = _section(section)
        lines.append(f"\n{section}: {' '.join((model.__doc__ or '').split())}")
        for key, field in model.model_fields.items():
            default = "required" if field.is_required() else f"default {field.default!r}"
            free = f"; {mark}" if (mark := mark_of(section, key)) else ""
            about = " ".join((field.description or "").split())
            lines.append(f"  {section}.{key} ({default}{free}) {about}".rstrip())
    return "\n".join(lines)


def is_free(section: str, key: str) -> bool:
    """Whether `section.key` may change when a run is resumed; it is marked at the key."""
    return mark_of(section, key) is not None


def is_said(section: str, key: str) -> bool:
    """Whether the start reports that `section.key` has changed since the checkpoint."""
    return mark_of(section, key) == SAID_ON_RESUME


def is_same_training(section: str, key: str, one: object, other: object) -> bool:
    """Whether two values of `section.key` train to the same bits; it is marked at the key."""
    same = same_training(section, key)
    return one in same and other in same


def same_training(section: str, key: str) -> list[object]:
    """Values of `section.key` that train to the same bits as each other; often there are none."""
    marks = _section(section).model_fields[key].metadata
    return [value for mark in marks if isinstance(mark, SameTraining) for value in mark.values]


def mark_of(section: str, key: str) -> str | None:
    """How a key may change when a run is resumed; None where a change makes it another run."""
    whole, part = Config.model_fields[section], _section(section).model_fields[key]
    marks = (*whole.metadata, *part.metadata)
    return next((mark for mark in (SAID_ON_RESUME, FREE_ON_RESUME) if mark in marks), None)


def _section(name: str) -> type[BaseModel]:
    model = Config.model_fields[name].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return model


def _file_name(text: str) -> str:
    """The text made valid as `run.name`: a config file's name may have spaces and accents."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip("._-")


def _explain(error: ErrorDetails) -> str:
    """One line for one of pydantic's errors."""
    where = ".".join(str(part) for part in error["loc"])
    kind = error["type"]
    if kind == "extra_forbidden":
        *section, key = (str(part) for part in error["loc"])
        names = list((_section(section[0]) if section else Config).model_fields)
        near = difflib.get_close_matches(key, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"
        return f"unknown config key {where}={error['input']!r}; {hint}"
    if kind == "missing":
        return f"config key {where} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"config {where}: {message}" if where else f"config: {message}"
    return f"config key {where}={error['input']!r}: {message[0].lower()}{message[1:]}"
