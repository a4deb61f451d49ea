"""A comparison in words, and its caveats."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from scripts.compare.arms import Arm
from scripts.compare.noise import CONFIDENCE, FEWEST, Ratio, mean_interval, mean_interval_of_runs
from scripts.compare.runs import (
    EQUAL_BY_DESIGN,
    Run,
    common_losses,
    config_differences,
    environment_differences,
    loss_gap,
    median,
    step_parts,
    tail,
)
from train.config import same_training

PERCENT = f"{CONFIDENCE:.0%}".replace("%", " %")

MANY = 3
"""Most runs that are named one by one where they agree."""


@dataclass(frozen=True)
class Verdict:
    """One side's speed against the baseline's."""

    arm: Arm
    ratio: Ratio
    short: str
    """Two or three words."""
    text: str
    """One sentence."""


def speed_verdicts(arms: Sequence[Arm], baseline: Arm) -> list[Verdict]:
    """A verdict for each side but the baseline; none for sides without a measured speed."""
    found = []
    for arm in arms:
        ratio = None if arm is baseline else arm.speed_ratio(baseline)
        if ratio:
            found.append(Verdict(arm, ratio, *_words(arm.name, baseline.name, ratio)))
    return found


def _words(name: str, base: str, ratio: Ratio) -> tuple[str, str]:
    change = f"{abs(ratio.value - 1):.1%}".replace("%", " %")
    span = f"{PERCENT} interval {ratio.low:.3f} to {ratio.high:.3f}"
    if ratio.verdict == "unknown":
        return "too few measurements", (
            f"{name} ran at {ratio.value:.3f} of {base}'s speed, but {ratio.intervals} logging "
            f"intervals are too few to tell that from noise; {FEWEST} are needed."
        )
    if ratio.verdict == "noise":
        return "inside the noise", (
            f"{name} and {base} cannot be told apart by speed: the difference of {change} is "
            f"inside the noise (ratio {ratio.value:.3f}, {span}, which holds 1)."
        )
    word = "faster" if ratio.verdict == "higher" else "slower"
    more = "more" if word == "faster" else "fewer"
    return word, (
        f"{name} was {word} than {base}: {change} {more} tokens/s, outside the noise "
        f"(ratio {ratio.value:.3f}, {span})."
    )


def on_cpu(runs: Sequence[Run]) -> bool:
    return any(run.device == "cpu" for run in runs)


def warnings(runs: Sequence[Run]) -> list[str]:
    """What makes this comparison unfair; a sentence each."""
    found = []
    if note := _other_functions(runs):
        found.append(note)
    for what, values in environment_differences(runs):
        if what == "machine":
            found.append(
                "The runs were made on different machines, so their speeds and memory cannot be "
                f"compared: {_each(runs, values)}."
            )
        else:
            found.append(f"The runs were made with different code: {what} {_each(runs, values)}.")
    for run in runs:
        for step, changed in run.changes:
            keys = (f"{key} from {before} to {now}" for key, (before, now) in changed.items())
            shown = f"; all its steps are shown as {run.path}" if "moe.path" in changed else ""
            found.append(f"{run.name} changed at step {step}: {', '.join(keys)}{shown}.")
    for key, values in config_differences(runs):
        if key.startswith(EQUAL_BY_DESIGN) or (key == "train.seed" and _seeds_are_equal(runs)):
            continue
        same = ", which train to the same bits" if _train_alike(key, values) else ""
        found.append(
            f"The runs differ in more than the path: {key} is {_each(runs, values)}{same}."
        )
    steps = [run.rows[-1]["progress/step"] for run in runs]
    if len(set(steps)) > 1:
        found.append(
            f"The runs have come to different steps: {_each(runs, steps)}. Gaps are taken at the "
            "steps that both runs have."
        )
    return found


def _train_alike(key: str, values: Sequence[str]) -> bool:
    """Whether values of a key, as they are shown, train to the same bits."""
    section, _, name = key.partition(".")
    return set(values) <= {str(value) for value in same_training(section, name)}


def _other_functions(runs: Sequence[Run]) -> str | None:
    """Which runs dropped rows that others computed with: not every path applies a capacity."""
    most = {run.name: max(run.finite("moe/dropped_rows"), default=0) for run in runs}
    dropped = [
        f"{run.name} ({run.path}) dropped up to {most[run.name]:,.0f} rows a step"
        for run in runs
        if most[run.name]
    ]
    if not dropped or len(runs) == 1:
        return None
    none = [f"{run.name} ({run.path})" for run in runs if not most[run.name]]
    others = f", {', '.join(none)} none" if none else ""
    capacity = dict.fromkeys(f"{run.config.moe.capacity}" for run in runs)
    return (
        f"The runs computed different functions: with moe.capacity={' and '.join(capacity)} "
        f"{', '.join(dropped)}{others}. A number is another function than auto or null, and only "
        "in paths that apply it: those that launch one GEMM an expert do not, nor any on a CPU. "
        "Their losses and speeds are not of the same work; leave moe.capacity out, or raise it "
        "until nothing is dropped."
    )


def _seeds_are_equal(runs: Sequence[Run]) -> bool:
    """Whether each path was run with the same seeds, as repeats should be."""
    seeds: dict[str, list[int]] = {}
    for run in runs:
        seeds.setdefault(run.path, []).append(run.config.train.seed)
    return len({tuple(sorted(own)) for own in seeds.values()}) == 1


def _each(runs: Sequence[Run], values: Sequence[object]) -> str:
    """Each value with its runs in brackets; those of the most common one, if many, are counted."""
    names: dict[str, list[str]] = {}
    for value, run in zip(values, runs, strict=True):
        names.setdefault(str(value), []).append(run.name)
    most = max(names, key=lambda value: len(names[value]))
    if len(names) > 1 and len(names[most]) > MANY:
        names[most] = [f"the {len(names.pop(most))} others"]
    return ", ".join(f"{value} ({', '.join(found)})" for value, found in names.items())


def partner(run: Run, baseline: Arm) -> Run:
    """The baseline's run that saw the same data: that of the same seed, or else its first."""
    same = (one for one in baseline.runs if one.config.train.seed == run.config.train.seed)
    return next(same, baseline.runs[0])


