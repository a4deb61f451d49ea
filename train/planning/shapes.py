"""How much of the model a rank holds, and how many rows its experts get."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from models.config import ModelConfig, MoEConfig
from models.fp8.linear import DirectLinear, HighPrecisionLinear
from models.moe.paths import PATHS
from models.moe.room import MOST_SPARE, SPARE, coarse_rows, fixed_rows, most_needed
from train.config import Config

UNEVEN = 1.2
"""An assumption where the router chooses: the most loaded rank of a group gets this many times its
share."""

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Shape:
    """A rank of a run. Parameters are counted, not bytes."""

    model: ModelConfig
    moe: MoEConfig
    ranks: int
    """Ranks of the run."""
    expert_ranks: int
    """That share one set of experts."""
    node: int
    """GPUs of a node."""
    micro_batch: int
    micro_batches: int
    """Micro-batches of an optimizer step."""
    reshard: bool
    """`parallel.reshard_after_forward`."""
    prepare: bool
    """`optim.prepare_weights`, as it comes out on GPUs."""
    gradient: int = 4
    """Bytes of `optim.grad_dtype`."""
    first_moment: int = 4
    """Bytes of `optim.first_moment_dtype`."""
    full: bool = False
    """Whether every expert gets the same number of rows, without padding or room, as in a benchmark
    of one layer."""

    @property
    def linear(self) -> Literal["bf16", "stock", "direct"]:
        """How the path computes the experts' GEMMs: in BF16; in FP8 as TransformerEngine; or in FP8
        without quantizing anything twice."""
        linear = PATHS[self.moe.path].LINEAR
        if linear is HighPrecisionLinear:
            return "bf16"
        return "direct" if linear is DirectLinear else "stock"

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a rank."""
        return self.micro_batch * self.model.seq_len

    @property
    def replicas(self) -> int:
        """Replicas of each expert."""
        return self.ranks // self.expert_ranks

    @property
    def local_experts(self) -> int:
        return self.moe.num_experts // self.expert_ranks

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.model.num_heads * self.model.head_size

    @property
    def key(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.model.num_kv_heads * self.model.head_size

    @property
    def dense(self) -> int:
        """Parameters of a layer that every rank computes with."""
        model, moe = self.model, self.moe
        hidden = model.hidden_size
        attention = hidden * (2 * self.query + 2 * self.key)
        norms = 2 * hidden + (2 * model.head_size if model.qk_norm else 0)
        shared = 3 * hidden * (moe.shared_ffn_hidden_size or 0)
        return attention + norms + shared + hidden * moe.num_experts

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, output layer, final norm."""
        matrices = 1 if self.model.tie_embeddings else 2
        return self.model.hidden_size * (matrices * self.model.vocab_size + 1)

    @property
    def experts(self) -> int:
        """Parameters of a layer's experts that a rank computes with; replicas share storage."""
        return 3 * self.model.hidden_size * self.moe.ffn_hidden_size * self.local_experts

    @property
    def stored(self) -> float:
        """Parameters that a rank stores, and updates."""
        dense = self.model.num_layers * self.dense + self.root
        return dense / self.ranks + self.model.num_layers * self.experts / self.replicas

    @property
    def experts_gradient(self) -> int:
        """Bytes of a gradient of the experts once it is reduced: what FSDP leaves is float32, as
        the weight is."""
        return self.gradient if self.replicas == 1 else BYTES["fp32"]

    @property
    def stored_gradients(self) -> float:
        """Bytes of the gradients that the optimizer reads."""
        dense = self.model.num_layers * self.dense + self.root
        experts = self.model.num_layers * self.experts / self.replicas
        return dense / self.ranks * BYTES["fp32"] + experts * self.experts_gradient

    @property
    def even(self) -> int:
        """Copies of tokens that a rank's experts get where routing is even."""
        return self.tokens * self.moe.top_k

    @property
    def waits(self) -> bool:
        """Whether layers wait for the count of their rows, as `models.moe.room.settle` decides on a
        GPU with one GEMM for all experts."""
        if self.moe.capacity is None:
            return True
        one_node = self.expert_ranks <= min(self.node, 8) and self.moe.dispatch != "all_to_all"
        return self.moe.capacity == "default" and self.expert_ranks > 1 and not one_node

    @property
    def has_room(self) -> bool:
        """Whether room is set aside by what was needed lately."""
        return isinstance(self.moe.capacity, str) and not self.waits

    def without_room(self) -> "Shape":
        """The same in a step for whose room memory does not suffice: every layer waits."""
        return replace(self, moe=self.moe.model_copy(update={"capacity": None}))

    @property
    def rows(self) -> int:
        """Rows of the experts' buffers, P: padding and room included.

        But not what DeepGEMM before 2.6 adds: with it P is rounded up to whole waves of tiles
        (`rows_step` in models/fp8/deep_gemm.py), 16,896 rows on an H100. A plan knows neither
        whether it will be installed nor the GPU's multiprocessors.
        """
        if self.full:
            return self.even
        step = PATHS[self.moe.path].ROW_ALIGNMENT
        capacity, local = self.moe.capacity, self.local_experts
        if isinstance(capacity, int | float) and not isinstance(capacity, bool):
            return fixed_rows(capacity, self.even, self._most, local, step)
        if self.waits:
            return self._needed
        # The router's choices come as surprises, early in a run as the largest that count.
        spare = SPARE if self._uneven == 1.0 else MOST_SPARE
        wanted = self._needed + math.ceil(self.even / spare)
        return coarse_rows(wanted, self.even, self._most, step)

    @property
    def computed(self) -> int:
        """Rows that the experts' kernels compute and move. Of TransformerEngine's all of P is
        counted; the others leave room that nothing came in alone, except for DeepGEMM before
        2.6."""
        return self.rows if self.linear == "stock" else min(self.rows, self._needed)

    @property
    def _needed(self) -> int:
        """Rows that come to a rank's experts, padding included: half a step for each of them."""
        if self.full:
            return self.even
        step = PATHS[self.moe.path].ROW_ALIGNMENT
        come = math.ceil(self.even * self._uneven + self.local_experts * step / 2)
        return min(come, self._most)

    @property
    def _uneven(self) -> float:
        """Rows of the most loaded rank of a group as a multiple of the even share."""
        return 1.0 if self.moe.force_balance or self.expert_ranks == 1 else UNEVEN

    @property
    def _most(self) -> int:
        """Rows that any routing can need."""
        step, local = PATHS[self.moe.path].ROW_ALIGNMENT, self.local_experts
        return most_needed(self.tokens * self.expert_ranks, self.moe.top_k, local, step)

    @property
    def sent_share(self) -> float:
        """Share of tokens that have an expert on a given rank of their group."""
        experts, elsewhere = self.moe.num_experts, self.moe.num_experts - self.local_experts
        none = 1.0
        for chosen in range(self.moe.top_k):
            none *= max(0, elsewhere - chosen) / (experts - chosen)
        return 1 - none

    @property
    def received(self) -> int:
        """Rows that a rank receives, R; where nothing waits, room for all there can be."""
        if self.expert_ranks == 1:
            return self.tokens
        most = self.tokens * self.expert_ranks
        return math.ceil(most * self.sent_share) if self.waits else most


def shape_of(config: Config, ranks: int, node: int = 8, micro_batch: int | None = None) -> Shape:
    """The rank of a run of `ranks` GPUs, `node` of them in a node.

    With another `micro_batch` than the config's there are as many micro-batches as fill the global
    batch, and at least one.
    """
    size = micro_batch or config.train.micro_batch
    prepare = config.optim.prepare_weights
    if prepare == "auto":
        prepare = config.parallel.expert_parallel == ranks
    return Shape(
        model=config.model,
        moe=config.moe,
        ranks=ranks,
        expert_ranks=config.parallel.expert_parallel,
        node=min(node, ranks),
        micro_batch=size,
        micro_batches=max(1, config.global_batch(ranks) // (size * ranks)),
        reshard=config.parallel.reshard_after_forward,
        prepare=prepare,
        gradient=BYTES[config.optim.grad_dtype],
        first_moment=BYTES[config.optim.first_moment_dtype],
    )
