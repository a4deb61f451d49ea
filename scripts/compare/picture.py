"""`compare.png`: the losses and their gap to the baseline."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from scripts.compare.arms import Arm
from scripts.compare.colors import COLORS, WIDE
from scripts.compare.reading import partner
from scripts.compare.runs import Run, common_losses

DASHES = ["-", "--", ":", "-."]  # runs of one path


class Style(TypedDict):
    """How a run's line is drawn: what `Axes.plot` takes."""

    color: str
    lw: float
    alpha: float
    ls: str


def draw_losses(axes: Axes, runs: Sequence[Run]) -> None:
    """Training loss as lines, validation loss as dots, by tokens."""
    for run, style in zip(runs, _styles(runs), strict=True):
        loss, valid = run.series("loss/train"), run.series("loss/valid")
        axes.plot(run.tokens(list(loss)), list(loss.values()), label=_plain(run.name), **style)
        axes.plot(run.tokens(list(valid)), list(valid.values()), "o", color=style["color"], ms=4)
    dots = any(run.series("loss/valid") for run in runs)
    axes.set_title("Training loss" + (" (dots: validation)" if dots else ""))
    axes.set_xlabel("tokens")
    axes.set_ylabel("cross-entropy, nats per token")


def draw_gaps(axes: Axes, runs: Sequence[Run], baseline: Arm) -> None:
    """Each run's training loss relative to the baseline's, in percent, by tokens."""
    for run, style in zip(runs, _styles(runs), strict=True):
        pairs = common_losses(run, partner(run, baseline))
        gaps = [(ours - theirs) / theirs * 100 for _, ours, theirs in pairs]
        axes.plot(run.tokens([step for step, _, _ in pairs]), gaps, label=_plain(run.name), **style)
    axes.set_title(f"Gap of the training loss to {_plain(baseline.name)}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("gap, %")


def _plain(name: str) -> str:
    """Between two dollars matplotlib would read mathematics."""
    return name.replace("$", r"\$")


def _styles(runs: Sequence[Run]) -> list[Style]:
    styles: list[Style] = []
    for index, run in enumerate(runs):
        width, opacity = (4.5, 0.5) if run.path == WIDE else (1.5, 1.0)
        earlier = sum(other.path == run.path for other in runs[:index])
        dash = DASHES[earlier % len(DASHES)]
        styles.append({"color": COLORS[run.path].paper, "lw": width, "alpha": opacity, "ls": dash})
    return styles


def save_png(path: Path, draws: Sequence[Callable[[Axes], None]]) -> None:
    """Panels side by side, black on white."""
    figure = Figure(figsize=(6.4 * len(draws), 3.8), layout="constrained")
    for index, draw in enumerate(draws):
        axes = figure.add_subplot(1, len(draws), index + 1)
        draw(axes)
        axes.xaxis.set_major_formatter(EngFormatter())  # tokens: 400 k, 10 M
        axes.grid(alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    # Below the panels, where it hides no curve.
    handles, names = figure.axes[0].get_legend_handles_labels()
    columns = 2 * len(draws)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150, facecolor="white")
