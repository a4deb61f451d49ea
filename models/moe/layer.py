"""The MoE layer: router, path, combine, as megatron-core's MoELayer with our experts inside."""

import math

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from models.moe.experts import Experts
from models.moe.runtime import GPTConfig


class Router(TopKRouter):
    """megatron-core's top-k router, in plain PyTorch where its own GEMM cannot run.

    `entropy` is a float32 scalar on the device: of the last training batch's probabilities over
    all experts, mean of tokens, 1 where every expert is as likely. It costs a few small kernels,
    so it is taken only while `measures_entropy`.
    """

    measures_entropy = False
    entropy: Tensor | None = None

    def gating(self, input: Tensor) -> Tensor:
        if input.is_cuda:
            logits = super().gating(input)
        else:
            # The stock gating moves its weight to a GPU; its GEMM needs TransformerEngine.
            logits = F.linear(input.float(), self.weight.float())
        if self.measures_entropy and self.training:
            probs = logits.detach().float().softmax(-1)
            experts = max(logits.shape[-1], 2)
            self.entropy = torch.special.entr(probs).sum(-1).mean() / math.log(experts)
        return logits


class ExpertParallelMoE(MoELayer):
    """megatron-core's MoELayer whose experts, dispatch included, are `models/moe/experts.py`.

    `expert_load` int64 [num_experts] counts the tokens that
    this rank's router sent to each expert since it was last set to zero.
    """

    experts: Experts
    router: Router

    def __init__(self, config: GPTConfig, layer_number=None, pg_collection=None, **newer) -> None:
        """As megatron-core's TransformerLayer calls it; a newer one says more."""
        super().__init__(
            config=config,
            submodules=MoESubmodules(
                experts=Experts,
                shared_experts=ModuleSpec(
                    module=SharedExpertMLP, submodules=config.shared_expert_linears
                ),
                router=Router,
            ),
            layer_number=layer_number,
            pg_collection=pg_collection,
            **newer,
        )
        # The stock constructor insists on one of its dispatchers; ours belongs to the experts.
        self.token_dispatcher = None
        self.register_buffer(
            "expert_load", torch.zeros(config.num_moe_experts, dtype=torch.int64), persistent=False
        )

    def forward(self, hidden_states: Tensor, intermediate_tensors=None, padding_mask=None):
        """[seq, batch, hidden] to the same shape, and None for the bias that is not there."""
        shared = self.shared_experts_compute(hidden_states)
        probs, routing_map = self.route(hidden_states)
        if self.training:
            self.expert_load += routing_map.sum(0)
        # The router's dense [T, experts] form, as the top_k lists that dispatchers want. Chosen by
        # the map, since a chosen expert's probability may have underflowed to zero.
        chosen = probs.detach().masked_fill(~routing_map, -1)
        expert_ids = chosen.topk(self.config.moe_router_topk).indices
        weights = probs.gather(1, expert_ids).float()

        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = self.experts(tokens, expert_ids, weights).view_as(hidden_states)
        return output if shared is None else output + shared, None
