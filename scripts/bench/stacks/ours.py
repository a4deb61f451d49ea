"""Our stack: the model and the step of `python -m train`, also with other operations or GEMMs."""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from models.config import PathName
from models.fp8 import operations
from models.fp8.operations import VARIANTS, Variant
from models.gpt import GPT, build_gpt
from models.moe.runtime import Runtime, why_not
from train import loop, parallel, preflight
from train.config import Config, ConfigError
from train.data.batches import Batch
from train.optim import DTYPES, build_optimizer
from train.parallel import Ranks


class Ours:
    """The model and the step of `python -m train`."""

    def __init__(self, config: Config, ranks: Ranks, flags: tuple[str, ...] = ()) -> None:
        """Raises ConfigError where the path cannot run here."""
        device = ranks.device.type
        reason = why_not(config.model, config.moe, device, config.parallel.expert_parallel)
        if reason:
            raise ConfigError(reason)
        self.config, self.ranks = config, ranks
        self.model = build_gpt(
            config.model, config.moe, ranks.device, config.train.seed, config.train.deterministic
        )
        for variant in VARIANTS:
            if variant in flags:
                use_operations(self.model, config.moe.path, device, variant)
        if "per_expert" in flags:
            use_gemms_per_expert(self.model)
        self.dispatch = self.model.runtime.dispatcher.name
        self.description = self.model.runtime.description
        dtype = preflight.resolve_dtype(config, device)
        parallel.shard(
            *(self.model, ranks, dtype, config.parallel.reshard_after_forward),
            DTYPES[config.optim.grad_dtype],
        )
        optimizer = build_optimizer(self.model, config.optim, device == "cuda", dtype)
        # One for all steps, since a new one begins to count at zero.
        self.training = loop.Training(config, ranks, self.model, optimizer)

    def step(self, batches: Iterator[Batch]) -> Tensor:
        self.training.metrics.loss.zero_()
        loop.step(self.training, batches)
        return self.training.metrics.loss.clone()

    def dropped_rows(self) -> int:
        counts = self.model.runtime.counts
        dropped, counts.dropped_rows = int(counts.dropped_rows), 0
        return dropped

    def redone_steps(self) -> int:
        metrics = self.training.metrics
        redone, metrics.redone = metrics.redone, 0
        return redone

    def waited_steps(self) -> int:
        metrics = self.training.metrics
        waited, metrics.waited = metrics.waited, 0
        return waited

    def room(self) -> float | None:
        room = self.model.runtime.room
        return room.share if room is not None and any(room.rows) else None

    def close(self) -> None:
        self.model.runtime.dispatcher.close()


def use_operations(model: GPT, path: PathName, device: str, variant: Variant) -> None:
    """Run the model's path with other operations."""
    chosen = operations.choose(path, device, variant)
    runtime = model.runtime.with_operations(chosen.operations, device)
    said = (chosen.description, runtime.linear.DESCRIPTION)
    description = "; ".join((*filter(None, said), f"dispatch by {runtime.dispatcher.name}"))
    use_runtime(model, replace(runtime, description=description))


def use_gemms_per_expert(model: GPT) -> None:
    """Use TransformerEngine's linear layer of an older cuBLAS: the host waits for the count of
    rows."""
    from models.fp8.te import TELinear

    runtime = model.runtime
    linear = TELinear(runtime.ops)
    description = runtime.description.replace(runtime.linear.DESCRIPTION, linear.DESCRIPTION)
    description += "; every layer waits for the count of its rows"
    use_runtime(model, replace(runtime.waiting(), linear=linear, description=description))


def use_runtime(model: GPT, runtime: Runtime) -> None:
    """Another runtime for a model and its layers."""
    model.config.moe_runtime = runtime
    for layer in model.moe_layers():
        layer.experts.runtime = runtime
