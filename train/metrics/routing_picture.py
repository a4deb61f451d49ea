"""Expert load as a heat map: a row per layer, a column per expert."""

from collections.abc import Sequence
from pathlib import Path


def save_heat_map(path: Path, load: Sequence[Sequence[float]], step: int) -> None:
    """Draw `load` [layers][experts], tokens over the layer's mean, into a PNG at `path`."""
    # Imported here, because it takes half a second that a run without pictures need not pay.
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    layers, experts = len(load), len(load[0])
    # At least from 0 to 2, so that the colours of an even load stay pale.
    norm = TwoSlopeNorm(vcenter=1, vmin=0, vmax=max(2.0, *(max(row) for row in load)))
    size = (max(4.5, min(14, 0.35 * experts + 2)), max(1.8, min(10, 0.3 * layers + 1.3)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(load, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    axes.set_title(f"Expert load at step {step}, tokens over the layer's mean", fontsize=10)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    for axis, count in ((axes.xaxis, experts), (axes.yaxis, layers)):
        axis.set_ticks(range(0, count, max(1, count // 16)))
    figure.colorbar(image, ax=axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