def reading(runs: Sequence[Run], arms: Sequence[Arm], baseline: Arm) -> list[str]:
    """What the figures say, a sentence each: speed first, and of a CPU's only what it is worth,
    last."""
    said = []
    if not on_cpu(runs):
        verdicts = speed_verdicts(arms, baseline)
        said += [verdict.text for verdict in verdicts]
        if verdicts and min(verdict.ratio.repeats for verdict in verdicts) == 1:
            said.append(
                "Not every path was run more than once. The noise of a single run is that between "
                "its logging intervals; how much two runs of one path differ is not in it. Repeat "
                "the runs, in turn on the same machine, to know."
            )
    others = [arm for arm in arms if arm is not baseline]
    said += [_gap(arm, baseline) for arm in others]
    unsure = [f"{arm.name} {gap:+.3f} %" for arm in others if (gap := _unsure_gap(arm, baseline))]
    if unsure:
        said.append(
            f"The final training losses differ from that of {baseline.name}, on too few logged "
            f"steps to tell it from noise: {', '.join(unsure)}."
        )
    for one, other in itertools.combinations(runs, 2):
        pairs = common_losses(one, other)
        if len(pairs) > 1 and all(ours == theirs for _, ours, theirs in pairs):
            said.append(
                f"{one.name} and {other.name} have the same training loss, to the last bit, at all "
                f"{len(pairs)} steps that both have logged."
            )
    counted = [
        f"{arm.name} {forward:g} and {median('moe/scale_relayouts_backward')(arm.runs[0]) or 0:g}"
        for arm in arms
        if (forward := median("moe/scale_relayouts")(arm.runs[0])) is not None
    ]
    if counted:
        said.append(f"Scale relayouts per layer, forward and backward: {', '.join(counted)}.")
    if on_cpu(runs):
        said.append(
            "Speed on a CPU, where FP8 is emulated, says nothing about speed on a GPU; losses and "
            "relayout counts hold on any device."
        )
    elif shares := [share for arm in arms if (share := _relayout_time(arm))]:
        said.append(f"Time that relayouts took of a profiled step: {', '.join(shares)}.")
    return [sentence for sentence in said if sentence]


