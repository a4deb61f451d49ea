"""The model on one rank and on several: weights, loss, documents, FLOPs."""

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.documents import Documents
from models.gpt import GPT, build_gpt
from tests.support.launches import Launches
from tests.support.ranks import run_ranks
from train import loop, parallel
from train.config import Config, load
from train.data.batches import Batch
from train.data.tokenizer import ByteTokenizer
from train.metrics import flops
from train.optim import clip_gradients

SMALL = [
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.init_std=0.02",
    "model.seq_len=32",
    "moe.num_experts=4",
]


def configure(*overrides: str) -> Config:
    return load("configs/demo_cpu.yaml", [*SMALL, *overrides])


def build(config: Config) -> GPT:
    """A GPT in a gloo group that has started already."""
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=config.parallel.expert_parallel,
        create_gloo_process_groups=False,
    )
    parallel.tensor_parallel.model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
    return build_gpt(config.model, config.moe, torch.device("cpu"), config.train.seed)


def digests(rank: int, config: Config) -> dict[str, str]:
    """A fingerprint of every weight on this rank, experts by their global number."""
    found = {}
    for name, parameter in build(config).named_parameters():
        parts = {name: parameter}
        if ".experts." in name:
            first = parallel_state.get_expert_model_parallel_rank() * len(parameter)
            parts = {f"{name}.{first + i}": weight for i, weight in enumerate(parameter)}
        for key, value in parts.items():
            data = value.detach().contiguous().numpy().tobytes()
            found[key] = hashlib.sha256(data).hexdigest()
    return found


def test_weights_depend_on_the_seed_alone():
    (alone,) = run_ranks(1, digests, configure("parallel.expert_parallel=1"))
    for ranks, ep in ((2, 2), (4, 4), (4, 2), (2, 1)):
        results = run_ranks(ranks, digests, configure(f"parallel.expert_parallel={ep}"))
        merged: dict[str, str] = {}
        for result in results:
            for name, digest in result.items():
                assert merged.setdefault(name, digest) == digest, f"{name} differs between ranks"
        assert merged == alone
    drawn = [digest for name, digest in alone.items() if "norm" not in name]
    assert len(set(drawn)) == len(drawn), "two weights, or two experts, are the same"
    (other,) = run_ranks(1, digests, configure("parallel.expert_parallel=1", "train.seed=1"))
    assert other["embedding.word_embeddings.weight"] != alone["embedding.word_embeddings.weight"]


def initial_spread(rank: int, config: Config) -> dict[str, tuple[float, int]]:
    matrices = [(name, p) for name, p in build(config).named_parameters() if p.ndim > 1]
    return {name: (float(p.std()), p.numel()) for name, p in matrices}


def test_initial_weights_have_the_right_size():
    config = configure("parallel.expert_parallel=1", "model.init_std=0.05")
    (spread,) = run_ranks(1, initial_spread, config)
    for name, (found, size) in spread.items():
        into_residual = name.endswith((".down", "linear_proj.weight"))
        want = 0.05 / 2 if into_residual else 0.05  # sqrt(2 * 2 layers) = 2
        assert found == pytest.approx(want, rel=5 / (2 * size) ** 0.5), name  # 5 standard errors

    config = configure("parallel.expert_parallel=1", "model.embedding_init_std=1")
    (spread,) = run_ranks(1, initial_spread, config)
    large = {name for name, (found, _) in spread.items() if found > 0.1}
    assert large == {"embedding.word_embeddings.weight"}
    assert spread[large.pop()][0] == pytest.approx(1, rel=0.05)


