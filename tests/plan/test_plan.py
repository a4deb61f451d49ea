"""A plan: what it says follows from the config, and what is typed wrong is one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from models.config import PATH_NAMES
from models.moe.paths import PATHS
from scripts.plan import work
from scripts.plan.__main__ import errors, main
from scripts.plan.machines import MACHINES
from scripts.plan.plan import Plan, plans, scaled, sizes
from scripts.plan.rates import RESULTS, measured
from scripts.plan.time import Fit, bounds, fitted, parts_ms, waited
from scripts.plan.traffic import traffic
from train.config import load
from train.metrics import flops
from train.planning.memory import FIT, peak
from train.planning.shapes import Shape, shape_of

H100, H200 = MACHINES["h100"], MACHINES["h200"]
BENCH = "configs/qwen3_30b_a3b_8l.yaml"


def shape(*keys: str, ranks: int = 4, node: int = 8) -> Shape:
    return shape_of(load(BENCH, list(keys)), ranks, node)


def times(one: Shape, machine=H200, fit: Fit | None = None) -> dict[str, float]:
    return parts_ms(one, machine, measured(), fit or fitted())


def plan_for(gpus: int, *keys: str, machine=H100, source: str = BENCH) -> dict[str, Plan]:
    config = load(source, list(keys))
    found = plans(config, gpus, 8, machine, measured(), fitted())
    return {plan.path: plan for plan in found}


def test_what_is_dispatched_is_what_training_counted():
    """moe/dispatched_mib of the demo, which two ranks of a CPU send in float32 where not in FP8."""
    result = json.loads((RESULTS / "demo_cpu.json").read_text())
    for row in result["rows"]:
        config = load("configs/demo_cpu.yaml", [f"moe.path={row['path']}"])
        one = shape_of(config, 2)
        wide = 2 if row["path"] == "bf16" else 1
        planned = work.out_bytes(one) * wide * one.micro_batches * one.ranks / 2**20
        assert planned == pytest.approx(float(row["dispatched MiB/step"]), abs=0.06)


def test_time_counts_the_rows_that_are_computed():
    """Not those that room is set aside for, where kernels leave them alone."""
    natural = ["moe.force_balance=false", "moe.capacity=auto"]
    of_paths = {path: shape(*natural, f"moe.path={path}") for path in PATH_NAMES}
    for path, one in of_paths.items():
        come = one.even * 1.2 + one.local_experts * PATHS[path].ROW_ALIGNMENT / 2
        if path in ("fp8_baseline", "fp8_compact"):
            assert one.computed == one.rows, path
        else:
            assert one.computed == pytest.approx(come, abs=1), path
        assert come + one.even / 4 <= one.rows <= come + one.even * (1 / 4 + 1 / 8), path
    waits = shape("moe.force_balance=false", "moe.capacity=null")
    assert waits.computed == waits.rows
    drops = shape("moe.force_balance=false", "moe.capacity=1.02")
    assert drops.computed == drops.rows < of_paths["fp8_direct"].computed
    for keys in (natural, ["moe.capacity=null"]):  # every token comes to every expert
        few = shape(*natural, *keys, "moe.num_experts=4", "moe.top_k=4")
        assert few.computed == few.rows == few.tokens * 4
    full = replace(shape(*natural), full=True)
    assert full.computed == full.rows == full.even


def test_flops_are_those_of_mfu():
    """Without padding and capacity; embedding rows, router and norms are left out."""
    one = shape("moe.capacity=null", "parallel.expert_parallel=1", ranks=1)
    padding = one.even / one.rows
    counted = work.flops(one)
    total = counted["attention"] * 6 / 7 + counted["dense GEMMs"]  # MFU counts four for backward
    total += padding * (counted["expert GEMMs"] + counted["expert weight gradients"])
    per_token = flops.count(one.model, one.moe).flops_per_token
    assert total / one.tokens == pytest.approx(per_token, rel=0.01)


def test_links():
    """Inside a node NVLink; experts over two nodes send to the other by the network."""
    inside = {one.link for one in traffic(shape(ranks=8))}
    assert inside == {"NVLink"}
    wide: dict[str, dict[str, float]] = {}
    for one in traffic(shape("parallel.expert_parallel=16", ranks=16)):
        wide.setdefault(one.what, {})[one.link] = one.bytes
    tokens = wide["tokens and gradients, dispatched and combined"]
    assert tokens["network"] == pytest.approx(tokens["NVLink"] * 8 / 7)
    assert traffic(shape("parallel.expert_parallel=1", ranks=1)) == []
    replicas = [one for one in traffic(shape(ranks=8)) if "replicas" in one.what]
    assert [one.what.split()[0] for one in replicas] == ["weights", "gradients"]
    experts = shape(ranks=8).experts * shape(ranks=8).model.num_layers
    assert [one.bytes for one in replicas] == [experts * 2 / 2, experts * 4 / 2]


def test_fp8_sends_half():
    bf16, fp8 = (work.out_bytes(shape(f"moe.path={path}")) for path in ("bf16", "fp8_direct"))
    assert fp8 / bf16 == pytest.approx((1 + 4 / 128) / 2)


def test_h100s_are_slower_where_bytes_move_alone():
    fast, slow = times(shape(), H200), times(shape(), H100)
    ratio = H200.bandwidth / H100.bandwidth
    for name in fast:
        if not fast[name]:
            continue
        moves = name in ("experts' rows", "rest of the layers", "optimizer", "weights prepared",
                         "FSDP's copies")  # fmt: skip
        assert slow[name] / fast[name] == pytest.approx(ratio if moves else 1), name


def test_more_micro_batches_take_longer_but_for_what_is_done_once():
    one, two = shape("train.global_batch=16"), shape("train.global_batch=32")
    assert (one.micro_batches, two.micro_batches) == (1, 2)
    a, b = times(one), times(two)
    assert b["attention"] == pytest.approx(2 * a["attention"])
    assert b["dispatch, NVLink"] == pytest.approx(2 * a["dispatch, NVLink"])
    assert b["optimizer"] == a["optimizer"]
    assert b["weights prepared"] == a["weights prepared"]


def test_the_network_is_waited_for_when_it_is_slow():
    one = shape(ranks=64)
    slow = replace(H200, network=H200.network / 100)
    waited = times(one, slow)["gather and reduce, waited for"]
    assert waited > 20 * times(one)["gather and reduce, waited for"]
    assert next(iter(bounds(times(one, slow)))) == "network"
    assert sum(bounds(times(one)).values()) == pytest.approx(1)


def test_gradients_and_moments_in_bf16_are_moved_in_bf16():
    for ranks in (4, 12):
        full = shape(ranks=ranks)
        half = shape("optim.grad_dtype=bf16", "optim.first_moment_dtype=bf16", ranks=ranks)
        for who, size in work.reduced_bytes(full).items():
            assert work.reduced_bytes(half)[who] == size / 2
        # 32 bytes a parameter; twice 2 less for the moment, which is read and written, and twice 2
        # for the gradient, for AdamW and for its norm, of experts that FSDP does not reduce.
        assert work.optimizer_bytes(full) == pytest.approx(32 * full.stored)
        experts = half.model.num_layers * half.experts if half.replicas == 1 else 0
        assert work.optimizer_bytes(half) == pytest.approx(28 * half.stored - 4 * experts)
        assert bool(experts) == (ranks == 4)
        assert work.copied_bytes(half) < work.copied_bytes(full)


def test_what_a_plan_says_of_its_errors():
    """Of the rows that nothing was fitted on, those with an assumed imbalance are further off."""
    rows = json.loads(FIT.read_text())["rows"]
    worst = {
        (unit, role): max(
            abs(row[f"error_{unit}"]) for row in rows if row.get(f"role_{unit}") == role
        )
        for unit in ("gib", "ms")
        for role in ("checked", "assumed")
    }
    assert worst["ms", "checked"] < worst["ms", "assumed"]
    said = {key: f"{value:.1%}" for key, value in worst.items()}
    assert (
        f"memory was off by {said['gib', 'checked']} at most and time by {said['ms', 'checked']}, "
        f"and by {said['gib', 'assumed']} and {said['ms', 'assumed']} where the router chooses"
    ) in errors()


@pytest.mark.parametrize("reshard", [False, True])
def test_what_nothing_runs_beside_is_waited_for(reshard):
    """Every byte of a step's gathering and reducing, at the speed of its link."""
    keys = ["train.global_batch=48", f"parallel.reshard_after_forward={reshard}"]
    for ranks, of_all, of_replicas in ((4, 450, 450), (12, 8 * 50, 2 * 50)):
        one = shape(*keys, ranks=ranks, node=4 if ranks == 4 else 8)
        gathered, reduced = work.gathered_bytes(one), work.reduced_bytes(one)
        total = {who: one.micro_batches * gathered[who] + reduced[who] for who in gathered}
        seconds = total["all"] / (of_all * 0.75e9) + total["replicas"] / (of_replicas * 0.75e9)
        assert waited(one, H200, 0.0) == pytest.approx(seconds)
        assert waited(one, H200, 1e3) == 0


