"""What every stack is given alike: batches, and the state of the random number generators."""

import torch
from megatron.core import tensor_parallel

from models.documents import Documents
from train.config import Config
from train.data import batches as data
from train.data.batches import Batch
from train.parallel import Ranks


def batches(config: Config, ranks: Ranks, routing: str, steps: int) -> list[Batch]:
    """This rank's micro-batches of `steps` optimizer steps; they depend on the seed, not on the
    stack.

    Balanced routing does not look at tokens: they are random. Natural routing uses the config's
    text, since a router that learns from it loads experts as in a training run.
    """
    count = steps * config.accumulation(ranks.world_size)
    if routing == "natural":
        text = data.load(config).train_batches(ranks.rank, ranks.world_size)
        return [next(text).to(ranks.device) for _ in range(count)]
    generator = torch.Generator().manual_seed(config.train.seed * ranks.world_size + ranks.rank)
    shape = (config.train.micro_batch, config.model.seq_len + 1)
    length = config.model.seq_len
    bounds = torch.arange(0, shape[0] * length + 1, length, dtype=torch.int32)
    found = []
    for _ in range(count):
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        documents = Documents(bounds, length)
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents)
        found.append(batch.to(ranks.device))
    return found


def seed_everything(config: Config, ranks: Ranks) -> None:
    """Every stack draws the same: forced routing is drawn in the forward pass, on the device."""
    torch.manual_seed(config.train.seed + ranks.rank)
    tensor_parallel.model_parallel_cuda_manual_seed(
        config.train.seed, inference_rng_tracker=ranks.device.type != "cuda"
    )
