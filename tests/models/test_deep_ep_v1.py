"""DeepEP v1 against all-to-all over NCCL, on the same routing; and the reasons why it can't run.

The results must be equal bit for bit, the sums of `combine` included: both add float32 in the
order of the ranks and round to BF16 once.
"""

import sys
import types
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.moe.dispatch import Dispatcher
from models.moe.dispatch import deep_ep_v1 as ours
from models.moe.dispatch.all_to_all import AllToAll
from models.moe.dispatch.deep_ep import GUIDE
from models.moe.dispatch.deep_ep_v1 import DeepEPv1, unavailable
from tests.support.gpu_ranks import run_on_gpus

TOP_K = 8
LOCAL_EXPERTS = 8
TIMEOUT_S = 300


# Why it can't run: no GPU needed, the driver's and the package's answers are made up.


@pytest.fixture
def eight_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)


@pytest.fixture
def package(monkeypatch):
    class Config:
        def get_rdma_buffer_size_hint(self, row_bytes: int, ranks: int) -> int:
            raise RuntimeError("NVSHMEM is disabled")

    module = types.ModuleType("deep_ep")
    module.Buffer = types.SimpleNamespace(get_dispatch_config=lambda ranks: Config())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    return Config


def test_it_says_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unavailable(2, 2) == "no NVIDIA GPU is visible"


@pytest.mark.usefixtures("eight_gpus", "package")
@pytest.mark.parametrize(("ranks", "on_node"), [(2, 2), (2, 8), (4, 4), (8, 8)])
def test_nothing_speaks_against_one_node(ranks, on_node):
    assert unavailable(ranks, on_node, 2048, 2, 8, 128 // ranks) is None


@pytest.mark.usefixtures("eight_gpus", "package")
@pytest.mark.parametrize(
    ("ranks", "on_node", "shape", "said"),
    [
        (1, 1, (), "nobody to send to"),
        (3, 3, (), "takes 2, 4 or 8"),
        (6, 8, (), "takes 2, 4 or 8"),
        (4, 6, (), "don't divide a node's 6"),
        (8, 4, (), "needs nodes of 8"),
        (24, 8, (), "16, 32, 64, 128, 144 or 160 ranks"),
        (16, 8, (), "without NVSHMEM"),
        (2, 2, (8192, 2), "rows of 16384 bytes"),
        (2, 2, (128, 2), "multiples of 256"),
        (2, 2, (128, 1), "multiples of 256"),
        (2, 2, (256, 1, 33), "top_k 33"),
        (2, 2, (256, 1, 8, 129), "129 experts on a rank"),
    ],
)
def test_what_speaks_against_it(ranks, on_node, shape, said):
    reason = unavailable(ranks, on_node, *shape)
    assert reason is not None
    assert said in reason
    assert "\n" not in reason


@pytest.mark.usefixtures("eight_gpus", "package")
@pytest.mark.parametrize("shape", [(7936, 2), (8192, 1), (256, 1, 32, 128)])
def test_the_largest_that_it_takes(shape):
    assert unavailable(2, 2, *shape) is None


@pytest.mark.usefixtures("eight_gpus")
def test_several_nodes_with_nvshmem(package, monkeypatch):
    monkeypatch.setattr(package, "get_rdma_buffer_size_hint", lambda *_: 1)
    assert unavailable(16, 8) is None


@pytest.mark.usefixtures("eight_gpus")
def test_a_missing_package_and_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", None)  # an import of it now fails
    reason = unavailable(2, 2)
    assert reason == f"the package deep_ep is missing; {GUIDE}"


@pytest.mark.usefixtures("eight_gpus")
def test_a_package_without_its_compiled_half(monkeypatch, tmp_path):
    (tmp_path / "deep_ep.py").write_text("import deep_ep_cpp")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    monkeypatch.setitem(sys.modules, "deep_ep_cpp", None)
    assert "does not load" in (unavailable(2, 2) or "")


@pytest.mark.usefixtures("eight_gpus", "package")
def test_gpus_without_a_way_to_each_other(monkeypatch):
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a, b) != (1, 3))
    assert unavailable(2, 2) is None  # GPU 3 has no part in it
    assert "GPU 1 can't read the memory of GPU 3" in (unavailable(4, 4) or "")


def test_rows_that_would_trap_on_the_gpu_are_refused_here():
    for tensors in (
        (torch.zeros(3, 8192, dtype=torch.bfloat16),),
        (torch.zeros(3, 128, dtype=torch.bfloat16),),
        (torch.zeros(3, 256), torch.zeros(3, 1), torch.zeros(3, 1)),
    ):
        with pytest.raises(ValueError, match="DeepEP"):
            ours._as_argument(tensors)


# Against all-to-all.


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_all_to_all_gives_the_same(ranks, tmp_path):
    if (reason := unavailable(ranks, ranks)) is not None:
        pytest.skip(reason)
    run_on_gpus(ranks, on_rank, tmp_path, TIMEOUT_S, collective_s=60)