def test_waiting_for_counts():
    assert times(shape())["waiting for counts"] == 0
    waits = times(shape("moe.capacity=null"))
    assert waits["waiting for counts"] == pytest.approx(8 * measured().wait_ms)
    twice = times(shape("moe.capacity=null", "moe.recompute=true"))
    assert twice["waiting for counts"] == pytest.approx(16 * measured().wait_ms)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_the_largest_micro_batch_fits_and_the_next_does_not(path):
    found = plan_for(4)[path]
    assert found.largest is not None
    assert found.largest >= found.shape.micro_batch
    at_most = replace(found.shape, micro_batch=found.largest)
    assert (
        peak(at_most).total
        <= found.room
        < peak(replace(found.shape, micro_batch=found.largest + 1)).total
    )


def test_what_fits_only_in_steps_that_wait(capsys):
    """`bf16`: 77 GiB with room, 71 without, of 73. With a number layers never wait."""
    natural = ["moe.force_balance=false", "train.micro_batch=8", "parallel.expert_parallel=2"]
    found = plan_for(2, *natural, "moe.capacity=auto")
    verdicts = {path: plan.verdict for path, plan in found.items()}
    assert verdicts == {path: "waits" if path == "bf16" else "yes" for path in PATH_NAMES}
    assert plan_for(2, *natural, "moe.capacity=null")["bf16"].verdict == "yes"
    assert plan_for(2, *natural, "moe.capacity=1.5")["bf16"].verdict == "NO"
    larger = plan_for(2, *natural, "moe.capacity=auto", "train.micro_batch=9")
    assert larger["bf16"].verdict == "NO"
    assert main([BENCH, "--gpus", "2", *natural, "moe.capacity=auto"]) == 0
    said = "waits: room for the experts' rows does not fit"
    assert said in capsys.readouterr().out
    assert main([BENCH, "--gpus", "2", *natural, "moe.capacity=auto", "train.micro_batch=4"]) == 0
    assert said not in capsys.readouterr().out