def batch(config: Config, sequences: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (sequences, config.model.seq_len + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def documents(rank: int, config: Config) -> dict[str, Any]:
    model = build(config).eval()
    tokens, labels = batch(config)
    length = config.model.seq_len
    bounds = torch.tensor([0, 10, length, 2 * length], dtype=torch.int32)
    return {
        "masked": model(tokens, labels, Documents(bounds, length)).detach(),
        "whole": model(tokens, labels).detach(),
        "first": model(tokens[:1, :10], labels[:1, :10]).detach(),
        "second": model(tokens[:1, 10:], labels[:1, 10:]).detach(),
    }


def test_document_mask_is_the_same_as_documents_apart():
    config = configure("parallel.expert_parallel=1", "moe.top_k=1")
    (found,) = run_ranks(1, documents, config)
    apart = torch.cat([found["first"], found["second"]], 1)
    assert torch.allclose(found["masked"][:1], apart, atol=1e-5)
    assert torch.allclose(found["masked"][1], found["whole"][1], atol=1e-5)  # one document
    assert not torch.allclose(found["masked"][0], found["whole"][0], atol=1e-3)


def test_documents_make_nothing_wait(monkeypatch):
    """Where they are is known on the host; and FSDP, which warns of a view, gets none."""
    monkeypatch.setattr(GPTModel, "forward", lambda self, tokens, *_, **__: tokens.float())
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    bounds = torch.tensor([0, 5, 8, 16], dtype=torch.int32)
    with Launches() as launched:
        out = GPT.forward(GPT.__new__(GPT), tokens, tokens, Documents(bounds, 8))
    assert launched.names == ["_to_copy", "clone"]
    assert out.shape == tokens.shape
    assert not out._is_view()


def first_loss(rank: int, config: Config) -> tuple[float, int, list[str]]:
    model = build(config)
    tokens, labels = batch(config)
    loss = model(tokens, labels).mean()
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    return float(loss.detach()), sum(p.numel() for p in model.parameters()), without


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.tie_embeddings=true"],
        ["model.qk_norm=true", "model.head_dim=64"],
        ["moe.shared_ffn_hidden_size=256"],
        ["moe.top_k=1"],
        ["moe.top_k=4", "moe.aux_loss_coeff=0", "moe.z_loss_coeff=0"],
        ["moe.force_balance=true"],
    ],
)
def test_every_parameter_counts_and_learns(overrides):
    config = configure("parallel.expert_parallel=1", *overrides)
    ((loss, parameters, without_gradient),) = run_ranks(1, first_loss, config)
    assert loss == pytest.approx(5.8, abs=0.4)  # ln(320) = 5.77: it knows nothing yet
    assert parameters == flops.count(config.model, config.moe).total_params
    assert not without_gradient


def counted_flops(rank: int, config: Config) -> int:
    model = build(config)
    tokens, labels = batch(config)
    counter = FlopCounterMode(display=False)
    # The counter does not know the CPU's flash attention; plain matrix products it does.
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, labels).sum().backward()
    return counter.get_total_flops()


