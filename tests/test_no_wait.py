"""With room set aside for the experts' rows, a layer never makes the host wait for the GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from models.moe.experts import Runtime
from scripts.moe_layer import Layer, Shape
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


def results(layer: Layer, runtime: Runtime) -> list[Tensor]:
    output = layer.forward(runtime)
    return [output.detach(), *layer.backward(output)]


@pytest.mark.parametrize("path", ["bf16", "fp8_direct"])
def test_no_wait_and_the_same_result(layer, path):
    runtime = layer.runtime(path)
    want = results(layer, runtime)
    roomy = replace(runtime, capacity=1.25)
    results(layer, roomy)  # Triton may compile once more, which does wait
    torch.cuda.synchronize()
    runtime.counts.reset()
    with waiting_is_an_error():
        got = results(layer, roomy)
    assert int(runtime.counts.dropped_rows) == 0
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


class HalfTheRoom(Runtime):
    def max_rows(self, tokens: int, top_k: int, local_experts: int) -> int | None:
        return TOKENS * TOP_K // 2


@pytest.mark.parametrize("path", ["bf16", "fp8_direct"])
def test_what_finds_no_room_is_dropped_and_counted(layer, path):
    runtime = layer.runtime(path)
    runtime.counts.reset()
    tight = HalfTheRoom(**vars(runtime))
    output, d_tokens, *_ = results(layer, tight)
    # 256 rows of each of 8 experts, and room for those of the first four.
    assert int(runtime.counts.dropped_rows) == TOKENS * TOP_K // 2
    lost = (layer.ids >= 4).all(1)
    assert lost.any()
    assert (output[lost] == 0).all()
    assert (d_tokens[lost] == 0).all()
    assert (output[~lost] != 0).any(1).all()


def test_stock_paths_wait_whatever_the_capacity(layer):
    assert layer.runtime("fp8_compact").capacity is None
