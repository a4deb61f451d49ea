"""More of the comparison's page: a step's parts as stacked bars, the experts' load as heat maps."""

from collections.abc import Sequence

from scripts.compare.page.html import NOTHING, Html, fill, join
from scripts.compare.page.sections import CELL, HEAD, LINE, TABLE, dot
from scripts.compare.runs import (
    METRICS_FILE,
    ROUTING_FILE,
    Run,
    expert_load,
    median,
    profiled_rows,
    step_parts,
)

RELAYOUT = "time/relayout_ms"
PART_COLOURS = 19
"""`--part0` to `--part18` in the style sheet."""


def breakdown(runs: Sequence[Run]) -> Html:
    """Profiled steps as stacked bars on one scale, and as a table; empty without any."""
    measured = [(run, parts) for run in runs if (parts := step_parts(run))]
    if not measured:
        return NOTHING
    names = list(dict.fromkeys(name for _, parts in measured for name in parts))
    # What costs the most comes first, so that colours and the legend go to what matters.
    names.sort(key=lambda name: -max(parts.get(name, 0) for _, parts in measured))
    names.sort(key=lambda name: name == "time/other_ms")
    # Relayouts are the subject: their ends can be compared only where bars begin.
    names.sort(key=lambda name: name != RELAYOUT)
    longest = max(sum(parts.values()) for _, parts in measured) or 1
    colours = {name: f"var(--part{index % PART_COLOURS})" for index, name in enumerate(names)}
    colours["time/other_ms"] = "var(--other)"
    colours[RELAYOUT] = "var(--relayout)"
    bars = []
    for run, parts in measured:
        segments = [
            fill(
                '<i style="width:{width:.3f}%;background:{colour}" '
                'title="{part}: {ms:.3g} ms"></i>',
                width=parts[name] / longest * 100,
                colour=colours[name],
                part=part_label(name),
                ms=parts[name],
            )
            for name in names
            if parts.get(name)
        ]
        bar = fill(
            '<div class="bar"><span>{dot}{run}</span><div class="stack" role="img" '
            'aria-label="{run}: {total:.1f} ms">{segments}</div><b>{total:,.1f} ms</b></div>',
            dot=dot(run),
            run=run.name,
            total=sum(parts.values()),
            segments=join(segments),
        )
        bars.append(bar)
    legend = [
        fill(
            '<span><i class="swatch" style="background:{colour}"></i>{part}</span>',
            colour=colours[name],
            part=part_label(name),
        )
        for name in names
    ]
    lines = [
        _line(part_label(name), name, [parts.get(name) for _, parts in measured]) for name in names
    ]
    sums = [sum(parts.values()) for _, parts in measured]
    every = [median("time/step_ms")(run) for run, _ in measured]
    lines.append(_line("sum of the parts", "a profiled step", sums))
    lines.append(_line("step", "time/step_ms, median of all steps", every))
    counts = (
        f"{len(counted)} of {all_profiled} in {run.name}"
        for run, _ in measured
        for counted, all_profiled in [profiled_rows(run)]
    )
    heads = join(fill(HEAD, name=run.name) for run, _ in measured)
    return fill(
        '<section id="breakdown"><h2>Where a step\'s time goes</h2><p>Milliseconds of rank 0, '
        "means over the middle half of the profiled steps by length ({counts}), from "
        '{file}.</p>{bars}<p class="legend">{legend}</p><details><summary>In figures, ms</summary>'
        "{table}</details></section>",
        counts=", ".join(counts),
        file=METRICS_FILE,
        bars=join(bars),
        legend=join(legend),
        table=fill(TABLE, style="", corner="part", heads=heads, body=join(lines)),
    )


def _line(label: str, source: str, values: Sequence[float | None]) -> Html:
    """A line of the table of parts."""
    name = fill("{label}<small>{source}</small>", label=label, source=source)
    dash = Html("&ndash;")
    shown = (dash if value is None else f"{value:,.2f}" for value in values)
    return fill(LINE, name=name, cells=join(fill(CELL, value=value) for value in shown))


def part_label(name: str) -> str:
    """`time/up_projection_ms` as `up projection`."""
    return name.removeprefix("time/").removesuffix("_ms").replace("_", " ")


def routing(runs: Sequence[Run]) -> Html:
    """The last heat map of each run's expert load; empty without any."""
    maps = [(run, found) for run in runs if (found := expert_load(run))]
    if not maps:
        return NOTHING
    figures = []
    for run, (step, load) in maps:
        rows = [
            fill(
                '<div class="experts"><span>{layer}</span>{experts}</div>',
                layer=layer,
                experts=join(
                    fill(
                        '<i style="--load:{shade};--side:var(--{side})" '
                        'title="layer {layer}, expert {expert}: {value:.2f} times the mean"></i>',
                        shade=_shade(value),
                        side="more" if value > 1 else "less",
                        layer=layer,
                        expert=expert,
                        value=value,
                    )
                    for expert, value in enumerate(values)
                ),
            )
            for layer, values in enumerate(load)
        ]
        figure = fill(
            '<figure class="heat"><figcaption>{dot}{run}, step {step}: '
            "busiest expert {most:.2f} times the mean</figcaption>"
            '<div role="img" aria-label="Expert load of {run}">{rows}</div></figure>',
            dot=dot(run),
            run=run.name,
            step=step,
            most=max(max(values) for values in load),
            rows=join(rows),
        )
        figures.append(figure)
    return fill(
        '<section id="routing"><h2>Expert load</h2><p>A row per layer, a column per expert: the '
        "tokens that it got over the mean of its layer. "
        '<i class="swatch" style="background:var(--less)"></i>fewer '
        '<i class="swatch" style="background:var(--more)"></i>more, in full colour at none and '
        "at twice the mean. From {file}.</p>"
        '<div class="heats">{figures}</div></section>',
        file=ROUTING_FILE,
        figures=join(figures),
    )


def _shade(load: float) -> str:
    """How strong the colour is: 0 at the mean, 100 % at none and at twice the mean."""
    return f"{min(abs(load - 1), 1) * 100:.0f}%"
