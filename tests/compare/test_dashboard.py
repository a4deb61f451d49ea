"""The W&B dashboard, panel by panel, against what a real run logged; and its own chart, drawn."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vl_convert

from scripts.compare import dashboard
from scripts.compare.dashboard_panels import GAP_CHART, STEP_PARTS
from tests.support.made_up_runs import write_run
from tests.support.ranks import run_train
from tests.train.test_tracking import read_offline_run

NOT_LOGGED = {
    "throughput/mfu",
    "memory/peak_allocated_gib",
    "memory/peak_reserved_gib",
    "moe/room",
    "moe/redone_steps",
    "moe/waited_steps",
    "moe/expert_bias_max",
    *STEP_PARTS,
}
"""What a run on a CPU, without `train.profile` and `moe.expert_bias`, does not log."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one real run of the demo's config, eight steps long, recorded offline."""
    folder = tmp_path_factory.mktemp("runs")
    argv = [
        *("configs/demo_cpu.yaml", f"run.dir={folder}", "run.name=bf16", "train.steps=8"),
        *("train.log_every=2", "train.valid_every=4", "tracking.pictures_every=4"),
        *("tracking.mode=offline", "model.seq_len=32", "data.workers=0"),
    ]
    assert run_train(2, argv) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def logged(runs: Path) -> set[str]:
    """Every name that the run sent to W&B, in its history or its summary."""
    names = set()
    for record in read_offline_run(runs / "bf16"):
        for items in (record.history.item, record.summary.update):
            names |= {item.key or item.nested_key[0] for item in items}  # a picture is nested
    return names


def specification(runs: Path, out: Path, *more: str) -> dict[str, Any]:
    arguments = ["demo_cpu", "--runs", str(runs), "--out", str(out), *more]
    assert dashboard.main(arguments) == 0
    return json.loads(out.read_text())


