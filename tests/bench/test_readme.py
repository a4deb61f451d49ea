"""Tables and pictures between markers: from files of results, never out of date here."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from scripts.bench import plots, readme
from scripts.bench.measure.window import Window
from scripts.bench.stacks.spec import parse
from scripts.bench.tables.training import best_stock
from scripts.bench.train import rows as train_rows
from scripts.compare.__main__ import main as compare
from tests.support.made_up_runs import write_run
from train.config import load

TEXT = "before\n\n<!-- table: {} -->\nold\n<!-- end of table -->\n\nafter\n"
PICTURE = "<!-- picture: train_x.json -->\n<!-- end of picture -->\n"
NONE = "–"  # noqa: RUF001


def figure(median: float, spread: float = 0.0) -> dict[str, float]:
    return {"median": median, "min": median - spread, "max": median + spread}


def row(
    path: str, speed: float, stack: str = "ours", micro_batch: int = 8, sitting: str = "a"
) -> dict[str, Any]:
    return {
        "stack": stack,
        "path": path,
        "flags": [],
        "routing": "balanced",
        "sitting": sitting,
        "micro_batch": micro_batch,
        "gpus": 4,
        "dropped_rows": 0,
        "dispatch": "deep_ep",
        "repeats": 3,
        "step_ms": figure(4e6 / speed, 1.5),
        "tokens_per_sec_per_gpu": figure(speed, speed / 100),
        "tflops_per_gpu": figure(speed / 100, 1),
        "peak_allocated_gib": figure(60, 2),
    }


def write_results(
    folder: Path, rows: list[dict[str, Any]], name: str = "train_x.json", **more: Any
) -> None:
    (folder / "results").mkdir(exist_ok=True)
    result = {
        "machine": {"device": "cuda", "device_name": "NVIDIA H200", "devices": 4},
        "versions": {"torch": "2.11.0", "python": "3.12"},
        "commit": "abc",
        "config": {},
        "rows": rows,
        **more,
    }
    (folder / "results" / name).write_text(json.dumps(result))


def run(folder: Path, text: str, *arguments: str) -> tuple[int, str]:
    path = folder / "README.md"
    path.write_text(text)
    options = ["--results", str(folder / "results"), "--images", str(folder / "images")]
    status = readme.main([str(path), *arguments, *options])
    return status, path.read_text()


def table(folder: Path, marker: str) -> list[list[str]]:
    """The cells of the table that the marker gives, without the line under its head."""
    status, text = run(folder, TEXT.format(marker))
    assert status == 0
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_blocks_of_this_repository_are_up_to_date() -> None:
    assert readme.main(["--check"]) == 0


def test_training_table(tmp_path: Path) -> None:
    rows = [row("bf16", 10000), row("fp8_direct", 12500)]
    rows += [row("bf16", 9000, "megatron-core"), row("fp8", 10000, "megatron-core", micro_batch=4)]
    rows += [row("fp8", 20000, "megatron-core", sitting="b"), row("bf16", 30000, sitting="b")]
    write_results(tmp_path, rows)
    status, text = run(tmp_path, TEXT.format("train_x.json"))
    assert status == 0
    assert text.startswith("before\n\n<!-- table: train_x.json -->\n|  | micro-batch | ms a step |")
    assert text.endswith("<!-- end of table -->\n\nafter\n")
    assert "old" not in text
    assert (
        "| ours `fp8_direct` | 8 | 320.0 [318.5 to 321.5] | 125.0 [124.0 to 126.0] | "
        "12,500 [12,375 to 12,625] | 62.0 | 0 | 1.250 [1.225 to 1.275] | a |"
    ) in text
    # The best stock is the fastest one of the same sitting, at its own micro-batch.
    assert (
        "Best stock, the fastest of the peers: megatron-core `fp8` at micro-batch 4; "
        "megatron-core `fp8` at micro-batch 8."
    ) in text
    assert "In all rows: routing balanced, GPUs 4." in text
    assert "| 62.0 | 0 | 0.900 [0.882 to 0.918] | a |" in text
    assert "| 62.0 | 0 | 1.500 [1.470 to 1.530] | b |" in text
    assert (
        "4 x NVIDIA H200; torch 2.11.0; commit abc; median [least to most]; [train_x.json](res"
        in text
    )
    # A second time nothing changes, and --check agrees; an edited figure is noticed, and kept.
    assert run(tmp_path, text) == (0, text)
    assert run(tmp_path, text, "--check") == (0, text)
    edited = text.replace("12,500", "12,600")
    assert run(tmp_path, edited, "--check") == (1, edited)


def test_rows_can_be_chosen_and_the_ratio_stays(tmp_path: Path) -> None:
    rows = [row("bf16", 10000), row("bf16", 8000, micro_batch=4), row("fp8_direct", 12500)]
    write_results(tmp_path, [*rows, row("fp8", 10000, "megatron-core")])
    lines = table(tmp_path, "train_x.json | micro_batch=8 | path=bf16 | path=fp8_direct")
    assert [line[0] for line in lines[1:]] == ["ours `bf16`", "ours `fp8_direct`"]
    assert lines[2][-1].startswith("1.250")


def test_which_deep_ep_dispatched_is_said_once(tmp_path: Path) -> None:
    """Also where `moe.dispatch=auto` chose it, and no flag says so."""
    asked = row("fp8_fused", 1) | {"flags": ["v2", "prepare"], "dispatch": "deep_ep_v2"}
    chose = row("bf16", 1) | {"flags": ["prepare"], "dispatch": "deep_ep_v1"}
    alone = row("fp8_direct", 1) | {"dispatch": "all_to_all", "gpus": 1}
    peer = row("bf16", 1) | {"stack": "megatron-core", "dispatch": "deepep"}
    held_back = row("fp8", 2) | {"stack": "megatron-core", "dispatch": "alltoall"}
    write_results(tmp_path, [asked, chose, alone, peer, held_back])
    names = [line[0] for line in table(tmp_path, "train_x.json")[1:]]
    assert names[0] == "ours `fp8_fused`, prepare, DeepEP v2"
    assert names[1:3] == ["ours `bf16`, prepare, DeepEP v1", "ours `fp8_direct`"]
    assert names[3:] == ["megatron-core `bf16`", "megatron-core `fp8`, all-to-all"]
    assert best_stock([asked, held_back], asked) is None, "it is at its best by DeepEP"
    assert best_stock([asked, held_back], held_back) is held_back
    slow = row("bf16", 1) | {"dispatch": "all_to_all"}
    assert best_stock([slow, held_back], slow) is held_back, "where none has it"
    assert best_stock([asked, held_back, peer], asked) is peer


def test_what_failed_and_what_was_set_apart(tmp_path: Path) -> None:
    failed = {"stack": "ours", "path": "bf16", "micro_batch": 16, "gpus": 4}
    failed["error"] = "OutOfMemoryError: CUDA out of memory. Tried to allocate | 2 GiB"
    apart = row("fp8_baseline", 9000) | {"operations": "triton", "flags": ["recompute"]}
    later = row("fp8_compact", 9000) | {"repeats": 1, "error": "RuntimeError: a | b"}
    flagged = row("bf16", 8000, "megatron-core") | {"flags": ["experimental"]}
    del flagged["peak_allocated_gib"]
    write_results(tmp_path, [failed, apart, later, flagged])
    lines = table(tmp_path, "train_x.json")
    assert lines[1] == ["ours `bf16`", NONE, "16", "out of memory", *[NONE] * 6]
    assert lines[2][0] == "ours `fp8_baseline`, operations triton, recompute"
    assert lines[3][0] == "ours `fp8_compact`, 1 of the repeats, then RuntimeError: a / b"
    assert lines[3][-2].startswith("1.125")
    assert lines[4][0] == "megatron-core `bf16`, experimental"
    assert lines[4][-4] == NONE


def test_the_line_below_says_how_many_steps_these_rows_have(tmp_path: Path) -> None:
    """Whatever the first sitting of the file had, which is in `bench`."""
    rows = [row("bf16", 1) | {"windows": [{"single_step_ms": [1.0] * 12}] * 3}]
    rows += [row("fp8_direct", 1) | {"windows": [{"single_step_ms": [1.0] * 15}] * 3}]
    write_results(tmp_path, [*rows, row("fp8_fused", 1)], bench={"steps": 20})
    for marker, said in (("", "12 to 15"), (" | path=bf16", "12"), (" | path=fp8_fused", "20")):
        _, text = run(tmp_path, TEXT.format(f"train_x.json{marker}"))
        assert f"of 3 windows of {said} steps; [train_x.json]" in text


def test_no_ratio_without_a_stock_row(tmp_path: Path) -> None:
    write_results(tmp_path, [row("bf16", 10000), row("fp8_direct", 12500)])
    head, *lines = table(tmp_path, "train_x.json")
    assert head[-1] == "rows dropped", "a column without a figure is left out"
    assert [line[-2] for line in lines] == ["62.0", "62.0"]


@pytest.mark.parametrize(
    ("key", "name"),
    [("redone_steps", "repeated steps"), ("waited_steps", "steps that waited")],
)
def test_rare_steps_are_shown_where_there_are_any(tmp_path: Path, key: str, name: str) -> None:
    rows = [row("bf16", 1) | {key: 0}, row("fp8_direct", 1) | {key: 2}]
    write_results(tmp_path, [*rows, row("fp8_fused", 1)])
    head, *lines = table(tmp_path, "train_x.json")
    assert [line[head.index(name)] for line in lines] == ["0", "2", NONE]
    assert name not in table(tmp_path, "train_x.json | path=bf16 | path=fp8_fused")[0]


def test_what_the_benchmark_writes_can_be_rendered(tmp_path: Path) -> None:
    """The very rows of scripts/bench/train/, not only those of this test."""
    config = load("configs/demo_cpu.yaml")

    def written(stack: str, *steps_ms: float) -> dict[str, Any]:
        about = {"routing": "balanced", "gpus": 2, "sitting": "a", "micro_batch": 8}
        made: list[dict[str, Any]] = []
        found = train_rows.row_of(made, parse(stack).columns() | about | {"global_batch": 16})
        for one in steps_ms:
            window = Window(one, [one], one / 50, 6.0, 5.0, dropped_rows=3, step_joules=100.0)
            train_rows.add(found, window.figures(), config, "no known GPU")
        return {**found}

    failed = written("bf16") | {"error": "ConfigError: no"}
    ours = written("fp8_baseline:triton", 100.0, 200.0)
    write_results(tmp_path, [ours, written("stock:fp8", 300.0), failed])
    lines = table(tmp_path, "train_x.json")
    assert lines[1][0] == "ours `fp8_baseline`, operations triton"
    assert lines[1][1:3] == ["150.0 [100.0 to 200.0]", "150.0"]
    tokens = 16 * config.model.seq_len
    assert lines[1][5:8] == ["4.0", f"{100 / tokens * 1e6 / 1e3:,.1f}", "6"]
    assert lines[2][-1] == "1.000"
    assert lines[3][1] == "ConfigError: no"


def test_table_of_pairs(tmp_path: Path) -> None:
    saved = {"mean": 1.5, "plus_minus": 0.25}
    pair = {
        "pair": ["fp8_baseline", "fp8_compact"], "hidden": 2048, "tokens_per_gpu": 16384,
        "step_ms": [200.0, 198.5], "saved_ms": saved, "saved_percent": {"mean": 0.75,
        "plus_minus": 0.125}, "relayouts_a_layer": [10, 4], "peak_allocated_gib": [48.5, 48.25],
    }  # fmt: skip
    write_results(tmp_path, [pair], "pairs.json")
    assert table(tmp_path, "pairs.json")[1] == [
        "`fp8_compact` against `fp8_baseline`", "2,048", "16,384", "200.00", "1.500 ± 0.250",
        "0.75 ± 0.12", "10 → 4", "48.50 → 48.25",
    ]  # fmt: skip


def test_layer_table(tmp_path: Path) -> None:
    def layer(path: str, tflops: float, relayouts: int, **profile: int) -> dict[str, Any]:
        one = {"relayouts": {"counted": relayouts}, **profile}
        return {
            "shape": "mixtral_8x7b",
            "path": path,
            "forward_ms": figure(2, 0.1),
            "backward_ms": figure(4),
            "tflops_per_gpu": figure(tflops),
            "peak_allocated_gib": figure(20),
            "profile": {"forward": one, "backward": one},
        }

    rows = [layer("fp8_baseline", 400, 5, kernels=60), layer("fp8_direct", 500, 0)]
    rows[1]["graph"] = {"graph_ms": figure(3), "eager_ms": figure(4)}  # of an older measurement
    write_results(tmp_path, [*rows, {"shape": "big", "error": "out of memory"}], "moe_layer.json")
    lines = table(tmp_path, "moe_layer.json")
    assert lines[1][2:] == [
        "2.00 [1.90 to 2.10]",
        "4.00",
        "400",
        "20.0",
        "5 + 5",
        "60 + 60",
        "1.000",
    ]
    assert lines[2][1] == "`fp8_direct`"
    assert lines[2][-4:] == ["20.0", "0 + 0", NONE, "1.250"]
    assert lines[3][:3] == ["big", "out of memory", NONE]


def test_kernels_table_of_the_measured_file(tmp_path: Path) -> None:
    source = readme.ROOT / "docs" / "results" / "kernels.json"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "kernels.json").write_bytes(source.read_bytes())
    rows = json.loads(source.read_text())["rows"]
    assert len(table(tmp_path, "kernels.json")) == len(rows) + 1
    head, *lines = table(tmp_path, "kernels.json | shape=16384 x 2048 | by=TE")
    assert head[:4] == ["kernel", "by", "shape", "µs"]
    wanted = [r["kernel"] for r in rows if r["shape"] == "16384 x 2048" and r["by"] == "TE"]
    assert [line[0] for line in lines] == wanted != []


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = row("fp8_compact", 1) | {"error": "CUDA out of memory"}
    del failed["step_ms"]
    write_results(tmp_path, [row("fp8_direct", 12500), failed, row("fp8", 10000, "megatron-core")])
    status, text = run(tmp_path, PICTURE)
    assert status == 0
    assert (
        "![TFLOP/s per GPU of training steps, the fastest: "
        "ours fp8_direct 125.0, megatron-core fp8 100.0](images/train_x.svg)"
    ) in text
    picture = tmp_path / "images" / "train_x.svg"
    shown = " ".join(ElementTree.parse(picture).getroot().itertext())
    for words in ("ours fp8_direct", "125.0", "100.0", "out of memory", "4 x NVIDIA H200"):
        assert words in shown
    drawn = picture.read_bytes()
    assert run(tmp_path, text, "--check")[0] == 0
    # New figures make the picture old, which --check says, and writing draws it again.
    write_results(tmp_path, [row("fp8_direct", 12600), row("fp8", 10000, "megatron-core")])
    capsys.readouterr()
    assert run(tmp_path, text, "--check")[0] == 1
    assert "train_x.svg is not what" in capsys.readouterr().err
    assert picture.read_bytes() == drawn
    assert run(tmp_path, text)[0] == 0
    assert "126.0" in picture.read_text()


@pytest.mark.parametrize("dispatch", ["deepep", "alltoall"])
def test_a_picture_dots_the_best_stock_that_there_is(tmp_path: Path, dispatch: str) -> None:
    peer = row("bf16", 10000, "megatron-core") | {"dispatch": dispatch}
    write_results(tmp_path, [peer, row("fp8_fused", 12500) | {"dispatch": "deep_ep_v2"}])
    assert run(tmp_path, PICTURE)[0] == 0
    picture = ElementTree.parse(tmp_path / "images" / "train_x.svg")
    shown = " ".join(picture.getroot().itertext())
    assert ("dotted: best stock" in shown) == (dispatch == "deepep")


def test_a_picture_by_numbers_of_gpus(tmp_path: Path) -> None:
    """Of stacks that one sitting measured on each."""
    few = [row("bf16", 11100), row("fp8_direct", 12200), row("fp8_fused", 13300)]
    peer = row("bf16", 9900, "megatron-core")
    rows = [row("bf16", 11000), peer, few[1]] + [one | {"gpus": 2} for one in [*few, peer]]
    write_results(tmp_path, rows)
    assert run(tmp_path, PICTURE)[0] == 0
    picture = ElementTree.parse(tmp_path / "images" / "train_x.svg")
    shown = [text for text in picture.getroot().itertext() if text.strip()]
    for words in (
        "2 x NVIDIA H200",
        "4 x NVIDIA H200",
        "ours fp8_direct",
        "111",
        "110",
        "TFLOP/s per GPU",
    ):
        assert words in shown
    assert shown.index("2 x NVIDIA H200") < shown.index("4 x NVIDIA H200"), "whatever came first"
    assert shown.count("99") == shown.count("122") == 2
    assert "ours fp8_fused" not in shown, "which four GPUs have not run"
    # Other flags of a path have another color, also where no routing is known.
    flagged = [one | {"flags": ["prepare"]} for one in rows]
    both = [{k: v for k, v in one.items() if k != "routing"} for one in [*rows, *flagged]]
    write_results(tmp_path, both)
    assert run(tmp_path, PICTURE)[0] == 0
    svg = (tmp_path / "images" / "train_x.svg").read_text()
    bars = re.findall(r'aria-roledescription="bar" d="[^"]*" fill="([^"]*)"', svg)
    assert len(bars) == 12
    assert len(set(bars)) == 6
    # In two sittings nothing stands side by side.
    write_results(tmp_path, [*rows, row("fp8_fused", 13300, sitting="b")])
    assert run(tmp_path, PICTURE)[0] == 0
    picture = ElementTree.parse(tmp_path / "images" / "train_x.svg")
    assert "4 GPUs, balanced routing, sitting b" in " ".join(picture.getroot().itertext())


def test_a_picture_of_some_rows(tmp_path: Path) -> None:
    rows = [
        row("bf16", 12500) | {"routing": "balanced"},
        row("bf16", 5000) | {"routing": "natural"},
    ]
    write_results(tmp_path, rows)
    marker = PICTURE.replace("json", "json | routing=balanced")
    status, text = run(tmp_path, marker)
    assert status == 0
    assert "ours bf16 125.0](images/train_x-balanced.svg)" in text
    svg = (tmp_path / "images" / "train_x-balanced.svg").read_text()
    assert ">125.0</text>" in svg
    assert ">50.0</text>" not in svg
    assert run(tmp_path, text, "--check")[0] == 0


def test_a_picture_can_be_linked_whatever_chooses_its_rows(tmp_path: Path) -> None:
    write_results(tmp_path, [row("bf16", 12500, sitting="2026/1 10:20")])
    marker = PICTURE.replace("json", "json | sitting=2026/1 10:20")
    status, text = run(tmp_path, marker)
    assert status == 0
    assert "(images/train_x-2026_1_10_20.svg)" in text
    assert run(tmp_path, text, "--check")[0] == 0


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_a_picture_of_no_row_is_one_line(tmp_path: Path, capsys, check: list[str]) -> None:
    write_results(tmp_path, [row("bf16", 1)], screening=[row("fp8_fused", 2)])
    text = PICTURE.replace("json", "json | path=bf61")
    assert run(tmp_path, text, *check) == (2, text)
    assert capsys.readouterr().err.endswith("has no row of {'path': ['bf61']}\n")


def test_rows_of_one_name_have_bars_of_their_own(tmp_path: Path) -> None:
    write_results(tmp_path, [row("bf16", 10000), row("bf16", 9000)])
    assert run(tmp_path, PICTURE)[0] == 0
    svg = (tmp_path / "images" / "train_x.svg").read_text()
    assert len(re.findall(r'aria-roledescription="bar"', svg)) == 2
    assert len(re.findall(r">ours bf16</text>", svg)) == 2
    assert len(re.findall(r"micro-batch \d+</text>", svg)) == 1, (
        "what all bars share is the title's"
    )
    for figure in ("100.0", "90.0"):
        assert f">{figure}</text>" in svg


def test_bars_of_two_micro_batches_name_theirs(tmp_path: Path) -> None:
    long = {"flags": ["experimental", "environment", "bf16_grads", "cutlass", "attention_graphs"]}
    stock = row("bf16", 9900, "megatron-core", micro_batch=12) | long
    write_results(tmp_path, [row("bf16", 10000), row("bf16", 9000, micro_batch=4), stock])
    assert run(tmp_path, PICTURE)[0] == 0
    svg = (tmp_path / "images" / "train_x.svg").read_text()
    assert len(re.findall(r">ours bf16, micro-batch\xa0\d+</text>", svg)) == 2
    lines = re.findall(r">megatron-core .*?</text>", svg)
    words = ["megatron-core bf16, experimental, environment,",
             "bf16_grads, cutlass, attention_graphs, micro-batch\xa012"]  # fmt: skip
    assert words in [re.findall(r">([^<]+)<", line) for line in lines], "two lines have space"


def test_same_figures_give_the_same_picture(tmp_path: Path) -> None:
    write_results(tmp_path, [row("bf16", 10000), row("bf16", 9000, micro_batch=4)])
    source = tmp_path / "results" / "train_x.json"
    for name in ("a.svg", "b.svg"):
        assert plots.main([str(source), "--picture", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_what_is_not_measured_yet_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = run(tmp_path, TEXT.format("train_x.json") + PICTURE)
    assert status == 0
    assert "Not measured yet; the figures will be in `train_x.json`." in text
    assert text.endswith(PICTURE)
    assert capsys.readouterr().err.endswith("train_x.json is not there yet\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<!-- table: train_x.json -->\n", "has no partner"),
        ("<!-- end of table -->\n", "has no partner"),
        ("<!-- table: train_x.json -->\n<!-- end of picture -->\n", "has no partner"),
        (TEXT.format("train_x.json | path=bf61"), "has no row of {'path': ['bf61']}"),
        (TEXT.format("train_x.json | path"), "'path' in a marker is not key=value"),
        (TEXT.format("odd.json"), "no table is known"),
        (TEXT.format("short.json"), "lacks 'tflops_per_gpu'"),
        (PICTURE.replace("train_x", "failed"), "failed.json has no measurements"),
        (TEXT.format("broken.json"), "broken.json is not JSON"),
        (TEXT.format("list.json"), "is not a results file"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    write_results(tmp_path, [row("bf16", 1)], screening=[row("fp8_fused", 2)])
    write_results(tmp_path, [{"what": 1}], "odd.json")
    short = row("bf16", 1)
    del short["tflops_per_gpu"]
    write_results(tmp_path, [short], "short.json")
    write_results(tmp_path, [{"error": "no", "micro_batch": 1}], "failed.json")
    (tmp_path / "results" / "broken.json").write_text("{")
    (tmp_path / "results" / "list.json").write_text("[]")
    assert run(tmp_path, text) == (2, text)
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_text_that_cannot_be_read_or_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    latin = tmp_path / "latin.md"
    latin.write_bytes(b"\xe9")
    assert readme.main([str(latin)]) == 2
    assert "latin.md is not UTF-8" in capsys.readouterr().err
    write_results(tmp_path, [row("bf16", 1)])

    def full(path: Path, *_: Any, **__: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    text = tmp_path / "README.md"
    before = TEXT.format("train_x.json").encode()
    text.write_bytes(before)
    assert readme.main([str(text), "--results", str(tmp_path / "results")]) == 2
    error = capsys.readouterr().err
    assert "README.md cannot be written: No space left on device" in error
    assert error.count("\n") == 1
    assert text.read_bytes() == before
    assert {*tmp_path.iterdir()} == {text, latin, tmp_path / "results"}


def test_no_such_text_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main([str(tmp_path / "none.md")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_runs_of_one_path_are_told_apart(tmp_path: Path) -> None:
    runs = (("a", "bf16"), ("b", "fp8_direct"), ("c", "bf16"))
    rows = [{"run": run, "path": path, "final train loss": "1.0"} for run, path in runs]
    write_results(tmp_path, rows)
    assert table(tmp_path, "train_x.json")[0] == ["", "`a`", "`fp8_direct`", "`c`"]


def test_runs_that_are_repeats_share_a_row(tmp_path: Path) -> None:
    """The very rows of scripts/compare, of runs that differ in a key and in the seed."""
    folders = []
    for coefficient in (0.0, 0.01):
        for seed, loss in ((1, 2.0), (2, 3.0)):
            name = f"{coefficient}-{seed}"
            keys: dict[str, dict[str, Any]]
            keys = {"moe": {"aux_loss_coeff": coefficient}, "train": {"seed": seed}}
            load = {"moe/max_expert_load": 4.0 - coefficient * 100 - seed / 10}
            losses = [5.0] * 18 + [loss, loss + 1]
            folders.append(write_run(tmp_path / name, "bf16", losses, load, "cpu", config=keys))
    out = tmp_path / "results"
    assert compare([*map(str, folders), "--out", str(out)], Console(quiet=True)) == 0
    head, *lines = table(tmp_path, "compare.json")
    loads = ["busiest expert / mean", "worst busiest expert / mean", "final busiest expert / mean"]
    assert head == ["`moe.aux_loss_coeff`", "final train loss", *loads]
    loss_cell = "3.000 [2.500 to 3.500]"
    assert lines == [
        ["0.0", loss_cell, *["3.85 [3.80 to 3.90]"] * 3],
        ["0.01", loss_cell, *["2.85 [2.80 to 2.90]"] * 3],
    ]
    assert (
        "; mean [least to most] of 2 runs; [compare.json]" in (tmp_path / "README.md").read_text()
    )

    path = out / "compare.json"
    path.write_text(
        path.read_text().replace('"final train loss": "2.5000"', '"final train loss": "not finite"')
    )
    assert table(tmp_path, "compare.json")[1][1] == "not finite"
