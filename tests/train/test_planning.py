"""What is planned of a GPU's memory: tensors counted against what autograd and the model hold."""

import json
import logging
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor

from models.config import PATH_NAMES
from models.gpt import GPT
from models.moe.room_memory import row_bytes
from tests.models.test_gpt import build, configure
from tests.support.ranks import read_metrics, run_ranks, run_train
from train import parallel, preflight
from train.config import Config, load
from train.metrics import flops
from train.optim import build_optimizer
from train.planning import kept
from train.planning.experts import backward_bytes, forward_bytes, kept_bytes, saved_bytes
from train.planning.memory import FIT, GIB, _gathered, _prepared, budget, moments, peak
from train.planning.shapes import Shape, shape_of

FULL, INDEX = 4, 8
"""Bytes: everything on a CPU is in float32."""

SHAPES = {
    "grouped": ["model.num_heads=6", "model.num_kv_heads=2", "model.head_dim=64"],
    "qk-norm": ["model.qk_norm=true", "model.num_kv_heads=2", "model.hidden_size=256"],
    "one-kv-head": ["model.num_kv_heads=1", "moe.num_experts=8", "moe.top_k=3"],
    "shared": ["moe.shared_ffn_hidden_size=128", "moe.z_loss_coeff=0.0"],
    "no-aux": ["moe.aux_loss_coeff=0.0", "moe.z_loss_coeff=0.0", "moe.ffn_hidden_size=256"],
}
ONE_RANK = ["parallel.expert_parallel=1"]


def saved(model: GPT, tokens: torch.Tensor) -> Counter[int]:
    """How often autograd keeps a memory of this many bytes, the model's parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}  # held, so that no address is taken again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(tokens, tokens)
    assert out.requires_grad
    return Counter(storage.nbytes() for storage in found.values())


def saved_by(rank: int, config: Config) -> Counter[int]:
    model = build(config).train()
    generator = torch.Generator().manual_seed(1)
    shape = (config.train.micro_batch, config.model.seq_len)
    return saved(model, torch.randint(0, config.model.vocab_size, shape, generator=generator))


def only_on_a_cpu(shape: Shape) -> tuple[Counter[int], set[str]]:
    """What PyTorch's modules keep where TransformerEngine's do not, and which of the planned
    tensors they keep otherwise."""
    model, moe, tokens = shape.model, shape.moe, shape.tokens
    row = tokens * FULL
    more = Counter([row * model.hidden_size] * 2)  # norms: before they are multiplied by the weight
    otherwise = {"values", "router", "auxiliary loss", "z loss", "divisors of norms"}
    more += Counter([row, row])
    if model.qk_norm:
        otherwise.add("keys before their norm")
        more += Counter([row * shape.query, row * shape.key])
        more += Counter([row * model.num_heads, row * model.num_kv_heads])
    # Keys and values stay parts of what the one matrix made for queries, keys and values.
    more[row * (shape.query + 2 * shape.key)] += 1
    # Sines and cosines of queries, and of keys.
    more += Counter([model.seq_len * model.head_size * FULL] * 4)
    if ffn := moe.shared_ffn_hidden_size:
        otherwise.add("shared expert")  # SwiGLU out of operations
        more += Counter([row * 2 * ffn, row * ffn, row * ffn, row * ffn])
    chosen, every = tokens * moe.top_k, row * moe.num_experts
    more += Counter([chosen * INDEX, chosen * FULL])
    if moe.aux_loss_coeff:
        more += Counter([chosen * INDEX, every, moe.num_experts * INDEX, FULL])
    if moe.z_loss_coeff:
        more += Counter([every, row, FULL])
    return more, otherwise


@pytest.mark.parametrize("keys", SHAPES.values(), ids=SHAPES)
def test_every_tensor_that_a_layer_keeps(keys):
    """To the byte: the plan's list, less and more what a CPU does otherwise."""
    config = configure(*ONE_RANK, *keys)
    shape = shape_of(config, 1)
    (one,) = run_ranks(1, saved_by, configure(*ONE_RANK, *keys, "model.num_layers=1"))
    (two,) = run_ranks(1, saved_by, configure(*ONE_RANK, *keys, "model.num_layers=2"))
    planned = kept.of_layer(shape, FULL)
    more, otherwise = only_on_a_cpu(shape)
    del planned["experts"]  # which autograd does not see
    common = Counter(size for name, size in planned.items() if name not in otherwise)
    assert dict(two - one) == dict(common + more)


