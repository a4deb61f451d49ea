"""Dispatch and combine in one of our layers, beside what DeepEP's own tests print.

    python -m scripts.bench.deep_ep_tests LOG,LAYER.json LOG,LAYER.json --out FILE.json

Run on one machine, one after the other, with as many GPUs and tokens as the layer:

    python tests/legacy/test_intranode.py --num-tokens 16384 --hidden 2048 ... >LOG    # DeepEP v1
    python tests/elastic/test_ep.py --num-tokens 16384 --hidden 2048 ... >LOG          # DeepEP v2
    torchrun ... -m scripts.bench.layer --dispatch deep_ep_v2 --out LAYER.json

Its tests time kernels alone, routing known; of v1 they print the best of the settings that they
try. A part of our layer also has the host's launches in it and, in its forward pass, who goes
where. Their tokens are routed at random, so about one in twenty sends nothing to one rank of four;
those of our layer go to all.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from scripts import terminal
from scripts.bench.results import Row, write_json

V1 = re.compile(r"Best (dispatch \(FP8\)|combine): .*?([\d.]+) GB/s \(NVL\), t: ([\d.]+) us")
V2 = re.compile(
    r"\| (expanded dispatch|reduced combine): .*? (\d+) GB/s \(SU\), ([\d.]+) us,"
    r".*? (?:copy|reduce): \d+ GB/s, ([\d.]+) us"
)
PATHS = {"deep_ep_v1": "fp8_direct", "deep_ep_v2": "fp8_fused"}
"""The path of our layer that makes the calls which its test times."""


def own_test(log: str) -> dict[str, dict[str, float]]:
    """From what a test of either version printed: `dispatch` and `combine`, each with `gb_per_s`
    and microseconds, `us`, of its kernels; the median of the ranks that say. Empty for other texts.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for name, rate, us in V1.findall(log):
        found.setdefault(name.split()[0], []).append((float(rate), float(us)))
    for name, rate, first, second in V2.findall(log):
        found.setdefault(name.split()[1], []).append((float(rate), float(first) + float(second)))
    return {
        name: {
            "gb_per_s": statistics.median(rate for rate, _ in ranks),
            "us": statistics.median(us for _, us in ranks),
        }
        for name, ranks in found.items()
    }


def compare(log: str, layer: dict[str, Any]) -> list[Row]:
    """A row for dispatch and one for combine. Raises ValueError where one of the two lacks them."""
    dispatch = layer["config"]["dispatch"]
    if dispatch not in PATHS:
        raise ValueError(f"the layer was dispatched by {dispatch}, not by DeepEP")
    tested = own_test(log)
    if tested.keys() != {"dispatch", "combine"}:
        raise ValueError("the log has no figures of dispatch and combine")
    parts = next((row for row in layer["rows"] if row.get("path") == PATHS[dispatch]), None)
    if parts is None:
        raise ValueError(f"the layer was not run in {PATHS[dispatch]}")
    return [
        {
            "call": name,
            "dispatcher": dispatch,
            "path": PATHS[dispatch],
            "gpus": parts["gpus"],
            "own_test": tested[name],
            **{
                f"{way}_us": 1000 * parts[f"{way}_parts_ms"][name]["median"]
                for way in ("forward", "backward")
            },
        }
        for name in ("dispatch", "combine")
    ]


def main() -> int:
    summary = "Dispatch and combine in a layer, beside what DeepEP's own tests print."
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("pairs", nargs="+", metavar="LOG,LAYER.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    rows: list[Row] = []
    for pair in args.pairs:
        log, _, layer = pair.rpartition(",")
        try:
            measured = json.loads(Path(layer).read_text(encoding="utf-8"))
            rows += compare(Path(log).read_text(encoding="utf-8"), measured)
        except (OSError, ValueError, KeyError) as error:
            print(f"error: {pair}: {error}", file=sys.stderr)
            return 2
    origin = {key: measured[key] for key in ("machine", "versions", "commit")}
    write_json(args.out, {**origin, "rows": rows})
    print(f"{args.out}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    terminal.run(main)
