"""The MoE layer: router, path, combine, as megatron-core's MoELayer with our experts inside."""

import math

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from models.moe.experts import Experts
from models.moe.gating import Gating
from models.moe.runtime import GPTConfig


class Router(TopKRouter):
    """megatron-core's top-k router, which returns its choice as the lists that its top-k makes.

    `entropy` is a float32 scalar on the device: of the last training batch's probabilities over
    all experts, mean of tokens, 1 where every expert is as likely. It costs a few small kernels,
    so it is taken only while `measures_entropy`.

    With `moe.expert_bias` (models/moe/balance.py) `expert_bias` is float32 [experts], and
    `step_load` int64 [experts] counts the tokens that this rank sent to each in this step.
    """

    measures_entropy = False
    entropy: Tensor | None = None

    def __init__(self, config: GPTConfig, pg_collection=None, **newer) -> None:
        """Called by megatron-core's MoELayer."""
        super().__init__(config, pg_collection, **newer)
        self.has_expert_bias = config.expert_bias
        if config.expert_bias:
            del self.expert_bias  # the stock one's, None: it takes no softmax
            self.register_buffer("expert_bias", torch.zeros(self.num_experts))
            load = torch.zeros(self.num_experts, dtype=torch.int64)
            self.register_buffer("step_load", load, persistent=False)

    def gating(self, input: Tensor) -> Tensor:
        if input.dtype is self.weight.dtype is torch.bfloat16:
            logits = Gating.apply(input.flatten(0, -2), self.weight)
            logits = logits.view(*input.shape[:-1], self.num_experts)
        else:
            logits = F.linear(input.float(), self.weight.float())
        if self.measures_entropy and self.training:
            probs = logits.detach().float().softmax(-1)
            experts = max(logits.shape[-1], 2)
            self.entropy = torch.special.entr(probs).sum(-1).mean() / math.log(experts)
        return logits

    def routing(self, logits: Tensor, padding_mask: None = None) -> tuple[Tensor, Tensor]:
        """Route by logits [seq, batch, experts]: weights float32 [T, top_k] of each token's
        experts, and their numbers, int64 [T, top_k]; the best choice first.

        The stock one spreads both over all experts, [T, experts], as its own dispatchers take them.
        Ours take lists, for which another top-k would have to search those.
        """
        logits = self.apply_z_loss(logits.view(-1, self.num_experts))
        before = self.config.moe_router_pre_softmax
        scores = logits.softmax(-1, dtype=torch.float32) if before else logits
        if self.has_expert_bias:
            expert_ids = (logits.detach() + self.expert_bias).topk(self.topk).indices
            chosen = scores.gather(1, expert_ids)
        else:
            chosen, expert_ids = scores.topk(self.topk)
        weights = chosen if before else chosen.softmax(-1, dtype=torch.float32)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            routing_map, scores = compute_routing_scores_for_aux_loss(
                logits, self.topk, "softmax", fused=self.config.moe_router_fusion
            )
            weights = self._apply_aux_loss(weights, scores, routing_map)
        return weights, expert_ids


class ExpertParallelMoE(MoELayer):
    """megatron-core's MoELayer whose experts, dispatch included, are `models/moe/experts.py`.

    `expert_load` int64 [num_experts] counts the tokens that
    this rank's router sent to each expert since it was last set to zero.
    """

    experts: Experts
    router: Router

    def __init__(self, config: GPTConfig, layer_number=None, pg_collection=None, **newer) -> None:
        """Called by megatron-core's TransformerLayer; a newer one passes more."""
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
        weights, expert_ids = self.route(hidden_states)
        if self.training:
            chosen = expert_ids.view(-1)
            ones = torch.ones_like(chosen)
            self.expert_load.scatter_add_(0, chosen, ones)
            if self.router.has_expert_bias:
                self.router.step_load.scatter_add_(0, chosen, ones)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = self.experts(tokens, expert_ids, weights).view_as(hidden_states)
        return output if shared is None else output + shared, None