def test_flops_agree_with_pytorchs_own_counter():
    """FlopCounterMode sees the matrix products that run. The formula differs in two ways:

    - it halves attention for the causal mask, where the counter sees the whole score matrix;
    - experts run on rows that are padded with zeros to a multiple of 64, which it leaves out.
    """
    config = configure("parallel.expert_parallel=1", "moe.shared_ffn_hidden_size=128")
    (found,) = run_ranks(1, counted_flops, config)
    model, moe = config.model, config.moe
    tokens = 2 * model.seq_len
    scores = 2 * model.seq_len * model.num_heads * model.head_size  # q k^T of a token
    whole_attention = 3 * model.num_layers * 2 * scores  # q k^T and p v, forward and backward
    wanted = tokens * (flops.count(model, moe).flops_per_token + whole_attention // 2)
    expert_row = 3 * 2 * 3 * model.hidden_size * moe.ffn_hidden_size
    padding, rest = divmod(found - wanted, expert_row)
    assert rest == 0
    assert 0 <= padding <= model.num_layers * moe.num_experts * 63


def clipped(rank: int, config: Config) -> SimpleNamespace:
    ranks = parallel.Ranks(
        rank, rank, 2, torch.device("cpu"), *_meshes(config.parallel.expert_parallel)
    )
    model = build(config)
    parallel.shard(model, ranks, torch.float32, False)
    generator = torch.Generator().manual_seed(0)
    squares = 0.0
    parameters = list(model.parameters())
    for parameter in parameters:
        full = torch.randn(parameter.shape, generator=generator)
        squares += float(full.double().square().sum())
        assert isinstance(parameter, DTensor)
        parameter.grad = torch.distributed.tensor.distribute_tensor(
            full, parameter.device_mesh, parameter.placements
        )
    before = parameters[0].grad.to_local().clone()
    norm = clip_gradients(parameters, 2.0)
    ratio = parameters[0].grad.to_local().norm() / before.norm()
    return SimpleNamespace(norm=float(norm), want=squares**0.5, ratio=float(ratio))


def _meshes(ep: int):
    from torch.distributed.device_mesh import init_device_mesh

    return (
        init_device_mesh("cpu", (2 // ep, ep), mesh_dim_names=("expert_dp", "ep")),
        init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)),
    )


@pytest.mark.parametrize("ep", [1, 2])
def test_clipping_knows_the_whole_gradient(ep):
    for found in run_ranks(2, clipped, configure(f"parallel.expert_parallel={ep}")):
        assert found.norm == pytest.approx(found.want, rel=1e-5)
        assert found.ratio == pytest.approx(2.0 / found.want, rel=1e-4)


def rotary_dtypes(rank: int, config: Config) -> tuple[set, set]:
    ranks = parallel.Ranks(rank, rank, 2, torch.device("cpu"), *_meshes(2))
    model = build(config)
    parallel.shard(model, ranks, torch.bfloat16, False)
    angles, weights = set(), set()
    for layer in model.decoder.layers:
        layer.self_attention.register_forward_pre_hook(
            lambda module, args, kwargs: angles.add(kwargs["rotary_pos_emb"].dtype),
            with_kwargs=True,
        )
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: weights.add(args[2].dtype))
    model(*batch(config)).sum().backward()
    return angles, weights


def test_positions_and_routing_weights_stay_float32_in_bf16():
    """bfloat16 has 8 bits: it cannot tell position 1021 from 1022."""
    for angles, weights in run_ranks(2, rotary_dtypes, configure("parallel.expert_parallel=2")):
        assert angles == {torch.float32}
        assert weights == {torch.float32}


def test_a_capacity_that_is_ignored_is_said():
    (said,) = run_ranks(1, description, configure("parallel.expert_parallel=1", "moe.capacity=1.5"))
    assert "moe.capacity=1.5 is ignored" in said
    (said,) = run_ranks(1, description, configure("parallel.expert_parallel=1"))
    assert "capacity" not in said


def description(rank: int, config: Config) -> str:
    return build(config).runtime.description


def counted_in_validation(rank: int, config: Config) -> tuple[float, int]:
    model = build(config)
    runtime = model.runtime
    ranks: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    training = loop.Training(config, ranks, model, torch.optim.SGD(model.parameters()))

    def dropping(*_: Any) -> None:
        runtime.counts.dropped_rows = runtime.counts.dropped_rows + 5
        runtime.dispatcher.bytes_sent += 5

    model.register_forward_pre_hook(dropping)
    runtime.counts.dropped_rows, runtime.dispatcher.bytes_sent = torch.tensor(3.0), 4
    tokens = torch.zeros(1, config.model.seq_len, dtype=torch.int64)
    bounds = torch.tensor([0, config.model.seq_len], dtype=torch.int32)
    one = Batch(tokens, tokens, Documents(bounds, config.model.seq_len))
    corpus: Any = SimpleNamespace(valid_batches=lambda *_: [one, one], tokenizer=ByteTokenizer())
    loop.validate(training, corpus)
    return float(runtime.counts.dropped_rows), runtime.dispatcher.bytes_sent


def test_what_is_counted_is_the_trainings():
    (counted,) = run_ranks(1, counted_in_validation, configure("parallel.expert_parallel=1"))
    assert counted == (3.0, 4)
