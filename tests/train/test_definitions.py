"""What is trained on and what is logged, against its definition."""

import math
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.ranks import Training, read_metrics
from tests.support.tiny import argv
from train.config import load
from train.metrics import flops

EXPERTS, TOP_K = 4, 2


def run(folder: Path, name: str, plant, *overrides: str) -> list[dict[str, float]]:
    keys = argv(folder, name, *overrides)
    with Training(2, keys, folder / "log", plant) as training:
        assert training.exit_codes() == [0, 0], training.log.read_text()
    return read_metrics(folder / name)


def saving_gradients(folder: Path):
    """The first step's gradients, whole, and what the first router had as input."""

    def plant(rank: int) -> None:
        from models.moe.layer import Router
        from train import loop

        step, clip, gating = loop.step, loop.clip_gradients, Router.gating
        inputs: list[Tensor] = []

        def recorded(router, x):
            inputs.append(x.detach().reshape(-1, x.shape[-1]).clone())
            return gating(router, x)

        def stepped(training, *args):
            def clipped(parameters, *rest):
                named = dict(training.model.named_parameters())
                if training.done == 0:
                    found = {
                        "gradients": {n: p.grad.full_tensor() for n, p in named.items()},
                        "router": training.model.moe_layers()[0].router.weight.full_tensor(),
                        "inputs": inputs,
                    }
                    torch.save(found, folder / f"rank_{rank}.pt")
                return clip(parameters, *rest)

            loop.clip_gradients = clipped
            return step(training, *args)

        Router.gating, loop.step = recorded, stepped  # type: ignore[method-assign]

    return plant


