"""Dispatch and combine in one of our layers, beside what DeepEP's own tests print.

    python -m scripts.bench.deep_ep_tests LOG,LAYER.json LOG,LAYER.json --out FILE.json

LOG is what a test of DeepEP's printed, LAYER.json a layer by the same version of it, with as many
GPUs, tokens, experts and places, on the same machine. For Qwen3's layer on four GPUs:

    like="--num-processes 4 --num-tokens 16384 --hidden 2048 --num-topk 8 --num-experts 128"
    python tests/legacy/test_intranode.py $like                                  # version 1
    python tests/elastic/test_ep.py $like --test-first-only --skip-check         # version 2
    torchrun --nproc-per-node 4 -m scripts.bench.layer --shapes qwen3_30b_a3b \\
        --dispatch deep_ep_v2 --out LAYER.json

Version 1 prints the best of the settings that it tries, with the routing known; version 2 the two
kernels of a first dispatch that expands, and of a combine that sums. A part of our layer also has
its launches in it, and in the forward pass who goes where.

Exit status: 0 done, 2 bad input, reported in one line.
"""

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts import terminal
from scripts.bench.command import or_one_line
from scripts.bench.results import Row, write_json
from train.config import ConfigError
from train.whole_file import check_out

V1 = re.compile(r"Best (dispatch \(FP8\)|combine): .*?([\d.]+) GB/s \(NVL\), t: ([\d.]+) us")
"""A call, its GB/s, and its microseconds."""
V2 = re.compile(
    r"\| (expanded dispatch|reduced combine): .*? (\d+) GB/s \(SU\), ([\d.]+) us,"
    r".*? (?:copy|reduce): \d+ GB/s, ([\d.]+) us"
)
"""A call; GB/s and microseconds of its first kernel, which sends; microseconds of the second."""
V2_MODE = "> Testing with "
"""Version 2 prints it before each mode."""
PATHS = {"deep_ep_v1": "fp8_direct", "deep_ep_v2": "fp8_fused"}
"""The path whose layer makes the calls that this version's test times."""


def own_test(log: str) -> dict[str, dict[str, float]]:
    """From what a test of either version printed: `dispatch` and `combine`, each with microseconds,
    `us`, of all its kernels, and the `gb_per_s` of what is sent in that time; medians of the ranks
    that say. Empty for other texts. Raises ValueError where version 2 printed several modes."""
    if log.count(V2_MODE) > 1:
        raise ValueError("several modes in one log: run that test with --test-first-only")
    found: dict[str, list[tuple[float, float]]] = {}
    for name, rate, us in V1.findall(log):
        found.setdefault(name.split()[0], []).append((float(rate), float(us)))
    for name, rate, sending, second in V2.findall(log):
        us = float(sending) + float(second)
        found.setdefault(name.split()[1], []).append((float(rate) * float(sending) / us, us))
    return {
        name: {
            "gb_per_s": statistics.median(rate for rate, _ in said),
            "us": statistics.median(us for _, us in said),
        }
        for name, said in found.items()
    }


def compare(log: str, layer: dict[str, Any]) -> list[Row]:
    """A row for dispatch and one for combine. Raises ValueError where one of the two lacks them."""
    dispatch = layer["config"]["dispatch"]
    if dispatch not in PATHS:
        raise ValueError(f"the layer was dispatched by {dispatch}, not by DeepEP")
    tested = own_test(log)
    if tested.keys() != {"dispatch", "combine"}:
        raise ValueError("the log has no figures of dispatch and combine")
    row = next((row for row in layer["rows"] if row.get("path") == PATHS[dispatch]), None)
    if row is None:
        raise ValueError(f"the layer was not run in {PATHS[dispatch]}")
    return [
        {
            "call": name,
            "dispatcher": dispatch,
            "path": PATHS[dispatch],
            "gpus": row["gpus"],
            "own_test": tested[name],
            **{
                f"{way}_us": 1000 * row[f"{way}_parts_ms"][name]["median"]
                for way in ("forward", "backward")
            },
        }
        for name in ("dispatch", "combine")
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.deep_ep_tests",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pairs", nargs="+", metavar="LOG,LAYER.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args(arguments)
    return or_one_line(lambda: run(args.pairs, args.out))


def run(pairs: Sequence[str], out: Path) -> int:
    """Compare each LOG,LAYER.json and write the file. Raises ConfigError."""
    check_out(out)
    rows: list[Row] = []
    origins: list[dict[str, Any]] = []
    for pair in pairs:
        log, _, name = pair.rpartition(",")
        if not log:
            raise ConfigError(f"{pair}: no log for this layer; give LOG,LAYER.json")
        try:
            layer = json.loads(Path(name).read_text(encoding="utf-8"))
            rows += compare(Path(log).read_text(encoding="utf-8"), layer)
            origins.append({key: layer[key] for key in ("machine", "versions", "commit")})
        except KeyError as error:
            raise ConfigError(f"{pair}: the layer has no {error}") from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{pair}: {error}") from None
    if any(origin != origins[0] for origin in origins):
        raise ConfigError("the layers are of different machines, versions or commits")
    write_json(out, {**origins[0], "rows": rows})
    print(f"{out}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    terminal.run(main)