def kept_by_experts(rank: int, config: Config) -> int:
    model = build(config).train()
    tokens = torch.randint(0, 250, (config.train.micro_batch, config.model.seq_len))
    model(tokens, tokens).sum().backward()
    return model.runtime.counts.kept_bytes // model.runtime.counts.kept_passes


@pytest.mark.parametrize("path", PATH_NAMES)
@pytest.mark.parametrize("recompute", [False, True])
def test_what_experts_keep(path, recompute):
    """To the byte except for padding, of which half a step an expert is planned."""
    keys = [*ONE_RANK, f"moe.path={path}", f"moe.recompute={recompute}", "model.seq_len=512"]
    config = configure(*keys, "moe.capacity=null")
    shape = shape_of(config, 1)
    (found,) = run_ranks(1, kept_by_experts, config)
    if recompute:
        tokens = shape.tokens * shape.model.hidden_size * FULL  # the router's, planned with it
        assert found == kept_bytes(shape, FULL) + tokens
    else:
        a_row = kept_bytes(shape, FULL) / shape.rows
        padding = a_row * 128 * shape.local_experts / 2
        assert found == pytest.approx(kept_bytes(shape, FULL), abs=padding)


@pytest.mark.parametrize("path", PATH_NAMES)
@pytest.mark.parametrize("recompute", [False, True])
def test_what_room_takes_a_row_to_need_is_no_less_than_what_is_planned(path, recompute):
    """With experts narrower than the hidden size, and much wider."""
    for ffn in (768, 4096, 14336):
        keys = [f"moe.path={path}", f"moe.recompute={recompute}", f"moe.ffn_hidden_size={ffn}"]
        some, more = (
            shape_of(configure(*keys, "model.hidden_size=2048", f"moe.capacity={n}"), 2)
            for n in (1.0, 1.5)
        )
        found = row_bytes(some.rows, saved_bytes(some), 2048, ffn, 2, recompute)
        rows = more.rows - some.rows
        assert rows > 0
        kept_more = kept_bytes(more) - kept_bytes(some)
        assert kept_more <= found.kept * rows <= 1.01 * kept_more
        backward, forward = (
            peak_of(more) - peak_of(some)
            for peak_of in (lambda shape: backward_bytes(shape, gradient=0), forward_bytes)
        )
        assert forward < backward <= found.computing * rows < 1.7 * backward


def test_what_experts_keep_on_a_gpu_as_training_logged_it():
    rows = json.loads((FIT.parent / "moe_small.json").read_text())
    for row in rows["rows"]:
        rows["config"]["moe"]["path"] = row["path"]
        shape = shape_of(Config.model_validate(rows["config"]), 1)
        logged = float(row["kept for backward, MiB/layer"])
        assert kept_bytes(shape) / 2**20 == pytest.approx(logged, rel=2e-4)


