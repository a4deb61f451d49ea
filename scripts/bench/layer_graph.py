"""One MoE layer, forward and backward, as a CUDA graph: what launching kernel by kernel costs.

A graph is launched once by the host, however many kernels it has. It can be captured where the host
never waits for the GPU in between, which takes room set aside for the experts' rows
(`moe.capacity`) and a path whose GEMMs read the rows per expert on the device.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.moe.runtime import Runtime
from scripts.bench import results
from scripts.bench.layer_setup import Layer

CAPACITY = 1.02
"""Enough for even routing."""


def can_capture(runtime: Runtime) -> bool:
    """Whether nothing in a layer waits for the GPU, or would if room were set aside."""
    return not runtime.linear.NEEDS_SEGMENTS_ON_HOST


def call(layer: Layer, runtime: Runtime) -> list[Tensor]:
    """The layer's output and its gradients."""
    output = layer.forward(runtime)
    return [output.detach(), *layer.backward(output)]


def capture(layer: Layer, runtime: Runtime) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The graph of `call`, and the tensors that each replay fills. Raises what CUDA raises."""
    # Calls before it, which compile kernels, run on a stream of their own, as capturing asks.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(layer, runtime)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled = call(layer, runtime)
    return graph, filled


def measure(layer: Layer, runtime: Runtime, calls: int) -> dict[str, Any]:
    """Milliseconds of forward and backward together, launched one by one and as a graph."""
    roomy = replace(runtime, capacity=CAPACITY)
    try:
        graph, _ = capture(layer, roomy)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return {"error": str(error).strip().partition("\n")[0][:200]}
    row = {}
    for name, launch in (("eager_ms", lambda: call(layer, roomy)), ("graph_ms", graph.replay)):
        times = []
        for _ in range(calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            launch()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        row[name] = results.spread(times)
    return row
