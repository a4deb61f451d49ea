"""What is fitted comes from the rows that say so, and all others are within bounds."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from scripts.plan import fit, rows
from scripts.plan.rates import RESULTS, measured
from train.planning.memory import FIT

WRITTEN: dict[str, Any] = json.loads(FIT.read_text())


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy that may be changed."""
    folder = tmp_path / "results"
    folder.mkdir()
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, folder)
    return folder


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_file_is_of_these_results():
    """`python -m scripts.plan.fit` makes it again."""
    again = fit.result()
    assert again["rows"] == WRITTEN["rows"]
    for of in ("memory", "time", "bounds"):
        assert again[of] == pytest.approx(WRITTEN[of])


@pytest.mark.parametrize(("unit", "bound"), [("gib", 0.05), ("ms", 0.15)])
def test_each_checked_row_is_within_its_bound(unit, bound):
    """From the two figures of a row, whatever the file says of the error."""
    found = [row for row in WRITTEN["rows"] if f"measured_{unit}" in row]
    checked = [row for row in found if row[f"role_{unit}"] == "checked"]
    assert len(checked) >= 2 * (len(found) - len(checked)), "most rows are checked"
    for row in found:
        error = row[f"planned_{unit}"] / row[f"measured_{unit}"] - 1
        assert error == pytest.approx(row[f"error_{unit}"], abs=1e-3)
    worst = max(checked, key=lambda row: abs(row[f"planned_{unit}"] / row[f"measured_{unit}"] - 1))
    error = worst[f"planned_{unit}"] / worst[f"measured_{unit}"] - 1
    assert abs(error) <= bound, f"{worst['planned']}: {error:+.1%}"


def test_what_was_measured_is_what_the_files_say():
    said = {row["planned"]: row for row in WRITTEN["rows"]}
    source = json.loads((RESULTS / "train_qwen3_30b_a3b_8l.json").read_text())
    wanted = {"path": "fp8_direct", "flags": ["prepare"], "routing": "balanced", "micro_batch": 8}
    for part, gpus, kind in (("rows", 2, "H100"), ("rows", 4, "H100"), ("screening", 2, "H200")):
        row = next(row for row in source[part] if {**row, **wanted, "gpus": gpus} == row)
        found = said[f"qwen3_30b_a3b_8l `fp8_direct`, prepare, micro-batch 8, {gpus} {kind}s"]
        assert found["measured_gib"] == round(row["peak_allocated_gib"]["max"], 3)
        assert found["measured_ms"] == round(row["step_ms"]["median"], 3)


def test_a_screened_row_counts_until_it_is_repeated(results):
    path = results / rows.FITTED_FILE
    before = rows.measured(results)

    def repeat(content: Any) -> None:
        screened = next(row for row in content["screening"] if row["stack"] == "ours")
        content["rows"].append({**screened, "step_ms": {"median": 1.0}})

    edit(path, repeat)
    after = rows.measured(results)
    assert sorted(row.name for row in after) == sorted(row.name for row in before)
    assert 1.0 in [row.step_ms for row in after]


def test_a_row_says_over_how_many_gpus_the_experts_are(results):
    def on_four() -> set[tuple[int, int]]:
        """Ranks that share the experts, and ranks, of all rows of four GPUs."""
        shapes = [row.shape for row in rows.measured(results) if "4 H100s" in row.name]
        return {(shape.expert_ranks, shape.ranks) for shape in shapes}

    assert on_four() == {(4, 4)}

    def forget(content: Any) -> None:
        for row in content["rows"]:
            row.pop("expert_parallel", None)

    edit(results / rows.FITTED_FILE, forget)
    assert on_four() == {(2, 4)}, "then it is the config's"


def test_checked_rows_change_no_plan(results):
    before = fit.result(results)

    def double(content: Any) -> None:
        for row in content["screening"] + content["rows"]:
            fitted = (row["path"], tuple(row["flags"]), row["micro_batch"])
            is_fitted = fitted in {*rows.FITTED_TIME, *rows.FITTED_MEMORY}
            if "error" not in row and not (is_fitted and row["sitting"] == rows.FITTED_SITTING):
                for figure in (row["step_ms"], row["peak_allocated_gib"]):
                    figure |= {key: 2 * value for key, value in figure.items()}

    edit(results / rows.FITTED_FILE, double)
    edit(results / "pairs.json", lambda found: found["rows"][0].update(step_ms=[999.0, 999.0]))
    edit(results / "moe_small.json", lambda found: found["rows"][4].update({"ms/step": "999"}))
    after = fit.result(results)
    assert (after["memory"], after["time"]) == (before["memory"], before["time"])
    assert fit.beyond(after), "and what is off now is said"


