"""The weights that training begins with."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.config import ModelConfig


@dataclass(frozen=True)
class InitialWeights:
    """Draws each weight from a generator of its own, seeded by its name and the expert's number.

    So a weight does not depend on what was drawn before it, on the rank, or on the number of ranks.
    Normal with deviation `init_std`, `init_std / sqrt(2 * num_layers)` into the residual stream,
    `embedding_init_std` for the embedding unless it is None, norms at 1.
    """

    model: ModelConfig
    seed: int

    @torch.no_grad()
    def draw(self, weight: Tensor, name: str, expert: int | None = None) -> None:
        """Fill `weight`, float32: the parameter `name` of `GPT`, or one expert's part of it."""
        if weight.ndim == 1:
            nn.init.ones_(weight)
            return
        key = f"{self.seed}/{name}" if expert is None else f"{self.seed}/{name}/{expert}"
        generator = torch.Generator(weight.device)
        generator.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))
        weight.normal_(0, self._deviation(name), generator=generator)

    def _deviation(self, name: str) -> float:
        std, of_embedding = self.model.init_std, self.model.embedding_init_std
        if of_embedding is not None and name.startswith("embedding."):
            return of_embedding
        into_residual = name.endswith((".down", "linear_proj.weight", "linear_fc2.weight"))
        return std / math.sqrt(2 * self.model.num_layers) if into_residual else std