def on_rank(rank: int, ranks: int) -> None:
    group = dist.distributed_c10d._get_default_group()
    for hidden, repeats in ((256, 5), (2048, 20), (7168, 5)):
        both = (
            DeepEPv1(group, ranks * LOCAL_EXPERTS, hidden),
            AllToAll(group, ranks * LOCAL_EXPERTS),
        )
        for tokens, only in cases(ranks):
            for seed in range(repeats):
                generator = torch.Generator("cuda").manual_seed(1000 * seed + rank)
                # Two batches under way at once, as two layers are in a backward pass.
                batches = [
                    Batch(tokens[(rank + i) % ranks], ranks, hidden, only, generator)
                    for i in range(2)
                ]
                compare(*both, batches)
        waits_for_its_own_rows(both[0], ranks, hidden)
        both[0].close()
        both[0].close()  # a second time does nothing


def waits_for_its_own_rows(deep_ep: DeepEPv1, ranks: int, hidden: int) -> None:
    """Also where dispatches that nobody waits for are still queued on the GPU."""
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    many, few = (Batch(tokens, ranks, hidden, None, generator) for tokens in (255, 7))
    (want, *_), *_ = deep_ep.dispatch((few.x,), few.ids, few.weights)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # about half a second
    for _ in range(3):
        deep_ep.dispatch((many.x,), many.ids, many.weights, wait=False)
    (got, *_), *_ = deep_ep.dispatch((few.x,), few.ids, few.weights)
    assert torch.equal(got, want)


def cases(ranks: int) -> Iterator[tuple[list[int], int | None]]:
    """Tokens of each rank, and the one rank that all go to, if so."""
    odd = [61, 17, 130, 1, 255, 3, 77, 9][:ranks]
    yield odd, None
    yield [0, *odd[1:]], None  # a rank that sends nothing
    yield odd, ranks - 1  # all others receive nothing
    yield [0] * (ranks - 1) + [1], 0  # one token in all
    yield [0] * ranks, None
    yield [4099] * ranks, None  # more than the buffers hold at once


class Batch:
    """Tokens of one rank in every form, random bits as FP8, and their random routing."""

    def __init__(
        self, tokens: int, ranks: int, hidden: int, only: int | None, generator: torch.Generator
    ) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda")

        data = torch.randint(256, (tokens, hidden), generator=generator, device="cuda")
        self.data = data.to(torch.uint8).view(torch.float8_e4m3fn)
        self.scales = normal(tokens, hidden // 128)
        self.x = normal(tokens, hidden).bfloat16()
        self.weights = normal(tokens, TOP_K)
        experts = ranks * LOCAL_EXPERTS
        choice = torch.arange(experts, device="cuda")
        if only is not None:
            choice = choice[only * LOCAL_EXPERTS : (only + 1) * LOCAL_EXPERTS]
        order = normal(tokens, len(choice)).argsort(1)[:, :TOP_K]
        self.ids = choice[order]


def compare(deep_ep: Dispatcher, all_to_all: Dispatcher, batches: list[Batch]) -> None:
    for fp8_first in (True, False):
        results = []
        for dispatcher in (deep_ep, all_to_all):
            dispatcher.bytes_sent = 0
            results.append(round_trips(dispatcher, batches, fp8_first))
            results[-1]["bytes sent"] = torch.tensor([dispatcher.bytes_sent])
        got, want = results
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert got[name].dtype == value.dtype, name
            assert got[name].shape == value.shape, name
            assert got[name].is_contiguous(), name
            assert torch.equal(bits(got[name]), bits(value)), name


def round_trips(dispatcher: Dispatcher, batches: list[Batch], fp8_first: bool) -> dict[str, Tensor]:
    """What a layer does to tokens and gradients: all out, and home again in reverse order."""
    results: dict[str, Tensor] = {}
    trips = []
    for i, batch in enumerate(batches):
        forms: list[tuple[Tensor, ...]] = [(batch.data, batch.scales), (batch.x,)]
        first, second = forms if fp8_first else reversed(forms)
        received, ids, weights, handle = dispatcher.dispatch(first, batch.ids, batch.weights)
        weights = weights.where(ids >= 0, 0)  # the others are nobody's business
        results |= {f"ids {i}": ids, f"weights {i}": weights}
        results |= {f"received {i}.{j}": tensor for j, tensor in enumerate(received)}
        trips.append((i, batch, second, weights, handle))
    for i, batch, second, weights, handle in reversed(trips):
        again = dispatcher.dispatch_again(second, handle)
        results |= {f"again {i}.{j}": tensor for j, tensor in enumerate(again)}
        (x,) = dispatcher.dispatch_again((batch.x,), handle)
        # Each rank gives its copies another factor, with bits enough that sums need rounding.
        y = (x.float() * (1.1 + dist.get_rank())).bfloat16()
        home, nothing = dispatcher.combine(y, handle)
        assert nothing is None
        home_with, home_weights = dispatcher.combine(y, handle, weights)
        assert home_weights is not None
        assert torch.equal(home_weights, batch.weights), "each weight returns to its place"
        results |= {f"home {i}": home, f"home with {i}": home_with}
        # Scales as they lie in a GEMM_READY tensor: what arrives is COMPACT anyway.
        transposed = batch.scales.T.contiguous().T
        results[f"strided {i}"] = dispatcher.dispatch_again((batch.data, transposed), handle)[1]
    return results


def bits(x: Tensor) -> Tensor:
    """To compare NaN with NaN, and 0 with -0."""
    return x.view(torch.uint8)
