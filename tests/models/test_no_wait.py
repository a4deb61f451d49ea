"""With room reserved for the experts' rows, a layer never makes the host wait for the GPU."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from models.config import PATH_NAMES
from models.moe.runtime import Runtime
from scripts.bench.layer.setup import Layer, Shape
from train import parallel

pytestmark = pytest.mark.gpu

TOKENS, TOP_K = 1024, 2


@pytest.fixture
def layer() -> Iterator[Layer]:
    ranks = parallel.start("cuda", 1, 0, 60)
    torch.manual_seed(0)
    shape = Shape(hidden=512, ffn=256, experts=8, top_k=TOP_K)
    yield Layer(shape, TOKENS, ranks.device, "all_to_all")
    parallel_state.destroy_model_parallel()
    parallel.stop()


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def call(layer: Layer, runtime: Runtime) -> list[Tensor]:
    """The layer's output and its gradients."""
    output = layer.forward(runtime)
    return [output.detach(), *layer.backward(output)]


def capture(layer: Layer, runtime: Runtime) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The CUDA graph of `call`, and the tensors that each replay fills."""
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


@pytest.mark.parametrize("path", ["bf16", "fp8_direct"])
def test_no_wait_and_the_same_result(layer, path):
    runtime = layer.runtime(path)
    want = call(layer, runtime)
    roomy = replace(runtime, capacity=1.25)
    call(layer, roomy)  # Triton may compile once more, which does wait
    torch.cuda.synchronize()
    runtime.counts.reset()
    with waiting_is_an_error():
        got = call(layer, roomy)
    assert int(runtime.counts.dropped_rows) == 0
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_no_wait_with_room_by_what_was_needed(layer, path):
    """Asking all ranks whether it was enough does not wait either, until the answer is read."""
    runtime = layer.runtime(path)
    room = runtime.room
    if room is None:
        assert runtime.linear.NEEDS_SEGMENTS_ON_HOST
        assert "every layer waits" in runtime.description
        pytest.skip(runtime.description)
    results = []
    # To learn what is needed, what memory it takes, and of all ranks; to compile; and then.
    learn = (nullcontext, nullcontext, nullcontext, nullcontext)
    for waits in (*learn, waiting_is_an_error):
        torch.cuda.synchronize()
        with waits(), room.open(wait=False):
            output = layer.forward(runtime)
            room.send()
            results.append([output.detach(), *layer.backward(output)])
        assert not room.ran_out()
    assert room.rows[0] is not None
    for a, b in zip(results[-1], results[0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", ["bf16", "fp8_direct"])
def test_a_captured_layer_replays_the_same_bits(layer, path):
    """Also for other tokens and another routing than those it was captured with."""
    roomy = replace(layer.runtime(path), capacity=1.5)
    graph, filled = capture(layer, roomy)
    for _ in range(2):
        with torch.no_grad():
            layer.x.copy_(torch.randn_like(layer.x))
            layer.ids.copy_(layer.ids[torch.randperm(TOKENS, device="cuda")])
        graph.replay()
        got = [t.clone() for t in filled]
        for a, b in zip(got, call(layer, roomy), strict=True):
            assert torch.equal(a, b)


class HalfTheRoom(Runtime):
    def max_rows(self, layer: int, tokens: int, top_k: int, local_experts: int) -> int | None:
        return TOKENS * TOP_K // 2


@pytest.mark.parametrize("path", ["bf16", "fp8_direct"])
def test_what_finds_no_room_is_dropped_and_counted(layer, path):
    runtime = layer.runtime(path)
    runtime.counts.reset()
    tight = HalfTheRoom(**{**vars(runtime), "capacity": 1.0})
    output, d_tokens, *_ = call(layer, tight)
    # 256 rows of each of 8 experts, and room for those of the first four.
    assert int(runtime.counts.dropped_rows) == TOKENS * TOP_K // 2
    lost = (layer.ids >= 4).all(1)
    assert lost.any()
    assert (output[lost] == 0).all()
    assert (d_tokens[lost] == 0).all()
    assert (output[~lost] != 0).any(1).all()


def test_stock_paths_wait_whatever_the_capacity(layer):
    assert layer.runtime("fp8_compact").capacity is None
