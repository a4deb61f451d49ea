"""The benchmark of one MoE layer: its problem, its profile, and a whole small run on a CPU."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from models.fp8 import reference
from models.fp8.tensor import Layout, relayout
from models.moe.paths import PATHS
from scripts.bench import plots
from scripts.bench.layer.__main__ import main
from scripts.bench.layer.profile import kernels, ranges, trace, transposing_copies
from scripts.bench.layer.setup import SHAPES, Shape, even_routing, fit
from scripts.bench.trace import Event
from tests.support.paths import EXPECTED
from tests.support.ranks import run_main
from train.profiling.moe import PARTS

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", SHAPES.values())
def test_routing_is_even(shape):
    tokens = 384
    ids = even_routing(tokens, shape, CPU)
    assert ids.shape == (tokens, shape.top_k)
    assert (ids.sort(1).values.diff(dim=1) > 0).all(), "a token has an expert twice"
    assert ids.flatten().bincount().tolist() == [tokens * shape.top_k // shape.experts] * (
        shape.experts
    )


def test_experts_are_halved_until_they_fit_and_keep_their_rows():
    shape = SHAPES["deepseek_v3"]
    assert fit(shape, 16384, 1, None) == (shape, 16384)
    assert fit(shape, 16384, 1, 140 * 2**30) == (shape, 16384)
    smaller, tokens = fit(shape, 16384, 1, 80 * 2**30)
    assert (smaller.experts, tokens) == (128, 8192)
    assert tokens * smaller.top_k / smaller.experts == 16384 * shape.top_k / shape.experts
    assert fit(shape, 16384, 4, 80 * 2**30) == (shape, 16384), "four GPUs hold a quarter each"
    with pytest.raises(ValueError, match="does not fit"):
        fit(shape, 16384, 1, 2**30)
    with pytest.raises(ValueError, match="cannot be spread over 3 ranks"):
        fit(shape, 16384, 3, None)
    with pytest.raises(ValueError, match="evenly"):
        fit(Shape(128, 128, 64, 6), 100, 1, None)


def test_kernels_are_found_by_their_launch():
    def event(cat: str, name: str, ts: float, dur: float, correlation: int | None = None) -> Event:
        args = {} if correlation is None else {"correlation": correlation}
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    events = [
        event("user_annotation", "relayout", 0, 10),
        event("user_annotation", "relayout", 20, 10),
        event("gpu_user_annotation", "relayout", 100, 50),  # the GPU's copy of a range
        event("cuda_runtime", "cudaLaunchKernel", 5, 1, correlation=1),
        event("kernel", "inside, though it runs later", 100, 5, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 15, 1, correlation=2),
        event("kernel", "between the ranges", 106, 5, correlation=2),
        event("cuda_runtime", "cudaMemcpyAsync", 25, 1, correlation=3),
        event("gpu_memcpy", "Memcpy DtoD", 112, 5, correlation=3),
    ]
    both = ranges(events, "relayout")
    assert [e["ts"] for e in both] == [0, 20]
    assert len(kernels(events)) == 2
    assert [e["name"] for e in kernels(events, *both)] == ["inside, though it runs later"]
    assert kernels(events, both[1]) == []


def test_transposing_copies_are_relayouts_and_nothing_else():
    rows, blocks = 64, 4
    x = reference.quantize(torch.randn(rows, blocks * 128), Layout.COMPACT)
    other = torch.randn(rows, blocks + 1)

    def call() -> None:
        with record_function("forward"):
            turned = relayout(x, Layout.GEMM_READY)
            x.scale_inv.clone()  # as it lies
            other.t().contiguous()  # not of scales
            x.data.view(torch.uint8).t().contiguous()  # not float32
        with record_function("backward"):
            relayout(turned, Layout.COMPACT)
            x.scale_inv.t().contiguous()  # the way TransformerEngine makes one

    events = trace(call, CPU)
    found = [
        len(transposing_copies(events, blocks, span))
        for span in ranges(events, "forward", "backward")
    ]
    assert found == [1, 2]


def bench(*arguments: str) -> None:
    command = [sys.executable, "-m", "scripts.bench.layer", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def check(row: dict, path: str) -> None:
    assert row["path"] == path
    for name in ("forward", "backward"):
        time = row[f"{name}_ms"]
        assert 0 < time["min"] <= time["median"] <= time["max"]
        parts = row[f"{name}_parts_ms"]
        assert ("relayout" in parts) == (EXPECTED[path].relayouts > 0)
        assert row["profile"][name]["relayouts"]["counted"] == EXPECTED[path].relayouts
    assert set(row["forward_parts_ms"]) >= {"dispatch", "permute", "up_projection", "combine"}
    assert set(row["backward_parts_ms"]) >= {"dispatch", "permute", "dgrad", "wgrad", "combine"}
    flops = 6 * row["tokens_per_gpu"] * row["top_k"] * 3 * row["hidden"] * row["ffn"]
    seconds = (row["forward_ms"]["min"] + row["backward_ms"]["min"]) / 1e3
    assert row["tflops_per_gpu"]["max"] <= flops / seconds / 1e12 * 1.000001


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_on_a_cpu_and_its_picture(tmp_path, ranks):
    out: Path = tmp_path / "moe_layer.json"
    arguments = ["--device", "cpu", "--shapes", "tiny", "--tokens", "128", "--repeats", "2"]
    arguments += ["--out", str(out)]
    if ranks == 1:
        bench(*arguments)
    else:
        assert run_main(ranks, main, arguments) == [0] * ranks
    content = json.loads(out.read_text())
    assert set(content) == {"machine", "versions", "commit", "config", "rows"}
    assert content["versions"]["torch"] == version("torch")
    for row, path in zip(content["rows"], PATHS, strict=True):
        check(row, path)
        assert row["gpus"] == ranks
        assert row["rows_per_expert"] == 128 * ranks * 2 // 8

    picture = tmp_path / "moe_layer.svg"
    assert main(["--plot", str(out), "--picture", str(picture)]) == 0
    first = picture.read_text()
    assert first.startswith("<svg")
    assert main(["--plot", str(out), "--picture", str(picture)]) == 0
    assert picture.read_text() == first, "the same figures give the same picture"
    assert plots.main([str(out), "--picture", str(picture)]) == 0
    assert picture.read_text() == first, "two commands, one picture"


def test_bad_input_is_one_line(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("{}")
    for argv, line in (
        (["--plot", str(tmp_path / "none.json")], "no picture of one layer's figures"),
        (["--plot", str(file)], "no picture of one layer's figures"),
        (["--out", str(file / "x.json")], "cannot be written: Not a directory"),
    ):
        assert main(argv) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert said.startswith("error: ")
        assert line in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "error: --device cuda: PyTorch sees no GPU here" in capsys.readouterr().err


def test_every_part_of_a_layer_has_a_colour():
    assert [part for part in plots.PART_COLORS if part != "wrap"] == [*PARTS, "other"]
    assert len(set(plots.PART_COLORS.values())) == len(plots.PART_COLORS)


@pytest.mark.gpu
def test_a_profile_shows_the_relayouts_that_are_counted(tmp_path):
    out: Path = tmp_path / "moe_layer.json"
    bench("--shapes", "qwen3_30b_a3b", "--tokens", "2048", "--repeats", "1", "--out", str(out))
    for row, path in zip(json.loads(out.read_text())["rows"], PATHS, strict=True):
        check(row, path)
        for name in ("forward", "backward"):
            found = row["profile"][name]
            want = EXPECTED[path].relayouts
            assert found["kernels"] > 10
            assert found["relayouts"]["kernels_in_ranges"] == want, (path, name)
            assert found["relayouts"]["transposing_copies"] == want, (path, name)
            assert found["relayouts"]["kernels_of_copies"] == want, (path, name)
            assert found["relayouts"]["agree"]
