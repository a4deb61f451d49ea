"""Gradients summed and a first moment kept in BF16: near FP32, resumed exactly, exchangeable."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from scripts.bench.stacks.spec import config_of, parse
from tests.support.ranks import Training, read_metrics
from tests.support.tiny import TINY, Rows, argv, computed
from tests.train.test_resume import forget

KEYS = ["optim.schedule=constant", "train.steps=6", "model.num_layers=2"]
GRADS, MOMENT = "optim.grad_dtype=bf16", "optim.first_moment_dtype=bf16"
EP2 = "parallel.expert_parallel=2"
REPLICAS = "parallel.expert_parallel=1"
UNIT = 2.0**-8
"""What rounding to bfloat16 is off by, at most, as a part of the value."""


def train(folder: Path, name: str, ranks: int, *keys: str, plant=None) -> Rows:
    arguments = argv(folder, name, *KEYS, *keys)
    with Training(ranks, arguments, folder / f"{name}.log", plant) as training:
        assert training.exit_codes(120) == [0] * ranks, training.log.read_text()
    return read_metrics(folder / name)


def keep_gradients(folder: Path, experts_in: torch.dtype):
    """Write the first step's gradients before clipping, each rank its part of them, whose experts'
    come out of their GEMMs in a dtype."""

    def plant(rank: int) -> None:
        from train import loop

        step, clip = loop.step, loop.clip_gradients
        names = {}

        def named(training, *args):
            names.update({p: name for name, p in training.model.named_parameters()})
            linear = training.model.runtime.linear
            wgrad = linear.wgrad

            def asked(dy, x, offsets, dtype):
                assert dtype == experts_in
                return wgrad(dy, x, offsets, dtype)

            linear.wgrad = asked
            return step(training, *args)

        def kept(parameters, *args):
            file = folder / f"{rank}.pt"
            if not file.exists():
                grads = {names[p]: p.grad for p in parameters}
                assert all(isinstance(grad, DTensor) for grad in grads.values())
                torch.save({name: grad.to_local() for name, grad in grads.items()}, file)
            return clip(parameters, *args)

        loop.step, loop.clip_gradients = named, kept

    folder.mkdir()
    return plant


@pytest.mark.parametrize("path", ["bf16", "fp8_direct"])
@pytest.mark.parametrize("experts", [EP2, REPLICAS])
def test_gradients_are_near_those_in_fp32(tmp_path, experts, path):
    """Gradients of two micro-batches on each of two ranks: rounded where they are summed."""
    keys = [experts, f"moe.path={path}", "train.steps=1"]
    for name, more in (("fp32", []), ("bf16", [GRADS])):
        # Where FSDP gathers weights, gradients come in their dtype.
        made_in = torch.bfloat16 if more and experts == EP2 else torch.float32
        plant = keep_gradients(tmp_path / f"{name}-grads", made_in)
        train(tmp_path, name, 2, *keys, *more, plant=plant)
    for rank in range(2):
        want, got = (
            torch.load(tmp_path / f"{name}-grads" / f"{rank}.pt") for name in ("fp32", "bf16")
        )
        assert want.keys() == got.keys()
        for name, exact in want.items():
            stays = experts == EP2 and ".experts." in name
            assert got[name].dtype == (torch.bfloat16 if stays else torch.float32)
            off = (got[name].float() - exact).norm()
            if exact.any():  # a rank's rows of the embedding may be of no token
                assert 0 < off < 4 * UNIT * exact.norm(), name
            else:
                assert off == 0, name


@pytest.mark.parametrize("keys", [[GRADS], [MOMENT], [GRADS, MOMENT]])
def test_training_is_near_and_resumes_exactly(tmp_path, keys):
    keep = [EP2, "checkpoint.every=1", "checkpoint.keep=6"]
    exact = train(tmp_path, "fp32", 2, EP2)
    near = train(tmp_path, "a", 2, *keep, *keys)
    losses, norms = (
        [[row[key] for row in rows] for rows in (near, exact)]
        for key in ("loss/train", "optim/grad_norm")
    )
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)
    assert losses[0] != losses[1]
    forget(tmp_path / "a", 3)
    again = train(tmp_path, "a", 2, *keep, *keys)
    assert computed(again) == computed(near)


def moment_dtypes(path: Path) -> dict[str, torch.dtype]:
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        key: m.properties.dtype
        for key, m in metadata.items()
        if isinstance(m, TensorStorageMetadata) and key.endswith(".exp_avg")
    }


def test_they_may_be_exchanged_on_resume(tmp_path):
    """A checkpoint has the moment as it was kept; what is read of it is rounded, or is exact."""
    keys = [EP2, "checkpoint.every=3", "checkpoint.keep=3"]
    exact = train(tmp_path, "fp32", 2, *keys)
    for before, after in (([], [GRADS, MOMENT]), ([GRADS, MOMENT], [])):
        name = f"{len(before)}"
        train(tmp_path, name, 2, *keys, *before)
        forget(tmp_path / name, 3)
        rows = train(tmp_path, name, 2, *keys, *after)
        log = (tmp_path / f"{name}.log").read_text()
        for key in ("grad_dtype", "first_moment_dtype"):
            new, old = ("bf16", "fp32") if after else ("fp32", "bf16")
            assert f"optim.{key}={new} (was {old})" in log
        assert [row["loss/train"] for row in rows] == pytest.approx(
            [row["loss/train"] for row in exact], rel=1e-3
        )
        for step, keys_then in ((3, before), (6, after)):
            dtypes = moment_dtypes(tmp_path / name / "checkpoints" / f"step_{step:08d}")
            assert len(dtypes) > 10
            assert set(dtypes.values()) == {torch.bfloat16 if keys_then else torch.float32}


def test_the_benchmark_names_them():
    flags = "fp8_direct:bf16_grads:bf16_moment"
    config = config_of(parse(flags), TINY[0], [], "balanced", None)
    assert config.optim.grad_dtype == config.optim.first_moment_dtype == "bf16"
    plain = config_of(parse("fp8_direct"), TINY[0], [], "balanced", None)
    assert plain.optim.grad_dtype == plain.optim.first_moment_dtype == "fp32"