def held(rank: int, config: Config) -> dict[str, int]:
    """Bytes that a rank holds after an optimizer step."""
    model = build(config)
    ranks = parallel.Ranks(
        rank=rank,
        local_rank=rank,
        world_size=torch.distributed.get_world_size(),
        device=torch.device("cpu"),
        mesh=parallel.init_device_mesh(
            "cpu",
            (
                torch.distributed.get_world_size() // config.parallel.expert_parallel,
                config.parallel.expert_parallel,
            ),
            mesh_dim_names=("expert_dp", "ep"),
        ),
        data_mesh=parallel.init_device_mesh(
            "cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("dp",)
        ),
    )
    parallel.shard(model, ranks, torch.float32, config.parallel.reshard_after_forward)
    optimizer = build_optimizer(model, config.optim, fused=False)
    model.train()
    tokens = torch.randint(0, 250, (config.train.micro_batch, config.model.seq_len))
    model(tokens, tokens).mean().backward()
    prepared = sum(
        part.nbytes
        for layer in model.moe_layers()
        for pair in layer.experts._prepared or ()
        for part in pair
        if hasattr(part, "scale_inv")
    )
    optimizer.step()

    def local(tensor: torch.Tensor) -> int:
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return tensor.nbytes

    states = optimizer.state.values()
    return {
        "weights": sum(local(p) for p in model.parameters()),
        "AdamW's means": sum(local(s[k]) for s in states for k in ("exp_avg", "exp_avg_sq")),
        "gradients": sum(local(p.grad) for p in model.parameters() if p.grad is not None),
        "prepared": prepared,
    }


@pytest.mark.parametrize(("ranks", "experts"), [(1, 1), (2, 2), (2, 1), (4, 2)])
def test_what_a_rank_stores(ranks, experts):
    keys = [f"parallel.expert_parallel={experts}", "model.qk_norm=true", "moe.path=fp8_compact"]
    config = configure(*keys, "moe.aux_loss_coeff=0.0", "moe.z_loss_coeff=0.0")
    shape = shape_of(config, ranks)
    found = run_ranks(ranks, held, config)
    (optimizer,) = (moment for moment in moments(shape) if moment.name == "optimizer")
    for name in ("weights", "AdamW's means", "gradients"):
        mean = sum(one[name] for one in found) / ranks
        assert optimizer.parts[name] == pytest.approx(mean, rel=1e-9), name
    assert _prepared(shape) == pytest.approx(found[0]["prepared"], rel=1e-9)


def test_parameters_are_those_of_the_model():
    for name in ("moe_small", "qwen3_30b_a3b"):
        config = load(f"configs/{name}.yaml", ["moe.shared_ffn_hidden_size=256"])
        shape = shape_of(config, config.parallel.expert_parallel)
        layers = config.model.num_layers
        total = layers * (shape.dense + shape.experts * shape.expert_ranks) + shape.root
        assert total == flops.count(config.model, config.moe).total_params
        gathered = 2 if shape.reshard else layers
        assert _gathered(shape) == gathered * shape.dense + shape.root


