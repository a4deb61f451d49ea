"""A plan as a picture: time, what bounds it, speed and memory, from few GPUs to many."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.compare.colors import COLORS
from scripts.plan.machines import Machine
from scripts.plan.plan import Plan
from scripts.plan.time import KINDS
from train.planning.memory import GIB
from train.whole_file import whole

COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)

KIND_COLORS = ("#0072B2", "#56B4E9", "#F0E442", "#E69F00", "#D55E00")
MEMORY_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#8cd17d", "#E69F00", "#F0E442", "#D55E00",
                 "#CC79A7", "#8A8A94", "#bab0ac")  # fmt: skip


def draw(
    path: Path, title: str, machine: Machine, found: Mapping[int, Sequence[Plan]], chosen: str
) -> None:
    """Draw a .png or .svg; `chosen` is the path whose time and memory are shown in parts.

    Raises OSError where it cannot be written.
    """
    # The same plan gives the same file, and its text stays text.
    with mpl.rc_context({"svg.hashsalt": "plan", "svg.fonttype": "none"}):
        _draw(path, title, machine, found, chosen)


def _draw(
    path: Path, title: str, machine: Machine, found: Mapping[int, Sequence[Plan]], chosen: str
) -> None:
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    mine = {count: next(p for p in plans if p.path == chosen) for count, plans in found.items()}
    _times(axes[0, 0], mine, chosen)
    _speeds(axes[0, 1], found)
    _memories(axes[1, 0], mine, machine, chosen)
    _bounds(axes[1, 1], mine, chosen)
    figure.suptitle(f"{title}, planned for {machine.name}", fontsize=11)
    kind = path.suffix.removeprefix(".")
    with whole(path) as new:
        figure.savefig(
            new, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None
        )


def _ticks(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_xlabel("GPUs")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _stack(axes: Axes, bars: Mapping[str, tuple[Sequence[float], str]]) -> None:
    bottom: list[float] | None = None
    for name, (heights, color) in bars.items():
        if not any(heights):
            continue
        base = bottom or [0.0] * len(heights)
        axes.bar(range(len(heights)), heights, bottom=base, color=color, label=name, width=0.7)
        bottom = [low + height for low, height in zip(base, heights, strict=True)]
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _times(axes: Axes, plans: Mapping[int, Plan], chosen: str) -> None:
    bars = {
        kind: ([sum(plan.ms[name] for name in names) for plan in plans.values()], color)
        for (kind, names), color in zip(KINDS.items(), KIND_COLORS, strict=True)
    }
    _stack(axes, bars)
    axes.set_title(f"ms a step of {chosen}, by what it waits for", fontsize=9, loc="left")
    _ticks(axes, list(plans))


def _speeds(axes: Axes, found: Mapping[int, Sequence[Plan]]) -> None:
    counts = list(found)
    for i, plan in enumerate(found[counts[0]]):
        speeds = [found[count][i].tokens_per_second for count in counts]
        axes.plot(range(len(counts)), speeds, "o-", ms=3, color=COLORS[plan.path].paper,
                  label=plan.path)  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False)
    axes.set_title("tokens/s of a GPU", fontsize=9, loc="left")
    _ticks(axes, counts)


def _memories(axes: Axes, plans: Mapping[int, Plan], machine: Machine, chosen: str) -> None:
    names = list(dict.fromkeys(name for plan in plans.values() for name in plan.memory.parts))
    bars = {
        name: ([plan.memory.parts.get(name, 0) / GIB for plan in plans.values()], color)
        for name, color in zip(names, MEMORY_COLORS, strict=False)
    }
    _stack(axes, bars)
    room = next(iter(plans.values())).room / GIB
    axes.axhline(room, color="black", lw=0.8, ls="--")
    # At the right, where bars are lowest.
    said = f"{room:.0f} of {machine.memory / GIB:.0f} GiB"
    axes.text(len(plans) - 0.6, room, said, fontsize=7, ha="right", va="bottom")
    axes.set_title(f"GiB of a rank of {chosen}", fontsize=9, loc="left")
    _ticks(axes, list(plans))


def _bounds(axes: Axes, plans: Mapping[int, Plan], chosen: str) -> None:
    """What each number of GPUs is bound by, in words."""
    axes.axis("off")
    rows = [
        [str(count), _most(plan), f"{plan.step_ms:,.0f}", plan.verdict]
        for count, plan in plans.items()
    ]
    table = axes.table(
        rows,
        colLabels=["GPUs", "bound by", "ms a step", "fits"],
        loc="center",
        cellLoc="left",
        colWidths=[0.1, 0.56, 0.18, 0.12],
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    axes.set_title(f"{chosen}: what bounds it", fontsize=9, loc="left")


def _most(plan: Plan) -> str:
    """The two that take most of a step."""
    return ", ".join(f"{kind} {share:.0%}" for kind, share in list(plan.bounds.items())[:2])
