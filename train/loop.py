"""The training loop, one for CPU and GPU.

To read this repository from the top, start at `step`: from there to the model (models/gpt.py), its
experts (models/moe/experts.py), the path that tokens take to them (models/moe/paths/), and the
operations that the path is made of (models/fp8/).
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch.distributed.fsdp import FSDPModule

from models.fp8 import overflow
from models.gpt import GPT, build_gpt
from models.moe import balance
from train import dropless, parallel
from train.agreement import agree
from train.checkpoint import hf_reader
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.files import folder_of, newest
from train.config import Config
from train.data.batches import Batch, Corpus
from train.data.tokenizer import Tokenizer
from train.failure import NotFinite, Preempted, TrainingFailed
from train.metrics import flops
from train.metrics.environment import device_name
from train.metrics.recorder import Recorder, describe
from train.metrics.step import StepMetrics
from train.metrics.throughput import Meter, peak_bf16_flops
from train.optim import (
    DTYPES,
    build_optimizer,
    clip_gradients,
    follow_keys,
    learning_rate,
    set_learning_rate,
    takes_grad_scale,
)
from train.parallel import Ranks
from train.preflight import resolve_device, resolve_dtype
from train.profiling.step import PartMaker, StepProfiler, untimed
from train.safety import workers
from train.safety.guards import Safety
from train.safety.lifeline import Lifeline
from train.safety.nonfinite import LossGuard
from train.safety.watchdog import MARGIN_S


@dataclass
class Training:
    """What a training step works on, on one rank."""

    config: Config
    ranks: Ranks
    model: GPT
    optimizer: torch.optim.Optimizer
    done: int = 0
    """Optimizer steps so far, those before a resume included."""
    metrics: StepMetrics = field(init=False)
    """The model's metrics, until they are logged."""
    guard: LossGuard = field(init=False)
    """Notes losses and gradients that are not finite."""
    valid_bytes: int | None = None
    """Bytes of text in this rank's share of the validation sequences; counted once."""

    def __post_init__(self) -> None:
        accumulation = self.config.accumulation(self.ranks.world_size)
        self.metrics = StepMetrics(self.model, accumulation)
        self.guard = LossGuard(self.config, self.ranks, self.model)


def train(config: Config, corpus: Corpus) -> None:
    """Train to `config.train.steps`, from the run folder's newest checkpoint if it has one."""
    timeout_s = config.parallel.timeout_s + MARGIN_S
    peers = parallel.meet(timeout_s)
    if agree(peers, config, corpus):  # the run is finished
        return
    with Lifeline(peers) as lifeline:
        ranks = parallel.start(
            resolve_device(config),
            config.parallel.expert_parallel,
            config.train.seed,
            timeout_s,
            peers,
        )
        train_together(config, corpus, ranks, lifeline)
        parallel.stop()


def train_together(config: Config, corpus: Corpus, ranks: Ranks, lifeline: Lifeline) -> None:
    """All that the ranks do as one group."""
    model, optimizer = build(config, ranks)

    checkpointer = Checkpointer(
        config.run_dir, config, ranks, model, optimizer, corpus.fingerprint()
    )
    first_step, gathered = checkpointer.restore()
    follow_keys(optimizer, config.optim)
    training = Training(config, ranks, model, optimizer, done=first_step)
    if gathered:
        training.metrics.load_state(gathered)

    recorder = describe(config, ranks, model.runtime.description, corpus.describe(), first_step)
    if recorder:
        checkpointer.before_next = recorder.artifacts.look
    meter = Meter(
        flops.count(config.model, config.moe).flops_per_token,
        ranks.world_size,
        ranks.device,
        config.train.warmup_steps,
        peak_bf16_flops(device_name(ranks.device)),
    )
    batches = corpus.train_batches(ranks.rank, ranks.world_size, first_step)
    with Safety(config, ranks, model, lifeline) as safety:
        try:
            train_steps(training, corpus, batches, checkpointer, meter, recorder, safety)
        except BaseException as error:
            if isinstance(error, NotFinite):  # all ranks are here, and the good state is kept
                checkpointer.wait()
            lifeline.leave()
            give_up(error, recorder, safety)
            raise
        finally:
            workers.end(batches)
    if recorder:
        recorder.finish(meter.summary())
    model.runtime.dispatcher.close()
    lifeline.leave()  # from here on others may end, and rank 0 may take the store with it
    dist.barrier()


def build(config: Config, ranks: Ranks) -> tuple[GPT, torch.optim.Optimizer]:
    """The model, sharded over the ranks, and its optimizer; initial weights are from the seed, or
    from `model.init_from`."""
    device, dtype = ranks.device, resolve_dtype(config, ranks.device.type)
    model = build_gpt(
        config.model, config.moe, device, config.train.seed, config.train.deterministic
    )
    if config.model.init_from is not None and not has_checkpoint(config):
        hf_reader.load(hf_reader.source(config), model, ranks.is_first)
    parallel.shard(
        *(model, ranks, dtype, config.parallel.reshard_after_forward),
        DTYPES[config.optim.grad_dtype],
    )
    return model, build_optimizer(model, config.optim, device.type == "cuda", dtype)