def test_micro_batches_fill_the_global_batch():
    assert sizes(load("configs/moe_small.yaml"), 4) == [1, 2, 4, 8, 16]
    assert len(sizes(load(BENCH), 4)) == 128
    whole = plan_for(8, source="configs/qwen3_30b_a3b.yaml")
    assert not any(plan.fits for plan in whole.values()), "61 GB before activations"
    assert all(plan.largest is None for plan in whole.values())
    assert all(p.fits for p in plan_for(16, source="configs/qwen3_30b_a3b.yaml").values())


def test_many_gpus_have_the_same_work_each():
    config = load("configs/qwen3_30b_a3b.yaml")
    found = scaled(config, 16, 8, (4, 8, 64, 1024, 2048), H100, measured(), fitted())
    assert list(found) == [8, 64, 1024, 2048], "4 are not a whole group of experts"
    for of_paths in found.values():
        assert [plan.path for plan in of_paths] == list(PATH_NAMES)
        assert {plan.shape.micro_batches for plan in of_paths} == {4}
    memory = [of_paths[0].memory.parts["weights"] for of_paths in found.values()]
    assert memory == sorted(memory, reverse=True)
    prepared = load(BENCH, ["optim.prepare_weights=true"])
    assert list(scaled(prepared, 4, 8, (4, 8), H100, measured(), fitted())) == [4]


