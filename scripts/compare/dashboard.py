"""Build the W&B workspace and report of an experiment group, as code.

    python -m scripts.compare.dashboard GROUP [--entity ME] [--project P] [--baseline RUN]
        [--runs DIR]

With an API key it saves both and prints their links. Without one it writes what it would save to a
file, and sends nothing. Panels of metrics that no run of the group in `--runs` has logged are left
out; without such a run all panels are made.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.reports.v2.interface import BlockTypes

from scripts import terminal
from scripts.bench.results import write_json
from scripts.compare.dashboard_panels import GAP_CHART, Panel, gap_panel, make_sections
from scripts.compare.runs import InputError, Run, choose_baseline, find_group
from train.config import TrackingConfig
from train.metrics.tracking import ID_FILE, resolve_mode

CHART_NAME = "loss-gap-to-baseline"
MEDIA = {"moe/expert_load"}
"""Logged to W&B alone; `metrics.jsonl` has numbers only."""


@dataclass(frozen=True)
class Group:
    """Which runs a dashboard shows. `entity` is empty offline, where it is not known."""

    name: str
    project: str
    entity: str = ""
    baseline: str = "bf16"
    """Name of the run that gaps refer to."""
    baseline_id: str | None = None
    logged: frozenset[str] | None = None
    """Names of the metrics that its runs have logged; None if unknown."""


def describe_group(
    name: str, runs: Sequence[Run], project: str | None = None, baseline: str | None = None
) -> Group:
    """A group from the folders of its runs; `runs` may be empty.

    Raises InputError if there are runs and `baseline` is none of them.
    """
    if not runs:
        project = project or TrackingConfig().project
        return Group(name, project, baseline=baseline or "bf16")
    chosen = choose_baseline(runs, baseline)
    baseline_id = None
    with contextlib.suppress(OSError):
        baseline_id = (chosen.folder / ID_FILE).read_text().strip()
    numbers = {metric for run in runs for row in run.rows for metric in row}
    medians = {f"{metric}_median" for metric in numbers if metric.startswith("throughput/")}
    media = MEDIA if any((run.folder / "routing.jsonl").exists() for run in runs) else set()
    return Group(
        name,
        project or runs[0].config.tracking.project,
        baseline=chosen.name,
        baseline_id=baseline_id,
        logged=frozenset(numbers | medians | media),
    )


def make_workspace(group: Group) -> ws.Workspace:
    """The workspace: a section per question, of the group's runs."""
    sections = [
        ws.Section(name=name, panels=[*panels], is_open=True)
        for name, panels in _sections(group).items()
    ]
    compare = ws.Section(name="What differs", panels=[wr.RunComparer(diff_only="split")])
    return ws.Workspace(
        entity=group.entity,
        project=group.project,
        name=f"{group.name}: paths compared",
        sections=[*sections, compare],
        settings=ws.WorkspaceSettings(x_axis="progress/step", tooltip_number_of_runs="all_runs"),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group") == group.name],
            # The table of what differs, beside the panels.
            pinned_columns=["run:jobType", "summary:throughput/tokens_per_sec_per_gpu_median"],
            baseline_run=group.baseline_id,
        ),
    )


def make_report(group: Group) -> wr.Report:
    """The report: the same panels, with the explanation that a newcomer needs."""
    blocks: list[BlockTypes] = [
        wr.P(
            "One config key, moe.path, decides how tokens get from the router to the experts' "
            "first GEMM. Model, data, seed and optimizer are the same in all runs of this group; "
            "the last table shows what is not. Losses are drawn by tokens, everything else by "
            f"steps. Gaps and ratios refer to the run {group.baseline}."
        )
    ]
    for name, panels in _sections(group).items():
        blocks += [wr.H2(name), _grid(group, panels)]
    blocks += [wr.H2("What differs"), _grid(group, [wr.RunComparer(diff_only="split")])]
    return wr.Report(
        entity=group.entity,
        project=group.project,
        title=f"{group.name}: what the layout of the scales costs",
        description="Made by scripts/compare/dashboard.py",
        blocks=blocks,
        width="fluid",
    )


