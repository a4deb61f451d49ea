"""What a GPU's memory holds at the peak of a step, by part.

The moments are those of `loop.step`: the loss; each layer's experts in their backward pass, when
the layers after it have freed their activations and have their gradients; the end of the backward
pass; the optimizer. Everything is what PyTorch's allocator counts, `memory/peak_allocated_gib`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from models.fp8.tensor import BLOCK
from train.planning import kept
from train.planning.experts import backward_bytes, forward_bytes
from train.planning.shapes import Shape

GIB = 1024**3
HALF, FULL = 2, 4

FIT = Path(__file__).parents[2] / "docs" / "results" / "plan_fit.json"
"""Written by `python -m scripts.plan.fit`: what is not counted but fitted."""

USABLE = 0.92
"""Share of a GPU's memory that a plan gives to tensors. An assumption: the rest is for CUDA's
context, NCCL's and DeepEP's buffers, which the allocator does not see, and for fragmentation."""


@dataclass(frozen=True)
class Moment:
    """One of a step's, in bytes by part."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def peak(shape: Shape, overhead: float | None = None) -> Moment:
    """The peak of a step. `overhead` in bytes is what was fitted, unless given."""
    found = max(moments(shape), key=lambda moment: moment.total)
    rest = fitted_overhead() if overhead is None else overhead
    return Moment(found.name, {**found.parts, "overhead": rest})


def fits_if_it_waits(shape: Shape, room: float) -> bool:
    """Whether a step fits into `room` bytes whose layers wait for the count of their rows, as with
    `moe.capacity=auto` where one that has set room aside for them does not fit."""
    return shape.has_room and peak(shape.without_room()).total <= room


def fitted_overhead() -> float:
    """Bytes that measured peaks had beyond what is counted; 0 where nothing was fitted yet."""
    try:
        return float(json.loads(FIT.read_text(encoding="utf-8"))["memory"]["overhead_gib"]) * GIB
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def moments(shape: Shape) -> Iterator[Moment]:
    """Every moment that can be the peak."""
    model, layers = shape.model, shape.model.num_layers
    always, layer = _always(shape), kept.of_layer(shape)
    hidden = shape.tokens * model.hidden_size * HALF
    logits = shape.tokens * model.vocab_size * HALF
    # Its gradient waits for the embedding's, in BF16.
    output_layer = model.vocab_size * model.hidden_size * HALF

    def moment(name: str, kept_by: int, gradients: float, **computing: float) -> Moment:
        """`kept_by` layers have their activations."""
        attention = sum(size for of, size in layer.items() if of != "experts")
        activations = {
            "activations, attention": float(kept_by * attention),
            "activations, experts": float(kept_by * layer["experts"]),
        }
        return Moment(name, always | activations | {"gradients": gradients} | computing)

    # What all micro-batches of a step but the last leave, not sharded yet.
    whole = layers * (shape.dense + shape.experts) + shape.root
    left = float(whole * shape.gradient) if shape.micro_batches > 1 else 0.0
    experts = shape.experts / shape.replicas * shape.experts_gradient
    sharded = shape.dense / shape.ranks * FULL + experts

    def gradients(done: int) -> float:
        """After the backward pass of this many layers."""
        return left or done * sharded

    yield moment("forward pass of the last layer", layers, left, computing=forward_bytes(shape))
    yield moment("loss", layers, left, loss=logits + 3 * hidden + output_layer)
    computed = shape.gradient if shape.replicas == 1 else HALF
    for done in range(layers):
        so_far = gradients(done) + output_layer
        reduced = shape.dense * shape.gradient if done else 0  # the layer before, beside this one
        computing = hidden + reduced + backward_bytes(shape, computed)
        name = "backward pass of a layer's experts"
        yield moment(name, layers - done, so_far, computing=computing)
        if shape.replicas > 1:  # as it is summed, beside the gradient
            reducing = hidden + shape.experts * (HALF + shape.gradient)
            name = "reduction of a layer's experts"
            yield moment(name, layers - done, so_far, computing=reducing)
    ends = max(left, gradients(layers) + shape.root * FULL / shape.ranks)
    reducing = shape.root * (HALF + shape.gradient)
    yield moment("reduction of the embedding", 0, ends, computing=reducing)
    # Prepared weights are forgotten before it, and made again by the one that prepares.
    every = layers * sharded + shape.root * FULL / shape.ranks
    optimizer = moment("optimizer", 0, every).parts
    yield Moment("optimizer", optimizer if shape.prepare else optimizer | {"prepared weights": 0.0})


def _always(shape: Shape) -> dict[str, float]:
    """What is there at every moment."""
    return {
        "weights": shape.stored * FULL,
        "AdamW's means": shape.stored * (shape.first_moment + FULL),
        "gathered weights": _gathered(shape) * HALF,
        "prepared weights": _prepared(shape),
    }


def _gathered(shape: Shape) -> float:
    """Parameters that FSDP has gathered in the backward pass: all, or two layers of them."""
    layers = min(2, shape.model.num_layers) if shape.reshard else shape.model.num_layers
    experts = shape.experts if shape.replicas > 1 else 0
    return shape.root + layers * (shape.dense + experts)


def _prepared(shape: Shape) -> float:
    """The experts' weights as GEMMs read them: a copy in BF16, or in FP8 both ways with a scale for
    each 128 x 128. Where FSDP gathers them in BF16 there is no copy."""
    count = shape.model.num_layers * shape.experts
    if shape.linear == "bf16":
        return count * HALF if shape.replicas == 1 else 0.0
    return 2 * count * (1 + FULL / BLOCK**2)


def budget(memory_bytes: float) -> float:
    """The bytes that a plan may use of a GPU with this much memory."""
    return USABLE * memory_bytes
