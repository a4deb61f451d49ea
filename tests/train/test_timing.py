"""Parts of a layer and of a model as they are timed: which, in which order, and at what effect."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from models.config import PathName
from models.gpt import GPT
from models.moe.paths import PATHS
from scripts.bench.layer.setup import SHAPES, Layer
from tests.models.test_gpt import build, configure
from tests.support.paths import EXPECTED
from tests.support.ranks import run_ranks
from train import parallel
from train.profiling.model import replaced, timed_forward
from train.profiling.moe import PARTS, timed_runtime
from train.profiling.step import timed_step
from train.profiling.timer import Timer

CPU = torch.device("cpu")


def test_parts_and_the_rest_add_up():
    timer = Timer(CPU)
    timer.start()
    for _ in range(2):
        with timer.part("a"):
            time.sleep(0.01)
            with timer.part("b"):  # belongs to a
                time.sleep(0.01)
    with timer.part("b"):
        time.sleep(0.005)
    time.sleep(0.02)
    times = timer.stop().milliseconds()
    assert set(times) == {"a", "b", "other", "total"}
    assert times["a"] >= 40
    assert 5 <= times["b"] < times["a"]
    assert times["other"] >= 20
    assert times["a"] + times["b"] + times["other"] == pytest.approx(times["total"])


def test_a_lap_knows_nothing_of_the_one_before():
    timer = Timer(CPU)
    timer.start()
    with timer.part("a"):
        pass
    first = timer.stop()
    timer.start()
    second = timer.stop()
    assert [name for name, _, _ in first.spans] == ["a"]
    assert second.spans == []


def test_an_error_inside_a_part_closes_it():
    timer = Timer(CPU)
    timer.start()
    with pytest.raises(ZeroDivisionError):
        timer.timed(lambda: 1 / 0, "a")()
    with timer.part("b"):
        pass
    assert [name for name, _, _ in timer.stop().spans] == ["a", "b"]


TAIL = ["swiglu", "down_projection", "combine", "combine"]


def run_layer(rank: int, path: PathName) -> dict[str, Any]:
    """Results with and without timers, and the parts that were timed."""
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    torch.manual_seed(0)
    layer = Layer(SHAPES["tiny"], 64, CPU, "all_to_all")
    runtime = layer.runtime(path)

    def results(runtime: Any) -> list[Tensor]:
        output = layer.forward(runtime)
        laps.append(timer.stop())
        timer.start()
        gradients = layer.backward(output)
        laps.append(timer.stop())
        return [output.detach(), *gradients]

    laps: list[Any] = []
    timer = Timer(CPU)
    timer.start()
    plain = results(runtime)
    assert [lap.spans for lap in laps] == [[], []]
    laps.clear()
    timer.start()
    timed = results(timed_runtime(runtime, timer))
    return {
        "equal": [torch.equal(a, b) for a, b in zip(plain, timed, strict=True)],
        "parts": [[name for name, _, _ in lap.spans] for lap in laps],
        "passes": (runtime.counts.forward_passes, runtime.counts.backward_passes),
    }


@pytest.mark.parametrize("path", PATHS)
def test_a_layer_is_timed_part_by_part_and_computes_the_same(path):
    (found,) = run_ranks(1, run_layer, path)
    assert found["equal"] == [True] * 5
    assert found["passes"] == (2, 2), "the layer's counts are shared"
    forward, backward = found["parts"]
    assert forward == ["quantize_weights"] * 2 + EXPECTED[path].parts + TAIL

    # The gradient takes the same five steps; the plan is there, and step 5 is the dgrad.
    steps = [part for part in EXPECTED[path].parts if part not in ("dispatch", "permute")]
    want = [{"up_projection": "dgrad"}.get(part, part) for part in steps]
    first = backward.index("swiglu")
    again, rest = backward[:first], backward[first:]
    assert again.count("permute") == 1
    assert again.index("dispatch") < again.index("permute")
    assert [part for part in again if part not in ("dispatch", "permute")] == want
    assert rest == ["swiglu", "dgrad", "combine", "combine", "combine", "wgrad", "wgrad"]
    assert set(forward) | set(backward) <= set(PARTS)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x.sin() * 2, None


def test_a_module_is_timed_backward_too_apart_from_its_neighbours():
    timer = Timer(CPU)
    seen: list[str] = []
    first, second = Twice(), Twice()
    x = torch.randn(8, requires_grad=True)
    for module, name in ((first, "first"), (second, "second")):
        vars(module)["forward"] = timed_forward(module, timer, name)
    timer.start()
    y, _ = first(x)
    y = y.exp()
    y.register_hook(lambda grad: seen.append(str(timer._open)))
    # Its gradient comes from two sides; the module's part must not wait for both.
    z, _ = second(y)
    (z + y).sum().backward()
    spans = timer.stop().spans
    assert [name for name, _, _ in spans] == ["first", "second", "second", "first"]
    assert seen == ["None"]
    found = x.grad
    y = (x.sin() * 2).exp()
    (want,) = torch.autograd.grad((y.sin() * 2 + y).sum(), x)
    assert found is not None
    assert torch.equal(found, want)


def test_without_a_gradient_only_forward_is_timed():
    timer = Timer(CPU)
    module = Twice()
    vars(module)["forward"] = timed_forward(module, timer, "a")
    timer.start()
    with torch.no_grad():
        module(torch.randn(8, requires_grad=True))
    module(torch.randn(8))
    assert [name for name, _, _ in timer.stop().spans] == ["a", "a"]


def test_replaced_puts_back_what_was_there():
    owner = SimpleNamespace(own=1)
    with replaced(owner, "own", 2):
        assert owner.own == 2
    assert owner.own == 1
    module = Twice()
    with replaced(module, "forward", len):
        assert module.forward is len
    assert "forward" not in vars(module), "the class's own is back"


def test_replaced_puts_back_after_an_error():
    owner = SimpleNamespace(own=1)

    def fail() -> None:
        with replaced(owner, "own", 2):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert owner.own == 1


def attributes(model: GPT) -> dict[str, Any]:
    """Everything that objects of the model have of their own, FSDP's included."""
    found = {}
    for name, module in model.named_modules():
        owners = {"": module}
        if hasattr(module, "_get_fsdp_state"):
            state = module._get_fsdp_state()
            owners |= {"state": state, "group": state._fsdp_param_group}
        for kind, owner in owners.items():
            for key, value in vars(owner).items() if owner is not None else ():
                found[f"{name}/{kind}/{key}"] = id(value)
    return found


def run_twice(rank: int) -> tuple[list[str], list[str]]:
    """What a model has of its own while it is timed, and what is left of that afterwards."""
    config = configure("parallel.expert_parallel=1", "moe.path=fp8_direct")
    model = build(config)
    mesh = torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("expert_dp", "ep"))
    data_mesh = torch.distributed.init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    ranks = parallel.Ranks(0, 0, 1, CPU, mesh, data_mesh)
    parallel.shard(model, ranks, torch.float32, False)
    before = attributes(model)
    with timed_step(model, Timer(CPU)):
        during = attributes(model)
    after = attributes(model)
    changed = [name for name, value in during.items() if before.get(name) != value]
    left = [name for name in after.keys() | before.keys() if before.get(name) != after.get(name)]
    return changed, left


def test_nothing_is_left_in_the_model():
    ((changed, left),) = run_ranks(1, run_twice)
    names = {name.rpartition("/")[2] for name in changed}
    assert names == {
        *("forward", "runtime"),
        *("unshard", "wait_for_unshard", "post_backward", "_root_post_backward_final_callback"),
    }
    assert left == []