def _sections(group: Group) -> dict[str, list[Panel]]:
    sections = make_sections(group.logged)
    chart = f"{group.entity}/{CHART_NAME}" if group.entity else CHART_NAME
    if "Loss by tokens" in sections:
        sections["Loss by tokens"].insert(1, gap_panel(chart, group.baseline))
    return sections


def _grid(group: Group, panels: Sequence[Panel]) -> wr.PanelGrid:
    """Two panels side by side, of the 24 columns that a report has."""
    wide = len(panels) == 1
    for index, panel in enumerate(panels):
        x, y = index % 2 * 12, index // 2 * 8
        panel.layout = wr.Layout(x=x, y=y, w=24 if wide else 12, h=8)
    runs = wr.Runset(
        entity=group.entity,
        project=group.project,
        name=group.name,
        filters=[ws.Metric("Group") == group.name],
    )
    return wr.PanelGrid(runsets=[runs], panels=[*panels])


def make_specification(group: Group) -> dict[str, Any]:
    """All that `save` would send, as W&B stores it."""
    workspace, report = make_workspace(group)._to_model(), make_report(group)._to_model()
    return {
        "group": group.name,
        "project": group.project,
        "workspace": json.loads(workspace.spec.model_dump_json(by_alias=True, exclude_none=True)),
        "report": json.loads(report.spec.model_dump_json(by_alias=True, exclude_none=True)),
        "charts": {CHART_NAME: GAP_CHART},
    }


def save(group: Group) -> tuple[str, str]:
    """Save chart, workspace and report to W&B; the links of the last two."""
    import wandb

    try:
        wandb.Api().create_custom_chart(
            entity=group.entity,
            name=CHART_NAME,
            display_name="Gap of the training loss to a baseline run",
            spec_type="vega2",
            access="private",
            spec=GAP_CHART,
        )
    except wandb.errors.Error as error:
        # Most likely it exists from an earlier call; without it one panel stays empty.
        print(f"dashboard: chart {CHART_NAME} was not made: {error}", file=sys.stderr)
    workspace, report = make_workspace(group), make_report(group)
    workspace.save()
    report.save()
    return workspace.url, report.url


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if W&B refuses, or 2 for bad input; one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.compare.dashboard",
        description="Build the W&B workspace and report of an experiment group.",
    )
    parser.add_argument("group", help="run.group of the runs; by default the config file's name")
    parser.add_argument(
        "--entity", help="W&B user or team to save to (default: the key's own); a file names none"
    )
    parser.add_argument("--project", help="W&B project (default: that of the runs)")
    parser.add_argument("--baseline", help="name of the run that gaps refer to (default: bf16's)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are")
    parser.add_argument(
        "--out",
        type=Path,
        help="write the specification here, and send nothing (without a key: dashboard.json)",
    )
    options = parser.parse_args(arguments)
    try:
        runs = find_group(options.runs, options.group)
        group = describe_group(options.group, runs, options.project, options.baseline)
    except (InputError, OSError) as error:  # the latter of a folder of somebody else
        print(f"dashboard: {error}", file=sys.stderr)
        return 2
    if not runs:
        print(f"no run of {group.name} in {options.runs}: panels for all that a run can log")
    if options.out or resolve_mode("auto") != "online":
        out = options.out or Path("dashboard.json")
        try:
            write_json(out, make_specification(group))
        except OSError as error:
            print(f"dashboard: --out {out} cannot be written: {error.strerror}", file=sys.stderr)
            return 2
        why = "--out is given" if options.out else "no API key, or W&B is offline"
        print(f"{out}: workspace and report of {group.name}; not sent to W&B ({why})")
        return 0
    import wandb

    try:
        entity = options.entity or wandb.Api().default_entity
        if not entity:
            raise ValueError("this key has no default entity; name one with --entity")
        for link in save(replace(group, entity=entity)):
            print(link)
    except Exception as error:  # W&B raises its own, requests' and GraphQL's
        print(f"dashboard: W&B: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    terminal.run(main)
