"""Whether a run fits into the GPUs that it was started on, in one line."""

from dataclasses import replace

from train.config import Config
from train.planning.memory import GIB, budget, fits_if_it_waits, peak
from train.planning.shapes import shape_of


def why_not(config: Config, ranks: int, node: int, memory: int, gpu: str) -> str | None:
    """Why it is not planned to fit into a GPU of `memory` bytes; None if it is.

    A plan, not a law: it may fit anyway.
    """
    shape = shape_of(config, ranks, node)
    found, room = peak(shape), budget(memory)
    if found.total <= room:
        return None
    largest = max(found.parts, key=lambda part: found.parts[part])
    smaller = (replace(shape, micro_batch=size) for size in range(1, shape.micro_batch))
    sizes = [one.micro_batch for one in smaller if peak(one).total <= room]
    if sizes:
        advice = f"train.micro_batch={sizes[-1]} would fit"
    elif peak(replace(shape, moe=shape.moe.model_copy(update={"recompute": True}))).total <= room:
        advice = "moe.recompute=true would fit"
    else:
        advice = "start more ranks, or a smaller model"
    needs = f"{found.total / GIB:.1f} GiB of each GPU"
    has = f"{room / GIB:.1f} of {memory / GIB:.1f}"
    if fits_if_it_waits(shape, room):
        return (
            f"this run is planned to need {needs} with the room that moe.capacity=auto sets aside, "
            f"and {gpu} has {has} for it: steps whose room does not fit wait in every layer, which "
            f"takes longer; {advice} without"
        )
    return (
        f"this run is planned to need {needs}, most of it {largest} "
        f"({found.parts[largest] / GIB:.1f}), and {gpu} has {has} for it; {advice}; "
        "python -m scripts.plan shows what takes it"
    )