def test_fitted_rows_do(results):
    before = fit.result(results)

    def slower(content: Any) -> None:
        for row in content["screening"]:
            if row["path"] == "bf16" and row["stack"] == "ours":
                row["step_ms"]["median"] *= 1.1
                row["peak_allocated_gib"]["max"] += 1

    edit(results / rows.FITTED_FILE, slower)
    after = fit.result(results)
    assert after["memory"]["overhead_gib"] == pytest.approx(before["memory"]["overhead_gib"] + 0.5)
    assert after["time"]["passes"] > 1.2 * before["time"]["passes"]
    assert after["time"]["stock_share"] > before["time"]["stock_share"], "less is left for them"


def test_a_row_out_of_bounds_ends_the_command(results, tmp_path, capsys):
    out = tmp_path / "fit.json"
    command = ["--results", str(results), "--out", str(out)]
    assert fit.main(command) == 0

    def faster(content: Any) -> None:
        content["rows"][0]["step_ms"][0] = 50.0

    edit(results / "pairs.json", faster)
    assert fit.main(command) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "pairs `fp8_baseline`, hidden 2048, 4 layer(s), 1 GPU: measured 50.0 ms" in err
    assert fit.main([*command[:2], "--out", str(results)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --out {results} cannot be written: ")
    (results / "pairs.json").write_text("no JSON")
    assert fit.main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("path", ["bf16", "fp8_compact"])
def test_fitted_rows_that_are_gone_are_named(results, tmp_path, capsys, path):
    def drop(content: Any) -> None:
        content["screening"] = [row for row in content["screening"] if row["path"] != path]

    edit(results / rows.FITTED_FILE, drop)
    assert fit.main(["--results", str(results), "--out", str(tmp_path / "fit.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{rows.FITTED_FILE} has not all rows of the sitting {rows.FITTED_SITTING}" in line


def test_rows_that_are_no_plans_are_left_out(results):
    def add(content: Any) -> None:
        model = next(row for row in content["screening"] if row["stack"] == "ours")
        for change in (
            {"flags": ["per_expert"]},
            {"operations": "triton"},
            {"path": "fp8_of_tomorrow"},
        ):
            content["screening"].append({**model, **change})
        content["screening"].append({"stack": "ours", "path": "bf16", "error": "out of memory"})
        repeated = {**model, "routing": "natural", "gpus": 2, "redone_steps": 1}
        content["screening"].append(repeated)

    before = [row.name for row in rows.measured(results)]
    edit(results / rows.FITTED_FILE, add)
    after = rows.measured(results)
    (new,) = [row for row in after if row.name not in before]
    assert new.name.endswith(", natural routing")
    assert not new.shape.moe.force_balance
    assert not new.fits_time
    assert not new.fits_memory
    found = {row["planned"]: row for row in fit.result(results)["rows"]}
    assert found[new.name]["role_gib"] == "assumed"
    natural = [row for name, row in found.items() if "natural" in name]
    assert {row["role_ms"] for row in natural if "role_ms" in row} == {"assumed"}
    assert new.step_ms is None, "nobody plans how often a step is repeated"


def test_rates_are_those_of_the_files(results):
    """For complete kernels the counted work is right."""
    found = measured(results)
    kernels = json.loads((RESULTS / "kernels.json").read_text())["rows"]
    grouped = [row["tflops"] for row in kernels if row["kernel"] == "grouped_mm"]
    assert found.bf16 / 1e12 == pytest.approx(sum(grouped) / len(grouped), rel=0.1)
    wgrad = [r["tflops"] for r in kernels if r["kernel"] == "grouped_mm_wgrad to torch.float32"]
    assert found.bf16_wgrad / 1e12 == pytest.approx(sum(wgrad) / len(wgrad), rel=0.1)
    dense = [row["tflops"] for row in kernels if row["kernel"] == "dense bf16"]
    assert found.dense / 1e12 == pytest.approx(sum(dense) / len(dense), rel=0.1)
