"""How long a step takes, part by part, from counted work and measured rates."""

import json
from dataclasses import dataclass

from scripts.plan import work
from scripts.plan.machines import COLLECTIVE_SHARE, MEASURED_ON, Machine
from scripts.plan.rates import Rates
from train.planning.memory import FIT
from train.planning.shapes import Shape

COMPUTING = ("attention", "dense GEMMs", "expert GEMMs", "expert weight gradients")
MOVING = ("experts' rows", "rest of the layers", "optimizer", "weights prepared", "FSDP's copies")
WAITING = ("waiting for counts",)
LINKS = ("dispatch, NVLink", "dispatch, network", "gather and reduce, waited for")

ONCE = ("optimizer", "weights prepared", "FSDP's copies")
"""Parts during which nothing else runs."""

BACKWARD = 2 / 3
"""Share of a micro-batch's time that its backward pass takes, about."""


@dataclass(frozen=True)
class Fit:
    """What is fitted and not counted."""

    passes: float
    """Over the residual stream, a layer: norms, positions, residuals, router, loss, launches."""
    stock_share: float
    """Share of cuBLAS's dense FP8 rate that TransformerEngine's GEMM for all experts reaches."""


def fitted() -> Fit:
    """Read the fit from docs/results/plan_fit.json. Raises OSError, KeyError, ValueError."""
    return Fit(**json.loads(FIT.read_text(encoding="utf-8"))["time"])


def parts_ms(shape: Shape, machine: Machine, rates: Rates, fit: Fit) -> dict[str, float]:
    """Milliseconds of an optimizer step by part; they add up to it."""
    count = shape.micro_batches
    waits = shape.waits * (2 if shape.moe.recompute else 1)
    slower = MEASURED_ON.bandwidth / machine.bandwidth

    def moving(size: float, rate: float = rates.moving) -> float:
        return size / rate * slower

    flops = work.flops(shape)
    gemm, wgrad = gemm_rates(shape, rates, fit)
    seconds = {
        "attention": count * flops["attention"] / rates.attention,
        "dense GEMMs": count * flops["dense GEMMs"] / rates.dense,
        "expert GEMMs": count * flops["expert GEMMs"] / gemm,
        "expert weight gradients": count * flops["expert weight gradients"] / wgrad,
        "experts' rows": count * moving(work.moved(shape)),
        "rest of the layers": count * moving(fit.passes * work.streamed(shape)),
        "optimizer": moving(work.optimizer_bytes(shape), rates.optimizer),
        "weights prepared": moving(work.prepared_bytes(shape)),
        "FSDP's copies": moving(work.copied_bytes(shape)),
        "waiting for counts": count * waits * shape.model.num_layers * rates.wait_ms / 1e3,
    }
    sent = work.dispatched(shape)
    network = machine.network * COLLECTIVE_SHARE
    seconds["dispatch, NVLink"] = count * sent["node"] / rates.dispatch
    seconds["dispatch, network"] = count * sent["network"] / network
    computing = sum(value for name, value in seconds.items() if name not in ONCE)
    seconds["gather and reduce, waited for"] = waited(shape, machine, computing / count)
    return {name: value * 1e3 for name, value in seconds.items()}


def layer_ms(shape: Shape, machine: Machine, rates: Rates, fit: Fit) -> float:
    """Milliseconds of the experts of one layer alone, forward and backward, as
    `scripts.bench.layer` times them: weights, in BF16 there, are prepared for each pass."""
    parts = parts_ms(shape, machine, rates, fit)
    names = ("expert GEMMs", "expert weight gradients", "experts' rows", "waiting for counts")
    prepared = 0 if shape.linear == "bf16" else shape.experts * 2 * work.HALF
    return sum(parts[name] for name in names) + prepared / rates.moving * 1e3


def gemm_rates(shape: Shape, rates: Rates, fit: Fit) -> tuple[float, float]:
    """Rates of the experts' GEMMs, and of those of their weight gradients."""
    if shape.linear == "bf16":
        return rates.bf16, rates.bf16_wgrad
    if shape.linear == "direct":
        return rates.fp8, rates.bf16_wgrad
    stock = rates.stock_fp8 * fit.stock_share
    return stock, stock


def waited(shape: Shape, machine: Machine, seconds: float) -> float:
    """What a step waits for gathering and reducing, beyond the pass that each overlaps with;
    `seconds` are those that a micro-batch computes."""
    speeds = {
        "all": _speed(shape, machine, 1),
        "replicas": _speed(shape, machine, shape.expert_ranks),
    }
    gather, reduce = (
        sum(size / speeds[who] for who, size in found.items())
        for found in (work.gathered_bytes(shape), work.reduced_bytes(shape))
    )
    backward, forward = seconds * BACKWARD, seconds * (1 - BACKWARD)
    again = gather / 2 if shape.reshard else 0.0
    before_last = shape.micro_batches - 1
    return (
        shape.micro_batches * max(0.0, gather - again - forward)
        + before_last * max(0.0, again - backward)
        + max(0.0, again + reduce - backward)
    )


def _speed(shape: Shape, machine: Machine, apart: int) -> float:
    """Bytes a second at which a collective of every `apart`-th rank goes through a GPU.

    Between nodes its ranks on a node share that node's adapters: with all 8 it has all 8.
    """
    nvlink = machine.nvlink * COLLECTIVE_SHARE
    if shape.ranks <= shape.node:
        return nvlink
    of_a_node = max(1, shape.node // apart)
    return min(nvlink, of_a_node * machine.network * COLLECTIVE_SHARE)


KINDS = {
    "tensor cores": COMPUTING,
    "GPU memory": MOVING,
    "host": WAITING,
    "NVLink": LINKS[:1],
    "network": LINKS[1:],
}
"""Which parts each of them bounds; what is waited for in a collective, the slower link."""


def bounds(parts: dict[str, float]) -> dict[str, float]:
    """By what bounds it, the share of a step, the largest first."""
    total = sum(parts.values())
    shares = {kind: sum(parts[name] for name in names) / total for kind, names in KINDS.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))