def test_rows_by_what_the_config_sets_aside():
    def rows(*keys: str, ranks: int = 2) -> int:
        config = load("configs/qwen3_30b_a3b_8l.yaml", ["parallel.expert_parallel=2", *keys])
        return shape_of(config, ranks).rows

    even = 4 * 4096 * 8
    assert rows() == (-(-int(even * 1.02) // 64) + 64) * 64
    assert rows("moe.capacity=1.5") == (even * 3 // 2 // 64 + 64) * 64
    worst = even * 2 + 64 * 63  # all copies, and 63 rows for each expert, in whole steps
    assert rows("moe.capacity=2") == rows("moe.capacity=1e308") == worst
    assert rows("moe.capacity=null") == even + 64 * 64 / 2
    natural = rows("moe.capacity=null", "moe.force_balance=false")
    assert natural == pytest.approx(1.2 * even, rel=0.02)
    room = rows("moe.capacity=auto")
    assert even * 17 / 16 < room <= even * 10 / 8
    surprised = rows("moe.capacity=auto", "moe.force_balance=false")
    assert even * 1.45 < surprised <= even * 1.55


@pytest.fixture
def small_gpu(monkeypatch):
    memory = {"bytes": int(79.2 * GIB)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda _: SimpleNamespace(total_memory=memory["bytes"], name="a GPU"),
    )
    return memory


def warned(caplog: pytest.LogCaptureFixture, config: Config) -> list[str]:
    caplog.clear()
    preflight.warn_of_memory(config)
    return [record.getMessage() for record in caplog.records]


def test_a_run_that_does_not_fit_says_so(small_gpu, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    keys = ["parallel.expert_parallel=2", "moe.path=bf16"]

    def config(*more: str) -> Config:
        return load("configs/qwen3_30b_a3b_8l.yaml", [*keys, *more])

    assert warned(caplog, config("train.micro_batch=8")) == []
    (line,) = warned(caplog, config("train.micro_batch=12"))
    assert "planned to need 83." in line
    assert "a GPU has 72.9 of 79.2 for it; train.micro_batch=9 would fit" in line
    monkeypatch.setenv("RANK", "1")
    assert warned(caplog, config("train.micro_batch=12")) == []
    monkeypatch.setenv("RANK", "0")
    small_gpu["bytes"] = 47 * GIB
    (line,) = warned(caplog, config("train.micro_batch=1", "model.seq_len=32768"))
    assert "moe.recompute=true would fit" in line or "start more ranks" in line
    small_gpu["bytes"] = 20 * GIB
    (line,) = warned(caplog, config("train.micro_batch=1"))
    assert "start more ranks, or a smaller model" in line


def test_a_run_that_would_wait_for_lack_of_room_says_so(small_gpu, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    keys = ["parallel.expert_parallel=2", "moe.path=bf16", "moe.force_balance=false"]

    def config(*more: str) -> Config:
        return load("configs/qwen3_30b_a3b_8l.yaml", [*keys, "train.micro_batch=8", *more])

    (line,) = warned(caplog, config("moe.capacity=auto"))
    assert "with the room that moe.capacity=auto sets aside, and a GPU has 72.9 of 79.2" in line
    assert line.endswith("train.micro_batch=7 would fit without")
    assert warned(caplog, config("moe.capacity=null")) == []
    (line,) = warned(caplog, config("moe.capacity=1.5"))  # drops rows, and never waits
    assert "moe.capacity" not in line
    small_gpu["bytes"] = 60 * GIB  # too little for that too
    (line,) = warned(caplog, config("moe.capacity=auto"))
    assert "moe.capacity" not in line


def test_the_start_of_a_run_looks(small_gpu, monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(preflight, "why_not", lambda *_: None)
    monkeypatch.delenv("RANK", raising=False)
    keys = [*ONE_RANK, f"run.dir={tmp_path}", "data.workers=0", "tracking.mode=disabled"]
    preflight.check(load("configs/qwen3_30b_a3b_8l.yaml", [*keys, "train.micro_batch=8"]))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("this run is planned to need ")


def test_the_fullest_moment_moves():
    """With few tokens the gradients of all layers weigh more than activations."""

    def name(*keys: str) -> str:
        return peak(shape_of(load("configs/qwen3_30b_a3b_8l.yaml", list(keys)), 4)).name

    assert name() == "backward pass of a layer's experts"
    assert name("model.vocab_size=1000000") == "loss"
    tiny = ["train.micro_batch=1", "model.seq_len=128"]
    assert name(*tiny, "optim.prepare_weights=true") in ("optimizer", "reduction of the embedding")
    assert budget(100 * GIB) == 92 * GIB


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATH_NAMES)
def test_peak_of_a_training_run(path, tmp_path):
    """Within 5% of what the allocator saw at most."""
    keys = ["model.num_layers=4", "moe.num_experts=32", "parallel.expert_parallel=1"]
    keys += [f"moe.path={path}", "train.steps=8", "train.log_every=4", "train.micro_batch=4"]
    keys += ["moe.capacity=1.02", f"run.dir={tmp_path}", "run.name=a", "checkpoint.at_end=false"]
    keys += ["tracking.mode=disabled", "data.workers=0"]
    source = "configs/qwen3_30b_a3b_8l.yaml"
    assert run_train(1, [source, *keys]) == [0]
    found = read_metrics(tmp_path / "a")[-1]["memory/peak_allocated_gib"]
    planned = peak(shape_of(load(source, keys), 1)).total / GIB
    assert planned == pytest.approx(found, rel=0.05)
