"""A plan as tables for the terminal: memory, traffic and time, a column for each path."""

from collections.abc import Callable, Sequence

from scripts.plan.machines import ASSUMPTIONS, Machine
from scripts.plan.plan import Plan
from scripts.plan.traffic import traffic
from train.config import Config
from train.metrics import flops
from train.planning.memory import GIB

WIDTH = 14


def render(config: Config, gpus: int, machine: Machine, plans: Sequence[Plan], errors: str) -> str:
    """All of it; `errors` says how far plans were from what was measured."""
    blocks = [
        _head(config, gpus, machine, plans[0]),
        _memory(plans, machine),
        _traffic(plans),
        _time(plans),
        "\n".join(["assumed:", *(f"  {line}" for line in ASSUMPTIONS), errors]),
    ]
    return "\n\n".join(blocks)


def _head(config: Config, gpus: int, machine: Machine, plan: Plan) -> str:
    shape, count = plan.shape, flops.count(config.model, config.moe)
    nodes = -(-gpus // shape.node)
    lines = {
        "model": f"{count.total_params / 1e9:,.2f} billion parameters, "
        f"{count.active_params / 1e9:,.2f} active per token",
        "machine": f"{gpus} x {machine.name}, {nodes} node(s) of {shape.node}",
        "experts": f"{shape.local_experts} on each of {shape.expert_ranks} rank(s), "
        f"{shape.replicas} replica(s)",
        "batch": f"{shape.micro_batches} micro-batch(es) of {shape.micro_batch} sequences of "
        f"{shape.model.seq_len} a rank and step",
    }
    return "\n".join(f"{name:<10}{value}" for name, value in lines.items())


def _memory(plans: Sequence[Plan], machine: Machine) -> str:
    every = dict.fromkeys(name for plan in plans for name in plan.memory.parts)
    parts = sorted(every, key=lambda name: name == "overhead")  # last
    rows = [
        (name, [f"{plan.memory.parts.get(name, 0) / GIB:.2f}" for plan in plans])
        for name in parts
        if any(plan.memory.parts.get(name, 0) / GIB >= 0.005 for plan in plans)
    ]
    rows.append(("peak", [f"{plan.memory.total / GIB:.2f}" for plan in plans]))
    room = plans[0].room / GIB
    rows.append((f"fits in {room:.1f} GiB", [plan.verdict for plan in plans]))
    largest = ["none" if plan.largest is None else str(plan.largest) for plan in plans]
    rows.append(("largest micro-batch", largest))
    where: dict[str, list[str]] = {}
    for plan in plans:
        where.setdefault(plan.memory.name, []).append(plan.path)
    said = [
        f"  at the peak: {moment}" + f" ({', '.join(paths)})" * (len(where) > 1)
        for moment, paths in where.items()
    ]
    if any(plan.fits_by_waiting for plan in plans):
        said.append(
            "  waits: room for the experts' rows does not fit; steps that wait for their count do"
        )
    title = f"memory of a rank, GiB of {machine.memory / GIB:.1f}"
    return "\n".join([_table(title, plans, rows), *said])


def _traffic(plans: Sequence[Plan]) -> str:
    sent = [{(one.what, one.link): one.bytes for one in traffic(plan.shape)} for plan in plans]
    kinds = list(dict.fromkeys(kind for one in sent for kind in one))
    if not kinds:
        return "traffic   none: one rank is alone"
    rows = [
        (f"{what}, {link}", [f"{one.get((what, link), 0) / 1e9:.3f}" for one in sent])
        for what, link in kinds
    ]
    return _table("sent by a rank in a step, GB", plans, rows)


def _time(plans: Sequence[Plan]) -> str:
    rows = [
        (name, [f"{plan.ms[name]:.1f}" for plan in plans])
        for name in plans[0].ms
        if any(plan.ms[name] >= 0.05 for plan in plans)
    ]
    figures: list[tuple[str, Callable[[Plan], str]]] = [
        ("a step", lambda plan: f"{plan.step_ms:.1f}"),
        ("tokens/s/GPU", lambda plan: f"{plan.tokens_per_second:,.0f}"),
        ("TFLOP/s/GPU", lambda plan: f"{plan.tflops:.0f}"),
        ("most of it", lambda plan: next(iter(plan.bounds))),
    ]
    rows += [(name, [form(plan) for plan in plans]) for name, form in figures]
    return _table("time of a step, ms", plans, rows)


def _table(title: str, plans: Sequence[Plan], rows: Sequence[tuple[str, list[str]]]) -> str:
    wide = max(len(title), *(len(name) + 2 for name, _ in rows))
    head = f"{title:<{wide}}" + "".join(f"{plan.path:>{WIDTH}}" for plan in plans)
    body = [
        f"  {name:<{wide - 2}}" + "".join(f"{c:>{WIDTH}}" for c in cells) for name, cells in rows
    ]
    return "\n".join([head, *body])