def panels(tree: Any) -> Iterator[dict[str, Any]]:
    """Every panel of a workspace or a report, wherever it stands."""
    if isinstance(tree, dict):
        if "viewType" in tree:
            yield tree
        for value in tree.values():
            yield from panels(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from panels(value)


def metrics_of(panel: dict[str, Any]) -> set[str]:
    """The names of what a panel draws, its x axis included."""
    config = panel["config"]
    found = {*config.get("metrics", []), *config.get("mediaKeys", [])}
    if config.get("xAxis"):
        found.add(config["xAxis"])
    for field in config.get("userQuery", {}).get("queryFields", []):
        for part in field["fields"]:
            for argument in part.get("args", []):
                found |= set(argument["value"])
    return found


def test_every_panel_draws_what_the_run_logged(
    runs: Path, logged: set[str], tmp_path: Path
) -> None:
    spec = specification(runs, tmp_path / "d.json")
    for part in ("workspace", "report"):
        drawn = [panel for panel in panels(spec[part]) if panel["viewType"] != "Run Comparer"]
        for panel in drawn:
            assert metrics_of(panel), panel
            assert metrics_of(panel) <= logged, panel
        # Not one that the issue of this dashboard names is missing.
        assert {m for panel in drawn for m in metrics_of(panel)} >= {
            *("loss/train", "loss/valid", "progress/tokens", "memory/peak_rss_gib"),
            *("throughput/tokens_per_sec_per_gpu", "throughput/tflops_per_gpu"),
            *("moe/scale_relayouts", "moe/scale_relayouts_backward", "moe/expert_load"),
            *("moe/max_expert_load", "moe/router_entropy", "moe/dropped_rows"),
        }
        assert any(panel["viewType"] == "Run Comparer" for panel in panels(spec[part]))


def test_panels_of_a_group_that_is_not_here(
    logged: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = specification(tmp_path, tmp_path / "d.json")
    drawn = {m for panel in panels(spec["workspace"]) for m in metrics_of(panel)}
    assert drawn - logged == NOT_LOGGED
    assert "no run of demo_cpu" in capsys.readouterr().out


def test_only_the_group_is_shown_and_its_baseline_is_known(runs: Path, tmp_path: Path) -> None:
    spec = specification(runs, tmp_path / "d.json")
    filters = re.findall(r'"filters": (\[[^]]*\])', json.dumps(spec))
    assert filters
    for found in filters:
        (only,) = json.loads(found)
        assert (only["key"], only["op"], only["value"]) == (
            {"section": "run", "name": "group"},
            "=",
            "demo_cpu",
        )
    assert (runs / "bf16" / "wandb_id").read_text() in dashboard_ids(spec)
    assert spec["project"] == "moe-compact-fp8"


def dashboard_ids(spec: dict[str, Any]) -> str:
    """The id of the pinned baseline run, out of W&B's encoding of it."""
    import base64

    (run_set,) = spec["workspace"]["section"]["runSets"]
    return base64.b64decode(run_set["baselineRunId"]).decode()


def test_gap_chart_joins_runs_by_tokens() -> None:
    """Drawn for real, with W&B's substitutions made and a mark whose every datum can be read."""
    text = json.dumps(GAP_CHART).replace("${string:baseline}", "a")
    for field, name in (("loss", "loss/train"), ("tokens", "progress/tokens"), ("run", "name")):
        text = text.replace("${field:" + field + "}", name)
    assert "${" not in text
    spec = json.loads(text)
    spec["mark"] = "point"
    losses = {"a": {10: 4.0, 20: 2.0, 30: 1.0}, "b": {10: 4.04, 20: 1.99, 40: 9.0}}
    spec["data"] = {
        "values": [
            {"name": run, "progress/tokens": tokens, "loss/train": loss}
            for run, curve in losses.items()
            for tokens, loss in curve.items()
        ]
    }
    svg = vl_convert.vegalite_to_svg(spec)
    labels = re.findall(r'aria-label="tokens: (\d+); gap, %: ([^;]+); run: (\w)"', svg)
    found = {
        (run, int(tokens)): float(gap.replace("\N{MINUS SIGN}", "-")) for tokens, gap, run in labels
    }
    assert found == pytest.approx(
        {("a", 10): 0, ("a", 20): 0, ("a", 30): 0, ("b", 10): 1.0, ("b", 20): -0.5}
    )


def test_unknown_baseline_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "d.json"
    status = dashboard.main(["demo_cpu", "--runs", str(runs), "--baseline", "x", "--out", str(out)])
    assert status == 2
    assert capsys.readouterr().err == "dashboard: --baseline x is none of the runs: bf16\n"
    assert not out.exists()


def test_a_file_that_cannot_be_written_is_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dashboard.main(["demo_cpu", "--runs", str(runs), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"dashboard: --out {tmp_path} cannot be written: Is a directory\n"


def test_with_a_key_both_links_are_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", "bf16", config={"run": {"group": "g"}})
    saved: list[dashboard.Group] = []

    def save(group: dashboard.Group) -> tuple[str, str]:
        saved.append(group)
        return "https://example.org/workspace", "https://example.org/report"

    monkeypatch.setattr(dashboard, "resolve_mode", lambda mode: "online")
    monkeypatch.setattr(dashboard, "save", save)
    assert dashboard.main(["g", "--runs", str(tmp_path), "--entity", "me"]) == 0
    links = capsys.readouterr().out.split()
    assert links == ["https://example.org/workspace", "https://example.org/report"]
    assert (saved[0].entity, saved[0].baseline) == ("me", "a")

    def refuse(group: dashboard.Group) -> tuple[str, str]:
        raise RuntimeError("no such\nentity")

    monkeypatch.setattr(dashboard, "save", refuse)
    assert dashboard.main(["g", "--runs", str(tmp_path), "--entity", "me"]) == 1
    assert capsys.readouterr().err == "dashboard: W&B: no such entity\n"


def test_save_sends_chart_workspace_and_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against W&B's own client code, with its GraphQL calls caught where they leave."""
    import wandb
    import wandb_workspaces.reports.v2.interface as reports
    import wandb_workspaces.workspaces.internal as workspaces

    sent: list[tuple[str, dict[str, Any]]] = []

    def execute(api: Any, query: Any, variables: dict[str, Any] | None = None) -> dict[str, Any]:
        variables = variables or {}
        sent.append((str(query), variables))
        if "spec" in variables:
            view = {
                "id": "VIEW",
                "name": "nw-abc-v",
                "displayName": variables.get("displayName"),
                "description": "",
                "project": {"name": "p", "entityName": "me"},
                "spec": variables["spec"],
                "createdAt": "2026-01-01T00:00:00",
                "updatedAt": "2026-01-01T00:00:00",
            }
            return {"upsertView": {"view": view}}
        return {"project": {"internalId": "PROJECT"}}

    charts: list[str] = []
    api = SimpleNamespace(
        create_custom_chart=lambda **chart: charts.append(chart["name"]),
        projects=lambda entity: [SimpleNamespace(name="p")],
        client=SimpleNamespace(app_url="https://example.org"),
        settings={"base_url": "https://example.org"},
        default_entity="me",
    )
    monkeypatch.setattr(wandb, "Api", lambda *a, **k: api)
    monkeypatch.setattr(reports, "_get_api", lambda: api)
    for module in (reports, workspaces):
        monkeypatch.setattr(module, "execute_graphql", execute)
    monkeypatch.setattr(reports, "get_app_url", lambda api: "https://example.org")
    import wandb_workspaces.workspaces.interface as interface

    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://example.org")
    group = dashboard.Group("g", "p", entity="me")
    workspace, report = dashboard.save(group)
    assert charts == [dashboard.CHART_NAME]
    assert workspace == "https://example.org/me/p?nw=abc"
    assert report.startswith("https://example.org/me/p/reports/")
    specs = [variables["spec"] for _, variables in sent if "spec" in variables]
    assert len(specs) == 2
    for spec in specs:
        assert f"me/{dashboard.CHART_NAME}" in spec
