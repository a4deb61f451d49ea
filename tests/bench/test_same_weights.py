"""Stock megatron-core with our weights computes what we compute, forward and backward.

On a CPU megatron-core's own layers stand in for TransformerEngine's. What they need replaced there
is attention, rotary positions and the router's GEMM (models/cpu_attention.py, models/moe/layer.py);
experts, dispatch, probabilities, norms, residuals and losses are megatron-core's.
"""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from models.cpu_attention import CausalAttention, RotaryPositions
from models.initial_weights import InitialWeights
from scripts.bench.stacks.same_weights import draw, our_name
from scripts.bench.stacks.stock_settings import transformer_arguments
from tests.models.test_gpt import build, configure
from tests.support.ranks import run_ranks
from train.config import Config

ON_A_CPU = {
    **dict.fromkeys(("bf16", "moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion"), False),
    **dict.fromkeys(("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion"), False),
    **dict.fromkeys(("cross_entropy_loss_fusion", "persist_layer_norm"), False),
    "params_dtype": torch.float32,
    "moe_token_dispatcher_type": "allgather",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
}


def stock(config: Config) -> GPTModel:
    model, moe = config.model, config.moe
    arguments = transformer_arguments(config, "bf16", (), "alltoall") | ON_A_CPU
    spec = get_gpt_layer_local_spec(
        num_experts=moe.num_experts, qk_layernorm=model.qk_norm, normalization="RMSNorm"
    )
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    gpt = GPTModel(
        TransformerConfig(**arguments),
        # Or the last norm is TransformerEngine's, where that is installed.
        TransformerBlockSubmodules([spec] * model.num_layers, WrappedTorchNorm),
        vocab_size=model.vocab_size,
        max_sequence_length=model.seq_len,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
        share_embeddings_and_output_weights=model.tie_embeddings,
    )
    gpt.rotary_pos_emb = RotaryPositions(
        model.head_size, 1.0, rotary_base=model.rope_base, use_cpu_initialization=True
    )
    return gpt


def compare(rank: int, config: Config) -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    TopKRouter.gating = lambda self, x: F.linear(x.float(), self.weight.float())  # type: ignore
    ours = build(config)
    theirs = stock(config)
    draw(theirs, InitialWeights(config.model, config.train.seed))
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
    torch.manual_seed(torch.initial_seed() + rank)
    tokens = torch.randint(config.model.vocab_size, (2, config.model.seq_len + 1))
    tokens, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    got, want = ours(tokens, labels), theirs(tokens, None, None, labels=labels)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got.mean().backward()
    want.mean().backward()
    parameters = dict(ours.named_parameters())
    seen = set()
    for name, parameter in theirs.named_parameters():
        at, expert = our_name(name)
        seen.add(at)
        found = parameters[at] if expert is None else parameters[at][expert]
        assert torch.equal(parameter, found), name
        gradient = parameters[at].grad
        gradient = gradient if expert is None else gradient[expert]
        size = float(parameter.grad.norm())
        assert float((gradient - parameter.grad).norm()) <= 1e-5 * size, name
        assert size > 0 or expert is not None, f"{name}: nothing learns"
    assert seen == set(parameters)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("model.qk_norm=true", "model.embedding_init_std=1", "moe.shared_ffn_hidden_size=128"),
        ("moe.top_k=1", "model.tie_embeddings=true", "moe.z_loss_coeff=0"),
    ],
)
def test_one_function(ranks: int, keys: tuple[str, ...]):
    config = configure("moe.path=bf16", f"parallel.expert_parallel={ranks}", *keys)
    run_ranks(ranks, compare, config)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight", None)),
        ("mlp.experts.linear_fc1.weight12", ("mlp.experts.up", 12)),
        ("mlp.experts.linear_fc2.weight0", ("mlp.experts.down", 0)),
        ("mlp.router.weight", ("mlp.router.weight", None)),
        ("mlp.shared_experts.linear_fc1.weight", ("mlp.shared_experts.linear_fc1.weight", None)),
    ],
)
def test_names_of_transformer_engines_layers(theirs: str, ours: tuple[str, int | None]):
    layer = "decoder.layers.3."
    assert our_name(layer + theirs) == (layer + ours[0], ours[1])