def has_checkpoint(config: Config) -> bool:
    """Whether the run is resumed from a checkpoint, as rank 0 sees it: rank 0 also decides
    later."""
    found = [newest(folder_of(config.run_dir)) is not None]
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    return found[0]


def train_steps(
    training: Training,
    corpus: Corpus,
    batches: Iterator[Batch],
    checkpointer: Checkpointer,
    meter: Meter,
    recorder: Recorder | None,
    safety: Safety,
) -> None:
    """Run all steps that are left. Raises Preempted after a step at which it is to stop."""
    config, ranks, metrics = training.config, training.ranks, training.metrics
    tokens_per_step = config.tokens_per_step(ranks.world_size)
    profiler = StepProfiler(
        training.model, config.train, ranks.device, config.run_dir, ranks.is_first
    )
    meter.start()
    first = training.done + 1
    while training.done < config.train.steps:
        number = training.done + 1
        due = due_after(number, config)
        rate = learning_rate(training.done, config.train.steps, config.optim)
        set_learning_rate(training.optimizer, rate)
        metrics.routing.watch(entropy=due.log)
        traced = profiler.traces(number)
        with meter.pause() if traced else nullcontext(), profiler.step(number, due.log) as part:
            data_seconds = step(training, batches, part)
        if not traced:
            meter.step(tokens_per_step, data_seconds)

        if number == first and 0 < config.checkpoint.every < config.train.steps:
            checkpointer.allocate()
        stopping = safety.stop.agreed()
        # Good checkpoints are not rotated away by a state that may be lost already.
        saving = due.save and not stopping and not training.guard.skipped_in_a_row
        if due.log or due.validate or saving or due.is_last or stopping:
            training.guard.check()
        row: dict[str, float] = {}
        if due.log:
            row |= metrics.collect(rate) | meter.interval() | profiler.metrics()
            row |= checkpointer.metrics()
        if due.validate:
            with meter.pause():
                row |= validate(training, corpus)
        if row and recorder:
            recorder.write(number, number * tokens_per_step, row)
        if recorder and due.log and recorder.wants_picture(number):
            with meter.pause():
                recorder.picture(metrics.routing.row(number))
        if saving:
            with meter.pause():
                checkpointer.save(number, metrics.state())
        if stopping and not due.is_last:
            checkpointer.finish(number, metrics.state())
            safety.stop.answer()
            raise Preempted(
                f"stopped by {stopping} after step {number} of {config.train.steps}, which is "
                "saved; the same command resumes from there"
            )
    if config.checkpoint.at_end:
        # It can have started past its last step: train.steps was lowered, and the newest checkpoint
        # is damaged.
        checkpointer.finish(training.done, metrics.state())
    else:
        checkpointer.wait()


class Due(NamedTuple):
    """What follows a step."""

    log: bool
    validate: bool
    save: bool
    """Whether to save while training continues; at the end or on a signal the run is always
    saved."""
    is_last: bool


def due_after(number: int, config: Config) -> Due:
    """What the config asks for after step `number`, counted from 1; after the last one,
    everything."""
    is_last = number == config.train.steps
    checkpoint = config.checkpoint

    def every(steps: int) -> bool:
        return steps > 0 and (number % steps == 0 or is_last)

    return Due(
        log=every(config.train.log_every),
        validate=every(config.train.valid_every),
        save=bool(checkpoint.every)
        and number % checkpoint.every == 0
        and not (is_last and checkpoint.at_end),
        is_last=is_last,
    )


def step(training: Training, batches: Iterator[Batch], part: PartMaker = untimed) -> float:
    """One optimizer step; returns the seconds it waited for data. `part` times parts of it."""
    config, ranks, model = training.config, training.ranks, training.model
    optimizer, metrics, guard = training.optimizer, training.metrics, training.guard
    accumulation = config.accumulation(ranks.world_size)
    guard.begin(training.done)
    # The stock auxiliary losses are means over a micro-batch, while gradients are summed.
    # Filled on the device: copying a number to a GPU would wait for all of its queued work.
    MoEAuxLossAutoScaler.set_loss_scale(
        torch.full((), 1 / (accumulation * ranks.world_size), device=ranks.device)
    )
    room = model.runtime.room
    taken = Taken(batches, accumulation, ranks.device, keep=room is not None)
    attempt = partial(add_gradients, training, taken)
    if room is None:
        total = attempt()
    else:
        total = dropless.at_most_twice(attempt, room, metrics, guard, optimizer)
    with part("optimizer"):
        norm = clip_gradients(list(model.parameters()), config.optim.clip_grad, optimizer)
        guard.note(accumulation, norm)
        if guard.skips_this_step():
            metrics.skipped += 1
            if takes_grad_scale(optimizer):
                optimizer.grad_scale = None  # type: ignore[attr-defined]  # this step's, so NaN
            if config.moe.expert_bias:
                balance.forget(model.moe_layers())
        else:
            metrics.loss += total
            metrics.grad_norm = norm
            model.forget_prepared_weights()
            optimizer.step()
            if config.moe.expert_bias:
                balance.update(model.moe_layers(), config.moe.bias_update_rate)
        optimizer.zero_grad(set_to_none=True)
    metrics.steps += 1
    training.done += 1
    return taken.seconds