def _relayout_time(arm: Arm) -> str:
    """How much of its profiled steps a side spent on relayouts; empty without profiled steps."""
    steps = [parts for run in arm.runs if (parts := step_parts(run))]
    if not steps:
        return ""
    spent = fmean(parts.get("time/relayout_ms", 0.0) for parts in steps)
    whole = fmean(sum(parts.values()) for parts in steps)
    return f"{arm.name} {spent:.3g} of {whole:.1f} ms ({spent / whole * 100:.2f} %)"


def _gap(arm: Arm, baseline: Arm) -> str:
    """The loss of a side against the baseline's: of one run by its steps, of several by the
    runs."""
    found = [loss_gap(run, partner(run, baseline)) for run in arm.runs]
    gaps = [gap for gap in found if gap is not None]
    if not gaps:
        return ""
    if not all(map(math.isfinite, gaps)):
        return f"{arm.name} has no gap to {baseline.name}: a loss was not finite."
    if len(gaps) > 1:
        mean = sum(gaps) / len(gaps)
        low, high = mean_interval_of_runs(gaps)
        return (
            f"The {len(gaps)} runs of {arm.name} {_had(arm, baseline)} training losses "
            f"{_beside(mean)} those of {baseline.name} on average, {_inside(low, high)} the noise "
            "between runs "
            f"({PERCENT} interval {low:+.3f} % to {high:+.3f} %)."
        )
    last = _last_gaps(arm, baseline)
    if len(last) < FEWEST:
        return ""  # told together
    (gap,) = gaps
    had = f"{arm.name} {_had(arm, baseline)} a training loss"
    if not gap:
        return f"{had} equal to that of {baseline.name}."
    low, high = mean_interval(last)
    return (
        f"{had} {_beside(gap)} that of {baseline.name}, "
        f"{_inside(low, high)} the noise of its last {len(last)} logged steps "
        f"({PERCENT} interval {low:+.3f} % to {high:+.3f} %)."
    )


def _had(arm: Arm, baseline: Arm) -> str:
    """Up to where losses were compared: the end, unless one run came further than the other."""
    pairs = [(run, partner(run, baseline)) for run in arm.runs]
    last = min(common[-1][0] for pair in pairs if (common := common_losses(*pair)))
    if all(run.rows[-1]["progress/step"] == last for pair in pairs for run in pair):
        return "ended with"
    return f"had, up to step {last:g}, the last that both logged,"


def _beside(gap: float) -> str:
    return f"{abs(gap):.3f} % {'above' if gap > 0 else 'below'}"


def _inside(low: float, high: float) -> str:
    return "inside" if low <= 0 <= high else "outside"


def _unsure_gap(arm: Arm, baseline: Arm) -> float | None:
    """The gap of a side of one run whose end has too few steps to judge noise."""
    gap = loss_gap(arm.runs[0], partner(arm.runs[0], baseline))
    few = len(arm.runs) == 1 and len(_last_gaps(arm, baseline)) < FEWEST
    return gap if few and gap and math.isfinite(gap) else None


def _last_gaps(arm: Arm, baseline: Arm) -> Sequence[float]:
    """Step by step, in percent, over the steps that the final loss is the mean of."""
    pairs = tail(common_losses(arm.runs[0], partner(arm.runs[0], baseline)))
    return [(ours - theirs) / theirs * 100 for _, ours, theirs in pairs]
