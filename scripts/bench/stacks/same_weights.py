"""Stock megatron-core's model with the weights that ours begins with.

Then both compute one function from the first step on: their losses can be compared, and routers
that learn from the same text begin with the same load.
"""

import re

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from models.initial_weights import InitialWeights

NORM = "self_attention.linear_qkv.layer_norm_weight"
"""TransformerEngine has this norm in the linear layer after it; ours is a module."""
EXPERT = re.compile(r"(.*mlp\.experts)\.(?:local_experts\.(\d+)\.)?linear_fc([12])\.weight(\d*)")
"""A weight of one of the rank's experts, in megatron-core's own layers or in TransformerEngine's
grouped ones. Its rows lie as those of our `up`, gate before up, or `down`."""


@torch.no_grad()
def draw(gpt: GPTModel, weights: InitialWeights) -> None:
    """Draw this rank's weights as `models.gpt.initialize` does, rounded to the model's dtype."""
    ranks = parallel_state.get_expert_model_parallel_world_size()
    local_experts = gpt.config.num_moe_experts // ranks
    first = parallel_state.get_expert_model_parallel_rank() * local_experts
    for name, parameter in gpt.named_parameters():
        ours, expert = our_name(name)
        drawn = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        weights.draw(drawn, ours, None if expert is None else first + expert)
        parameter.copy_(drawn)


def our_name(name: str) -> tuple[str, int | None]:
    """What `GPT` calls a parameter of megatron-core's, and which of the rank's experts has it."""
    if name.endswith(NORM):
        return f"{name.removesuffix(NORM)}input_layernorm.weight", None
    if match := EXPERT.fullmatch(name):
        experts, expert, linear, grouped_expert = match.groups()
        return f"{experts}.{'up' if linear == '1' else 'down'}", int(expert or grouped_expert)
    return name, None
