"""Render the tables and pictures of the README and the docs from `docs/results/`, between markers.

    python -m scripts.bench.readme [FILE.md ...]     # write; the README and docs/*.md if none
    python -m scripts.bench.readme --check           # say what is out of date, write nothing

A block is between two marker lines and is rendered each time, so a figure is never typed:

    <!-- table: train_moe_small.json -->
    <!-- end of table -->

How a table looks depends on the script that wrote the file:

    train_*.json     scripts.bench.train      a row per stack, path, variant and micro-batch
    kernels.json     scripts.bench.kernels    a row per kernel and shape
    moe_layer.json   scripts.bench.layer      a row per shape and path of one MoE layer
    pairs.json       scripts.bench.pairs      a row per pair of paths that were trained in turn
    compare.json     scripts.compare          a column per run; what holds on any machine. Of
                                              repeats, a row per configuration
    step_kernels.json  scripts.bench.trace     a column per traced step, a row per kind of kernel
    deep_ep_*.json   scripts.bench.deep_ep_tests   a row per call, version and layer
    plan_fit.json    scripts.plan.fit         a row per measured step that a plan was compared with

Rows can be chosen by their keys. A key given twice takes either value:

    <!-- table: kernels.json | shape=16384 x 2048 | by=ours | by=TE -->

The picture of a `train_*.json` (scripts/bench/plots.py) is drawn to docs/images/train_*.svg, of
chosen rows to a file with their values in its name, `_` for what is neither letter nor digit:

    <!-- picture: train_moe_small.json | routing=balanced -->
    <!-- end of picture -->

If the file does not exist yet, the table says so and a picture is left out.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts import terminal
from scripts.bench.plots import alt_text, is_picture_of, plot
from scripts.bench.results import Result
from scripts.bench.tables import Filters, InputError, chosen, make_table
from train.whole_file import whole

ROOT = Path(__file__).parents[2]
TEXTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

BLOCK = re.compile(
    r"(<!-- (?P<kind>table|picture): (?P<name>[^\s|]+)(?P<filters>(?: \| [^|\n]+?)*) -->\n)"
    r".*?(<!-- end of (?P=kind) -->)",
    re.DOTALL,
)
MARKS = re.compile(r"^<!-- (?:end of )?(?:table|picture)\b", re.MULTILINE)


def read(path: Path) -> Result | None:
    """A results file; None where there is none yet. Raises InputError."""
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise InputError(f"{path} is not a results file: it has no rows")
    return result


def parse_filters(text: str) -> Filters:
    """` | key=value | key=value` as values by key. Raises InputError."""
    wanted: Filters = {}
    for part in text.split(" | ")[1:]:
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"{part!r} in a marker is not key=value")
        wanted.setdefault(key.strip(), []).append(value.strip())
    return wanted


class Renderer:
    """Makes the blocks of one Markdown file."""

    def __init__(self, text: Path, results: Path, images: Path, check: bool) -> None:
        self.folder = text.parent
        self.results, self.images, self.check = results, images, check
        self.stale: list[Path] = []
        """Pictures that are not of their file, found by `--check`."""

    def update(self, text: str) -> str:
        """`text` with every block rendered again. Raises InputError."""
        if len(MARKS.findall(text)) != 2 * len(BLOCK.findall(text)):
            raise InputError("a marker of a table or picture has no partner, or is misspelt")
        return BLOCK.sub(lambda found: f"{found[1]}{self._fill(found)}{found[5]}", text)

    def _fill(self, found: re.Match[str]) -> str:
        path = self.results / found["name"]
        result = read(path)
        if result is None:
            if found["kind"] == "picture":
                return ""
            print(f"{path} is not there yet", file=sys.stderr)
            return f"Not measured yet; the figures will be in `{path.name}`.\n"
        wanted = parse_filters(found["filters"])
        try:
            if found["kind"] == "table":
                link = self._link(self.results)
                return make_table(path, result, wanted).replace("(RESULTS/", f"({link}/")
            drawn = chosen(path, result, wanted)
            values = [re.sub(r"[^\w.]+", "_", one) for many in wanted.values() for one in many]
            name = "-".join([path.stem, *values])  # without what ends a link, or names a folder
            picture = self.images / f"{name}.svg"
            if not is_picture_of(picture, path, wanted):
                if self.check:
                    self.stale.append(picture)
                else:
                    plot(path, picture, wanted)
            return f"![{alt_text(drawn)}]({self._link(picture)})\n"
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} lacks {error}") from None
        except ValueError as error:
            raise InputError(str(error)) from None

    def _link(self, path: Path) -> str:
        return os.path.relpath(path, self.folder).replace(os.sep, "/")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if --check finds an old block, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("texts", nargs="*", type=Path, metavar="FILE.md")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", metavar="DIR")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", metavar="DIR")
    options = parser.parse_args(arguments)
    status = 0
    for path in options.texts or TEXTS:
        renderer = Renderer(path, options.results, options.images, options.check)
        try:
            old = path.read_text(encoding="utf-8")
            new = renderer.update(old)
        except OSError as error:
            print(f"readme: {error.filename or path}: {error.strerror}", file=sys.stderr)
            return 2
        except UnicodeDecodeError as error:
            print(f"readme: {path} is not UTF-8: {error}", file=sys.stderr)
            return 2
        except InputError as error:
            print(f"readme: {path.name}: {error}", file=sys.stderr)
            return 2
        if options.check:
            for what in [*([path] if new != old else []), *renderer.stale]:
                print(
                    f"{what.name} is not what {options.results} says; "
                    "python -m scripts.bench.readme writes it again",
                    file=sys.stderr,
                )
                status = 1
        elif new != old:
            try:
                with whole(path) as unfinished:
                    unfinished.write_text(new, encoding="utf-8")
            except OSError as error:
                print(f"readme: {path} cannot be written: {error.strerror}", file=sys.stderr)
                return 2
            print(f"{path.name}: written")
    return status


if __name__ == "__main__":
    terminal.run(main)