def saved(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


def router_gradient(found: dict) -> Tensor:
    (gradient,) = [g for name, g in found["gradients"].items() if name.endswith("router.weight")]
    return gradient


def aux_loss(logits: Tensor) -> Tensor:
    """Switch Transformer (arXiv:2101.03961), equation 4, with top_k choices a token:
    E * sum of f_i * P_i, where f_i is the share of the choices and P_i the mean probability."""
    probs = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(TOP_K).indices, 1.0)
    share = chosen.sum(0) / (len(logits) * TOP_K)
    return EXPERTS * (share * probs.mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """ST-MoE (arXiv:2202.08906), equation 5: the mean of logsumexp squared."""
    return logits.logsumexp(-1).square().mean()


def test_auxiliary_losses_are_what_they_are_defined_as(tmp_path):
    """Their values as logged, and their gradient at its full weight: with one layer, nothing
    before the router depends on its losses."""
    steps = ["train.steps=1", "optim.clip_grad=0"]
    run(tmp_path, "without", saving_gradients(tmp_path), *steps, "moe.aux_loss_coeff=0",
        "moe.z_loss_coeff=0")  # fmt: skip
    off = saved(tmp_path)
    on_keys = ["moe.aux_loss_coeff=1", "moe.z_loss_coeff=0.5"]
    (row,) = run(tmp_path, "with", saving_gradients(tmp_path), *steps, *on_keys)
    on = saved(tmp_path)

    weight = on[0]["router"].requires_grad_()
    every = [x.float() @ weight.t() for found in on for x in found["inputs"]]
    assert len(every) == 4, "two micro-batches on two ranks"
    aux = torch.stack([aux_loss(logits) for logits in every]).mean()
    z = torch.stack([z_loss(logits) for logits in every]).mean()
    assert row["loss/aux"] == pytest.approx(float(aux), rel=1e-5)
    assert row["loss/z"] == pytest.approx(float(z), rel=1e-5)
    (want,) = torch.autograd.grad(aux + 0.5 * z, weight)
    got = router_gradient(on[0]) - router_gradient(off[0])
    assert (got - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_are_summed_in_float32(tmp_path, dtype):
    """bfloat16 sums could be written in bfloat16 without a loss; float32 sums cannot."""
    keys = ["train.steps=1", f"train.dtype={dtype}", "parallel.expert_parallel=1"]
    run(tmp_path, "a", saving_gradients(tmp_path), *keys)
    for name, gradient in saved(tmp_path)[0]["gradients"].items():
        values = gradient[gradient != 0]
        assert gradient.dtype is torch.float32, name
        short = (values == values.bfloat16().float()).float().mean()
        assert short < 0.9, f"{name}: {short:.0%} of the values are bfloat16's"


def test_throughput_is_of_one_gpu_and_of_all(tmp_path):
    rows = run(tmp_path, "a", None, "train.steps=3", "train.warmup_steps=0")
    count = flops.count(
        *(getattr(load(tmp_path / "a" / "config.yaml"), s) for s in ("model", "moe"))
    )
    for row in rows:
        per_gpu = row["throughput/tokens_per_sec_per_gpu"]
        assert row["throughput/tokens_per_sec"] == pytest.approx(2 * per_gpu)
        want = per_gpu * count.flops_per_token / 1e12
        assert row["throughput/tflops_per_gpu"] == pytest.approx(want)
        seconds = 8 * 32 / row["throughput/tokens_per_sec"]  # sequences x tokens of a step
        assert row["time/step_ms"] == pytest.approx(1e3 * seconds)


def test_validation_is_no_training(tmp_path):
    """The model is told, so that nothing that training counts or adds is counted or added."""

    def plant(rank: int) -> None:
        from train import loop

        validate, losses = loop.validate, loop.losses
        modes: list[bool] = []

        def recorded(model, *args):
            modes.append(model.training)
            return losses(model, *args)

        def validated(training, corpus):
            layers = training.model.moe_layers()
            before = [layer.expert_load.clone() for layer in layers]
            modes.clear()
            loss = validate(training, corpus)
            assert modes, "nothing was validated on"
            assert not any(modes), "validated in training mode"
            assert training.model.training, "trains on in evaluation mode"
            after = [layer.expert_load for layer in layers]
            assert all(map(torch.equal, before, after)), "validation counts as load"
            return loss

        loop.validate, loop.losses = validated, recorded

    rows = run(tmp_path, "a", plant, "train.steps=3", "train.valid_every=2")
    assert ["loss/valid" in row for row in rows] == [False, True, True]


def test_bytes_of_validation_are_counted_once(tmp_path):
    """They are those of the same sequences every time."""

    def plant(rank: int) -> None:
        from train import loop
        from train.data.tokenizer import ByteTokenizer

        count, validate = ByteTokenizer.count_bytes, loop.validate
        counted: list[int] = []
        calls: list[int] = []

        def counting(self, ids):
            counted.append(count(self, ids))
            return counted[-1]

        def validated(training, corpus):
            row = validate(training, corpus)
            calls.append(len(counted))
            assert calls[0] > 0
            assert calls[-1] == calls[0], "counted again"
            assert row["loss/valid_bpb"] >= row["loss/valid"] / math.log(2)
            assert training.valid_bytes == sum(counted)
            return row

        ByteTokenizer.count_bytes = counting  # type: ignore[method-assign]
        loop.validate = validated

    rows = run(tmp_path, "a", plant, "train.steps=3", "train.valid_every=1")
    assert all("loss/valid_bpb" in row for row in rows)


@pytest.mark.parametrize(("capacity", "most"), [("null", 1), ("auto", 4)])
def test_micro_batches_are_kept_only_where_a_step_may_be_done_again(tmp_path, capacity, most):
    def plant(rank: int) -> None:
        from train import loop

        add_gradients, seen = loop.add_gradients, []

        def watched(training, batches):
            def noted():
                for batch in batches:
                    seen.append(weakref.ref(batch))
                    yield batch
                    del batch
                    with (tmp_path / f"alive on {rank}").open("a") as file:
                        file.write(f"{sum(ref() is not None for ref in seen)}\n")

            return add_gradients(training, noted())

        loop.add_gradients = watched

    keys = ("train.steps=2", "train.micro_batch=1", f"moe.capacity={capacity}")
    run(tmp_path, "a", plant, *keys)
    for rank in range(2):
        alive = [int(line) for line in (tmp_path / f"alive on {rank}").read_text().split()]
        assert max(alive) == most
