"""Kernels of one pass through an MoE layer, from torch.profiler's trace.

A trace is the list of events of a Chrome trace. Its host side tells which operator or range was
running when a kernel was launched; a kernel and its launch have the same correlation number.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from models.fp8.tensor import BLOCK
from models.moe.counts import Phase
from models.moe.runtime import Runtime
from scripts.bench.layer.setup import Layer
from scripts.bench.trace import Event, read
from train.profiling.moe import PARTS, timed_runtime
from train.profiling.timer import Timer

PASSES: tuple[Phase, ...] = ("forward", "backward")


class Relayouts(TypedDict):
    """How often one pass re-arranged scales, counted in several ways."""

    counted: int
    """By the path's own counter."""
    kernels_in_ranges: NotRequired[int]
    """Kernels launched inside `relayout`."""
    transposing_copies: NotRequired[int]
    """Operators that copied scales into the other order, found without looking at the two above."""
    kernels_of_copies: NotRequired[int]
    """Kernels that those operators launched."""
    kernel_names: NotRequired[dict[str, int]]
    kernel_us: NotRequired[float]
    agree: NotRequired[bool]
    """Whether all four counts are equal."""


class PassProfile(TypedDict):
    """Kernels of one pass; of a CPU, which launches none, relayouts alone."""

    relayouts: Relayouts
    kernels: NotRequired[int]
    kernels_by_part: NotRequired[dict[str, int]]


class Profile(TypedDict):
    """Kernels of a layer's forward and backward pass."""

    kernels_without_a_known_launch: NotRequired[int]
    """0 where the trace is whole; the counts are then complete."""
    forward: PassProfile
    backward: PassProfile


def trace(call: Callable[[], None], device: torch.device) -> list[Event]:
    """Events of one call. Inputs' types, shapes and strides are in them."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities, record_shapes=True) as recorded:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        return [event for event in read(path) if "dur" in event]


def ranges(events: list[Event], *names: str) -> list[Event]:
    """Ranges of `record_function` on the host, in order of time."""
    found = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in names]
    return sorted(found, key=lambda event: event["ts"])


def kernels(events: list[Event], *within: Event) -> list[Event]:
    """Kernels launched during any of the given host events; all kernels if none is given.

    Copies and fills that the driver makes without a kernel (memcpy, memset) are not among them.
    """
    found = [e for e in events if e.get("cat") == "kernel"]
    if not within:
        return found
    launches = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in within]
    return [
        e
        for e in found
        if (at := launches.get(e["args"]["correlation"])) is not None
        and any(start <= at <= end for start, end in spans)
    ]


def transposing_copies(events: list[Event], blocks: int, within: Event) -> list[Event]:
    """Copies of a float32 matrix with `blocks` rows or columns into the other order of memory.

    That is what a relayout of scales is, by types, shapes and strides alone: it uses no name and no
    range of this project.
    """
    found = []
    for event in events:
        if event.get("name") != "aten::copy_" or event.get("cat") != "cpu_op":
            continue
        if not within["ts"] <= event["ts"] <= within["ts"] + within["dur"]:
            continue
        args = event["args"]
        shapes, strides = args["Input Dims"][:2], args["Input Strides"][:2]
        if args["Input type"][:2] != ["float", "float"] or shapes[0] != shapes[1]:
            continue
        if len(shapes[0]) != 2 or blocks not in shapes[0] or min(shapes[0]) < 2:
            continue
        by_rows = [stride[0] > stride[1] for stride in strides]
        if by_rows[0] != by_rows[1]:
            found.append(event)
    return found


def profile_layer(layer: Layer, runtime: Runtime) -> Profile:
    """Kernels launched in either pass, in each part of it, and in re-arranging scales.

    The layer must have run before, so that everything is compiled. Copies that transpose scales are
    looked for in a pass through the layer without timers.

    On a CPU there are no kernels, and reference operations transpose scales when they write them:
    only `counted` is reported.
    """
    if layer.device.type == "cuda":
        _passes(layer, runtime)  # the first trace of a process includes the tracer's start
    plain = _passes(layer, runtime)
    before = runtime.counts.relayouts.copy()
    timer = Timer(layer.device, named=True)
    named = _passes(layer, timed_runtime(runtime, timer), timer)
    counted = {name: runtime.counts.relayouts[name] - before[name] for name in PASSES}
    if layer.device.type != "cuda":
        return {
            "forward": {"relayouts": {"counted": counted["forward"]}},
            "backward": {"relayouts": {"counted": counted["backward"]}},
        }
    blocks = layer.shape.hidden // BLOCK
    launched = kernels(plain, *ranges(plain, *PASSES))
    return {
        "kernels_without_a_known_launch": len(kernels(plain)) - len(launched),
        "forward": _pass_profile("forward", plain, named, blocks, counted["forward"]),
        "backward": _pass_profile("backward", plain, named, blocks, counted["backward"]),
    }


def _pass_profile(
    name: str, plain: list[Event], named: list[Event], blocks: int, counted: int
) -> PassProfile:
    """One pass, from a trace without timers and from one in which each part is a named range."""
    (plain_pass,), (named_pass,) = ranges(plain, name), ranges(named, name)
    inside = [r for r in ranges(named, *PARTS) if _contains(named_pass, r)]
    turning = [r for r in inside if r["name"] == "relayout"]
    copies = transposing_copies(plain, blocks, plain_pass)
    copy_kernels = kernels(plain, *copies) if copies else []
    in_ranges = kernels(named, *turning) if turning else []
    return {
        "relayouts": {
            "counted": counted,
            "kernels_in_ranges": len(in_ranges),
            "transposing_copies": len(copies),
            "kernels_of_copies": len(copy_kernels),
            "kernel_names": dict(Counter(e["name"] for e in copy_kernels)),
            "kernel_us": sum(e["dur"] for e in copy_kernels),
            "agree": counted == len(in_ranges) == len(copies) == len(copy_kernels),
        },
        "kernels": len(kernels(plain, plain_pass)),
        "kernels_by_part": {
            part: len(kernels(named, *of_part))
            for part in PARTS
            if (of_part := [r for r in _outermost(inside) if r["name"] == part])
        },
    }


def _passes(layer: Layer, runtime: Runtime, timer: Timer | None = None) -> list[Event]:
    """A trace of both passes, each a range of its name."""

    def call() -> None:
        if timer:
            timer.start()
        with record_function("forward"):
            output = layer.forward(runtime)
        with record_function("backward"):
            layer.backward(output)

    return trace(call, layer.device)


def _contains(outer: Event, inner: Event) -> bool:
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def _outermost(events: list[Event]) -> list[Event]:
    """Those that lie in no other: the parts as the timer counts them."""
    return [e for e in events if not any(e is not o and _contains(o, e) for o in events)]