def test_it_prints_and_draws(tmp_path, capsys):
    for name in ("a.png", "a.svg"):
        picture = tmp_path / name
        command = ["configs/moe_small.yaml", "--gpus", "8", "--picture", str(picture)]
        keys = ["moe.path=fp8_direct", "train.micro_batch=8"]
        assert main([*command, *keys, "--machine", "h200"]) == 0
        out = capsys.readouterr().out
        assert "1.9" in out.splitlines()[0]
        for said in ("activations, attention", "largest micro-batch", "NVLink", "tokens/s/GPU"):
            assert said in out
        assert f"{picture}: 8, 16, 32, 64, 128, 256, 512, 1024 GPUs" in out
    assert imread(tmp_path / "a.png").shape[0] > 500
    text = (tmp_path / "a.svg").read_text()
    assert "ms a step of fp8_direct" in text
    assert main(["configs/demo_cpu.yaml", "parallel.expert_parallel=1"]) == 0
    assert "traffic   none: one rank is alone" in capsys.readouterr().out


def test_what_is_printed_adds_up(capsys):
    assert main([BENCH]) == 0
    lines = capsys.readouterr().out.splitlines()
    for title, total in (("memory of a rank", "peak"), ("time of a step", "a step")):
        begin = next(i for i, line in enumerate(lines) if line.startswith(title))
        end = next(i for i in range(begin, len(lines)) if lines[i].split("  ")[1] == total)
        parts = [[float(cell) for cell in line.split()[-4:]] for line in lines[begin + 1 : end + 1]]
        for column in zip(*parts, strict=True):
            assert sum(column[:-1]) == pytest.approx(column[-1], abs=0.4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.yaml"], "config file none.yaml"),
        ([BENCH, "--gpus", "6"], "expert_parallel=4 does not divide the 6 rank(s)"),
        ([BENCH, "--gpus", "12"], "--gpus 12 is not a multiple of --gpus-per-node 8"),
        ([BENCH, "--picture", "a.pdf"], "--picture a.pdf must end in .png or .svg"),
        ([BENCH, "--picture", "/nowhere/a.png"], "--picture /nowhere/a.png cannot be written"),
        ([BENCH, "moe.path=fp9"], "moe.path='fp9'"),
        ([BENCH, "--gpus", "8", "optim.prepare_weights=true"], "with 2 replicas of each expert"),
        (["configs/moe_small.yaml", "--gpus", "48"], "train.global_batch=64 is not a multiple"),
        ([BENCH, "model.num_layers=x"], "model.num_layers='x'"),
    ],
)
def test_bad_input_is_one_line(arguments, says, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert err.startswith("error: ")


def test_no_number_of_gpus(capsys):
    for wrong in ("0", "-1", "x"):
        with pytest.raises(SystemExit) as ended:
            main([BENCH, "--gpus", wrong])
        assert ended.value.code == 2
    assert "is not a number of GPUs" in capsys.readouterr().err


def test_without_a_fit(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr("scripts.plan.time.FIT", tmp_path / "none.json")
    assert main([BENCH]) == 2
    assert "python -m scripts.plan.fit writes plan_fit.json" in capsys.readouterr().err
