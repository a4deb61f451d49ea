"""More of the comparison's page: a step's parts as stacked bars, the experts' load as heat maps."""

from collections.abc import Sequence

from scripts.compare.page.sections import dot, text
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


def breakdown(runs: Sequence[Run]) -> str:
    """Profiled steps as stacked bars on one scale, and as a table; empty without any."""
    measured = [(run, parts) for run in runs if (parts := step_parts(run))]
    if not measured:
        return ""
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
        segments = "".join(
            f'<i style="width:{parts[name] / longest * 100:.3f}%;background:{colours[name]}" '
            f'title="{text(part_label(name))}: {parts[name]:.3g} ms"></i>'
            for name in names
            if parts.get(name)
        )
        total = sum(parts.values())
        bars.append(
            f'<div class="bar"><span>{dot(run)}{text(run.name)}</span>'
            f'<div class="stack" role="img" aria-label="{text(run.name)}: {total:.1f} ms">'
            f"{segments}</div><b>{total:,.1f} ms</b></div>"
        )
    legend = "".join(
        f'<span><i class="swatch" style="background:{colours[name]}"></i>'
        f"{text(part_label(name))}</span>"
        for name in names
    )
    heads = "".join(f'<th scope="col">{text(run.name)}</th>' for run, _ in measured)
    lines = "".join(
        f'<tr><th scope="row">{text(part_label(name))}<small>{text(name)}</small></th>'
        + "".join(
            f"<td>{parts[name]:,.2f}</td>" if name in parts else "<td>&ndash;</td>"
            for _, parts in measured
        )
        + "</tr>"
        for name in names
    )
    sums = [sum(parts.values()) for _, parts in measured]
    every = [median("time/step_ms")(run) for run, _ in measured]
    for label, source, values in (
        ("sum of the parts", "a profiled step", sums),
        ("step", "time/step_ms, median of all steps", every),
    ):
        cells = "".join(
            f"<td>{value:,.2f}</td>" if value is not None else "<td>&ndash;</td>"
            for value in values
        )
        lines += f'<tr><th scope="row">{label}<small>{source}</small></th>{cells}</tr>'
    counts = (
        f"{len(counted)} of {all_profiled} in {run.name}"
        for run, _ in measured
        for counted, all_profiled in [profiled_rows(run)]
    )
    return (
        f'<section id="breakdown"><h2>Where a step\'s time goes</h2><p>Milliseconds of rank 0, '
        f"means over the middle half of the profiled steps by length "
        f"({text(', '.join(counts))}), from "
        f"{METRICS_FILE}.</p>{''.join(bars)}"
        f'<p class="legend">{legend}</p><details><summary>In figures, ms</summary>'
        f'<div class="scroll"><table><thead><tr><th scope="col">part</th>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div></details></section>"
    )


def part_label(name: str) -> str:
    """`time/up_projection_ms` as `up projection`."""
    return name.removeprefix("time/").removesuffix("_ms").replace("_", " ")


def routing(runs: Sequence[Run]) -> str:
    """The last heat map of each run's expert load; empty without any."""
    maps = [(run, found) for run in runs if (found := expert_load(run))]
    if not maps:
        return ""
    figures = []
    for run, (step, load) in maps:
        rows = "".join(
            f'<div class="experts"><span>{layer}</span>'
            + "".join(
                f'<i style="--load:{_shade(value)};--side:var(--{"more" if value > 1 else "less"})"'
                f' title="layer {layer}, expert {expert}: {value:.2f} of the mean"></i>'
                for expert, value in enumerate(values)
            )
            + "</div>"
            for layer, values in enumerate(load)
        )
        most = max(max(values) for values in load)
        figures.append(
            f'<figure class="heat"><figcaption>{dot(run)}{text(run.name)}, step {step}: '
            f"busiest expert {most:.2f} of the mean</figcaption>"
            f'<div role="img" aria-label="Expert load of {text(run.name)}">{rows}</div></figure>'
        )
    return (
        '<section id="routing"><h2>Expert load</h2><p>A row per layer, a column per expert: the '
        "tokens that it got over the mean of its layer. "
        '<i class="swatch" style="background:var(--less)"></i>fewer '
        '<i class="swatch" style="background:var(--more)"></i>more, in full colour at none and '
        f"at twice the mean. From {ROUTING_FILE}.</p>"
        f'<div class="heats">{"".join(figures)}</div></section>'
    )


def _shade(load: float) -> str:
    """How strong the colour is: 0 at the mean, 100 % at none and at twice the mean."""
    return f"{min(abs(load - 1), 1) * 100:.0f}%"
