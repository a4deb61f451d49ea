"""One MoE layer on its own, from the router's choice to the combined output, to be measured.

Only `Experts` and its `Runtime` are built, no model around them. Routing is exactly even: every
expert gets the same number of rows.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from models.config import ModelConfig, MoEConfig, PathName
from models.moe.experts import Experts
from models.moe.runtime import GPTConfig, Runtime, build_runtime, why_not


@dataclass(frozen=True)
class Shape:
    """An MoE layer of a published model."""

    hidden: int
    ffn: int
    """Width of one expert's SwiGLU."""
    experts: int
    top_k: int


SHAPES = {
    "qwen3_30b_a3b": Shape(2048, 768, 128, 8),
    "deepseek_v2_lite": Shape(2048, 1408, 64, 6),
    "mixtral_8x7b": Shape(4096, 14336, 8, 2),
    "deepseek_v3": Shape(7168, 2048, 256, 8),
    "tiny": Shape(256, 128, 8, 2),  # of no model: for a CPU
}

WEIGHT_BYTES = 2 + 2 + 2
"""Bytes for each weight at the peak: BF16, its BF16 gradient, and FP8 both ways."""

MEMORY_SHARE = 0.85
"""Share of a GPU's memory that a layer may plan to use."""


def fit(shape: Shape, tokens: int, ranks: int, memory: int | None) -> tuple[Shape, int]:
    """The shape with as many experts as fit in `memory` bytes a rank, and the tokens for them.

    Experts are halved until they fit, and each rank's tokens with them: what one expert gets stays
    the same. None stands for unlimited memory. Raises ValueError where nothing fits, or the experts
    that do cannot be spread evenly.
    """
    while memory is not None and _bytes(shape, tokens, ranks) > MEMORY_SHARE * memory:
        if shape.experts % 2 or tokens % 2 or shape.experts // 2 < max(shape.top_k, ranks):
            raise ValueError(f"{shape} with {tokens} tokens does not fit in {memory} bytes")
        shape, tokens = replace(shape, experts=shape.experts // 2), tokens // 2
    if shape.experts % ranks:
        raise ValueError(f"{shape.experts} experts cannot be spread over {ranks} ranks")
    if tokens * shape.top_k % shape.experts:
        raise ValueError(
            f"{tokens} tokens with {shape.top_k} experts each cannot be spread evenly over "
            f"{shape.experts} experts"
        )
    return shape, tokens


def _bytes(shape: Shape, tokens: int, ranks: int) -> float:
    """A rough upper bound of what a rank needs at once."""
    weights = shape.experts / ranks * 3 * shape.hidden * shape.ffn
    rows = tokens * shape.top_k
    # Rows in BF16: tokens and gradients before and after permuting, what SwiGLU reads and writes.
    return weights * WEIGHT_BYTES + rows * (12 * shape.hidden + 16 * shape.ffn)


def even_routing(tokens: int, shape: Shape, device: torch.device) -> Tensor:
    """int64 [tokens, top_k]: different experts for a token, each expert as often as any other.

    Raises nothing; `fit` guarantees that the numbers divide.
    """
    slots = torch.arange(tokens * shape.top_k, device=device) % shape.experts
    shuffled_experts = torch.randperm(shape.experts, device=device)
    ids = shuffled_experts[slots].view(tokens, shape.top_k)
    return ids[torch.randperm(tokens, device=device)]


class Layer:
    """The experts of a shape on this rank, a batch for them, and a runtime for each path."""

    def __init__(self, shape: Shape, tokens: int, device: torch.device, dispatch: str) -> None:
        """Weights and activations are BF16, as FSDP's compute copies are; float32 on a CPU."""
        self.shape = shape
        self.tokens = tokens
        self.device = device
        self._dispatch = dispatch
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        config = GPTConfig(  # `forward` is given the runtime
            num_layers=1,
            num_attention_heads=1,
            hidden_size=shape.hidden,
            num_moe_experts=shape.experts,
            moe_ffn_hidden_size=shape.ffn,
            use_cpu_initialization=device.type == "cpu",
        )
        local_experts = shape.experts // dist.get_world_size()
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            self.experts = Experts(local_experts, config)
        finally:
            torch.set_default_dtype(default)
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.normal_(0, 0.02)
        self.x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype).requires_grad_()
        self.ids = even_routing(tokens, shape, device)
        self.weights = torch.rand(tokens, shape.top_k, device=device).softmax(1).requires_grad_()
        self.grad = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)

    def runtime(self, path: PathName) -> Runtime:
        """The runtime of a path here. Raises RuntimeError where the path cannot run."""
        model = ModelConfig(
            num_layers=1, hidden_size=self.shape.hidden, num_heads=1, num_kv_heads=1,
            vocab_size=1, seq_len=1,
        )  # fmt: skip
        moe = MoEConfig.model_validate(
            {
                "path": path,
                "dispatch": self._dispatch,
                "num_experts": self.shape.experts,
                "top_k": self.shape.top_k,
                "ffn_hidden_size": self.shape.ffn,
            }
        )
        reason = why_not(model, moe, self.device.type, dist.get_world_size())
        if reason:
            raise RuntimeError(reason)
        return build_runtime(model, moe, self.device.type)

    @property
    def flops(self) -> int:
        """FLOPs of forward and backward on a rank: 2 + 4 for each token and weight that it
        meets."""
        weights = 3 * self.shape.hidden * self.shape.ffn
        return 6 * self.tokens * self.shape.top_k * weights

    def forward(self, runtime: Runtime) -> Tensor:
        """The layer's output, [tokens, hidden]."""
        self.experts.runtime = runtime
        # As in training with one micro-batch a step, where the weights are new every time.
        self.experts.forget_prepared()
        return self.experts(self.x, self.ids, self.weights)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """Gradients of tokens, routing weights, and the two weight tensors."""
        inputs = (self.x, self.weights, *self.experts.parameters())
        return torch.autograd.grad(output, inputs, self.grad)
