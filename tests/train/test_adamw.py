"""AdamW that prepares experts' weights: PyTorch's steps, and the bits of a pass of its own."""

import pytest
import torch
from torch import Tensor

from models.fp8.reference.adamw import AdamWStep, adamw
from models.fp8.tensor import BlockScaledWeights
from models.gpt import build_gpt
from models.moe.experts import _local, prepare_weights
from models.moe.paths import PATHS
from tests.support.ranks import read_metrics, run_ranks, run_train
from tests.support.tiny import argv
from train import parallel
from train.config import load
from train.optim import OwnAdamW, build_optimizer, clip_gradients

CONFIG = "configs/demo_cpu.yaml"
ALONE = "parallel.expert_parallel=1"
PREPARED = "optim.prepare_weights=true"
KEYS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_steps_are_those_of_pytorch():
    w = torch.randn(37, 5)
    theirs = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([theirs], foreach=False, **KEYS)  # type: ignore[arg-type]
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    for number in range(1, 8):
        scale = torch.tensor(1.0 + number)
        gradient = torch.randn_like(w) * 10.0 ** torch.randint(-6, 3, w.shape)
        theirs.grad = gradient / scale
        optimizer.step()
        adamw(w, gradient, mean, square, AdamWStep(3e-3, 0.9, 0.95, 1e-8, 0.1, number, scale))
        torch.testing.assert_close(w, theirs.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_in_bfloat16_is_widened_and_the_moment_rounded_last(scaled):
    w, square = torch.randn(41, 7), torch.rand(41, 7)
    grad, mean = torch.randn(41, 7).bfloat16(), torch.randn(41, 7).bfloat16()
    wide, narrow = [
        (w.clone(), grad.to(dtype), mean.to(dtype, copy=True), square.clone())
        for dtype in (torch.float32, torch.bfloat16)
    ]
    scale = torch.tensor(2.5) if scaled else None
    for tensors in (wide, narrow):
        adamw(*tensors, AdamWStep(3e-3, 0.9, 0.95, 1e-8, 0.1, 4, scale))
    assert [t.dtype for t in narrow] == [torch.float32, *[torch.bfloat16] * 2, torch.float32]
    assert torch.equal(narrow[0], wide[0])
    assert torch.equal(narrow[2], wide[2].bfloat16())
    assert torch.equal(narrow[3], wide[3])
    assert not torch.equal(narrow[2], mean)


def train_a_little(rank: int, path: str) -> list[tuple[Tensor, Tensor]]:
    """Two steps on random data; after each, what is prepared beside what should be."""
    config = load(CONFIG, [f"moe.path={path}", ALONE, "run.name=a", PREPARED])
    torch.distributed.destroy_process_group()  # the next line starts one
    ranks = parallel.start("cpu", 1, 0, 60)
    model = build_gpt(config.model, config.moe, ranks.device, 0)
    parallel.shard(model, ranks, torch.float32, False)
    optimizer = build_optimizer(model, config.optim, False)
    assert isinstance(optimizer, OwnAdamW)
    found = []
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        norm = clip_gradients(list(model.parameters()), 1.0, optimizer)
        assert norm > 1
        optimizer.step()
        for layer in model.moe_layers():
            experts = layer.experts
            up, down = (_local(p) for p in (experts.up, experts.down))
            assert experts._prepared is not None
            want = prepare_weights(up, down, torch.float32, experts.runtime)
            for ours, theirs in zip(experts._prepared, want, strict=True):
                found += [pair for a, b in zip(ours, theirs, strict=True) for pair in bits(a, b)]
    return found


def bits(a, b) -> list[tuple[Tensor, Tensor]]:
    if isinstance(a, BlockScaledWeights):
        return [(a.data.view(torch.uint8), b.data.view(torch.uint8)), (a.scale_inv, b.scale_inv)]
    return [(a, b)]


@pytest.mark.parametrize("path", PATHS)
def test_what_is_prepared_is_what_a_pass_of_its_own_would_prepare(path):
    (pairs,) = run_ranks(1, train_a_little, path)
    assert len(pairs) >= 8
    assert all(torch.equal(a, b) for a, b in pairs)


def kind_of_optimizer(rank: int, ep: int, on_gpu: bool, *keys: str) -> tuple[bool, int]:
    """Whether it is our own, and how many layers' experts it prepares."""
    ep_key = f"parallel.expert_parallel={ep}"
    config = load(CONFIG, [ep_key, "run.name=a", "train.device=cpu", *keys])
    torch.distributed.destroy_process_group()  # the next line starts one
    ranks = parallel.start("cpu", ep, 0, 60)
    model = build_gpt(config.model, config.moe, ranks.device, 0)
    parallel.shard(model, ranks, torch.float32, False)
    optimizer = build_optimizer(model, config.optim, on_gpu)
    is_own = isinstance(optimizer, OwnAdamW)
    return is_own, len(optimizer._experts) if isinstance(optimizer, OwnAdamW) else 0


LAYERS = 2


@pytest.mark.parametrize(
    ("ep", "on_gpu", "keys", "want"),
    [
        (2, True, [], (True, LAYERS)),
        (2, False, [], (False, 0)),  # results of a CPU are those of PyTorch's
        (1, True, [], (False, 0)),  # replicas
        (2, True, ["optim.prepare_weights=false"], (False, 0)),
        (2, False, ["optim.prepare_weights=true"], (True, LAYERS)),
        (1, True, ["optim.grad_dtype=bf16"], (True, 0)),
        (2, False, ["optim.first_moment_dtype=bf16"], (True, 0)),
    ],
)
def test_auto_prepares_where_a_gpu_has_whole_experts(ep, on_gpu, keys, want):
    assert run_ranks(2, kind_of_optimizer, ep, on_gpu, *keys) == [want] * 2


@pytest.mark.slow
def test_baseline_and_compact_are_the_same_bits_prepared_too(tmp_path):
    found = []
    for path in ("fp8_baseline", "fp8_compact"):
        keys = [f"moe.path={path}", PREPARED, "train.steps=4"]
        assert run_train(2, argv(tmp_path, path, *keys)) == [0, 0]
        found.append([row["loss/train"] for row in read_metrics(tmp_path / path)])
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["bf16", "fp8_direct"])
def test_training_is_the_same_but_for_rounding_and_resumes_exactly(tmp_path, path):

    def train(name: str, steps: int, *more: str) -> list[float]:
        # A text that does not change with the code: what rounding does to FP8 depends on it.
        keys = [f"moe.path={path}", "optim.schedule=constant", f"train.steps={steps}", *more]
        keys.append("data.path=LICENSE")
        assert run_train(2, argv(tmp_path, name, *keys)) == [0, 0]
        return [row["loss/train"] for row in read_metrics(tmp_path / name)]

    prepared = train("prepared", 6, PREPARED)
    # A rounding can make another FP8 value of a weight.
    bound = 1e-4 if path == "bf16" else 1e-3
    assert prepared == pytest.approx(train("plain", 6), rel=bound)
    train("stopped", 3, PREPARED)
    assert train("stopped", 6, PREPARED) == prepared