class Taken:
    """A step's micro-batches on the device: read from the data when first needed and, where they
    are kept, the same ones when asked again."""

    def __init__(
        self, batches: Iterator[Batch], count: int, device: torch.device, keep: bool
    ) -> None:
        self.seconds = 0.0
        """Seconds waited for data."""
        self._batches, self._count, self._device, self._keep = batches, count, device, keep
        self._taken: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self._count):
            if number < len(self._taken):
                yield self._taken[number]
                continue
            begin = time.perf_counter()
            batch = next(self._batches)
            self.seconds += time.perf_counter() - begin
            batch = batch.to(self._device)
            if self._keep:
                self._taken.append(batch)
            yield batch


def add_gradients(training: Training, batches: Iterable[Batch]) -> torch.Tensor:
    """Forward and backward of a step's micro-batches; this rank's share of the mean loss."""
    config, ranks, model = training.config, training.ranks, training.model
    accumulation = config.accumulation(ranks.world_size)
    tokens_per_step = config.tokens_per_step(ranks.world_size)
    total = torch.zeros((), device=ranks.device)
    for micro_batch, batch in enumerate(batches):
        is_last = micro_batch == accumulation - 1
        # Gradients are reduced once a step, with the last micro-batch; weights stay gathered until
        # then.
        model.set_requires_gradient_sync(is_last)
        model.set_reshard_after_backward(is_last or config.parallel.reshard_after_forward)
        loss = losses(model, batch, config).sum() / tokens_per_step
        if is_last and model.runtime.room is not None:
            model.runtime.room.send()
        loss.backward()
        training.guard.note(micro_batch, loss)
        total += loss.detach()
    return total


def losses(model: GPT, batch: Batch, config: Config) -> torch.Tensor:
    """Cross-entropy of each token, float32 [micro_batch, seq_len]."""
    documents = batch.documents if config.data.document_mask else None
    return model(batch.tokens, batch.labels, documents)


def validate(training: Training, corpus: Corpus) -> dict[str, float]:
    """Over the validation batches, the same sequences every time: `means` of all ranks' sums."""
    model, ranks = training.model, training.ranks
    model.eval()
    batches = corpus.valid_batches(ranks.rank, ranks.world_size)
    tokenizer = corpus.tokenizer if training.valid_bytes is None else None
    total = sum_losses(model, batches, tokenizer, training.config, ranks.device)
    if training.valid_bytes is None:
        training.valid_bytes = int(total[2])
    total[2] = training.valid_bytes
    dist.all_reduce(total)
    model.train()
    # Nothing else would free gathered weights, since no backward pass follows.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return means(total)


@torch.no_grad()
def sum_losses(
    model: GPT,
    batches: Iterable[Batch],
    tokenizer: Tokenizer | None,
    config: Config,
    device: torch.device,
) -> torch.Tensor:
    """Evaluate batches on the host: the sum of the tokens' losses, the number of tokens, and, with
    a tokenizer, the bytes of text; float64 [3] on the device. The loss is infinite where FP8 hid an
    infinity."""
    total = torch.zeros(3, dtype=torch.float64, device=device)
    hidden = overflow.note_on(device).zero_()  # whatever the process computed before
    with model.runtime.uncounted():  # logged metrics are of training only
        for batch in batches:
            if tokenizer is not None:
                total[2] += sum(tokenizer.count_bytes(row) for row in batch.labels.numpy())
            found = losses(model, batch.to(device), config)
            total[0] += found.sum()
            total[1] += found.numel()
    total[0] += torch.where(hidden != 0, torch.inf, 0)  # as it would be if FP8 did not hide it
    hidden.zero_()
    return total


def means(total: torch.Tensor) -> dict[str, float]:
    """The mean loss of a token and bits per byte of text, which are comparable across tokenizers,
    from what `sum_losses` returned."""
    loss, tokens, text_bytes = total.tolist()
    found = {"loss/valid": loss / tokens}
    if text_bytes:
        found["loss/valid_bpb"] = loss / text_bytes / math.log(2)
    return found


def give_up(error: BaseException, recorder: Recorder | None, safety: Safety) -> None:
    """End the steps early: nothing that was logged is lost, and no rank exits too soon."""
    safety.watchdog.close()  # the steps are over
    if recorder:
        recorder.give_up(error.exit_code if isinstance(error, TrainingFailed) else 1)
    if isinstance(error, Preempted):
        # torchrun ends all ranks when the first has ended, and rank 0 may still be uploading.
        safety.stop.wait_for_all()
