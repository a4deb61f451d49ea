"""Tokenize the text that a config names, once, into a folder that data.path takes.

    python -m scripts.prepare_data configs/NAME.yaml --out FOLDER [--workers N] [key=value ...]

Local text, or a data set of the hub. Killed or out of space, the same command continues where it
stopped, and ends with the same bytes, whatever the number of processes. A run on the folder trains
on the same sequences as one on the text itself, for any model.seq_len.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from scripts import terminal
from train.config import Config, ConfigError, load
from train.data import prepared
from train.data.pool import THREADS
from train.data.prepare import Text, prepare
from train.data.prepared import About
from train.data.sources import (
    check_documents,
    check_vocabulary,
    hub_text,
    local_files,
    local_text,
    quiet,
    readable,
)
from train.data.tokenizer import load_tokenizer

LINES_S = 10.0
"""Seconds between two lines of progress, where there is no terminal."""


def make(config: Config, out: Path, workers: int) -> About:
    """Prepare what the config names. Raises ConfigError; what was made stays."""
    check_options(config, out, workers)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eod_token)
    check_vocabulary(config, tokenizer)
    quiet()
    kind, text = find_text(config)
    try:
        with readable(config, kind), shown() as said:
            about = prepare(out.expanduser(), text, tokenizer, config, workers, said)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"--out={out} cannot be written ({reason}); what was made stays, and once that is "
            "fixed the same command continues"
        ) from None
    check_documents(config, about.documents, about.valid_documents)
    return about


def find_text(config: Config) -> tuple[str, Text]:
    """The kind of its files, and what is to be read. Raises ConfigError."""
    if config.data.name is not None:
        return "text", hub_text(config)
    found = local_files(config)
    with readable(config, found.kind):
        return found.kind, local_text(config, found)


def check_options(config: Config, out: Path, workers: int) -> None:
    """Check the options before anything is read. Raises ConfigError."""
    if workers < 1:
        raise ConfigError(f"--workers={workers}: nobody is left to work; take 1 or more")
    out = out.expanduser()
    if os.path.lexists(out) and not os.path.isdir(out):
        raise ConfigError(f"--out={out} is there and no folder; name a new folder")
    if config.data.mixture:
        raise ConfigError(
            "data.mixture names several sources; prepare each into a folder of its own, with "
            "data.path, and name these folders in data.mixture"
        )
    if config.data.path is not None:
        source = Path(config.data.path).expanduser().resolve()
        if os.path.isdir(source) and source in (out.resolve(), *out.resolve().parents):
            raise ConfigError(
                f"--out={out} lies in data.path={config.data.path}, where it would be taken for "
                "text; name a folder elsewhere"
            )


class Shown:
    """Progress: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[size]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.speaks = not console.is_terminal
        self.said = time.monotonic()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        size = f"{done / 1e6:,.1f} million characters"
        if total:
            size = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} million characters"
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total, size=size)
        self.bar.update(self.tasks[what], completed=done, total=total, size=size)
        if self.speaks and time.monotonic() - self.said > LINES_S:
            self.said = time.monotonic()
            with suppress(OSError):  # its reader may be gone
                print(f"{what}: {size}", flush=True)


@contextmanager
def shown() -> Iterator[Shown]:
    one = Shown(Console())
    with one.bar:
        yield one


def summary(about: About, out: Path) -> str:
    """The lines that the script ends with: the result, and the keys to set."""
    train, valid = (about.tokens(side) for side in prepared.SIDES)
    tokens = train + valid
    held_out = f"{about.valid_documents:,} of them held out"
    if about.documents == 1:
        held_out = "of which a run holds the last sequences out"
    lines = [
        f"{out}: {about.documents:,} document(s), {held_out}; {tokens:,} tokens, "
        f"{valid:,} of them held out; {about.characters / max(1, tokens):.2f} characters a token"
    ]
    if about.copies:
        lines.append(
            f"{about.copies:,} document(s) are exact copies of another one; they are kept, on its "
            "side, as in a run on the text itself"
        )
    if about.replaced:
        lines.append(f"{about.replaced:,} document(s) have U+FFFD for what is not UTF-8")
    keys = [f"data.path={out}"]
    if about.tokenizer_digest != "bytes":
        keys.append(f"data.tokenizer={out}")
    lines.append(f"to train on it: {shlex.join(keys)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input, reported in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.prepare_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="overrides, as for training"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder, or an unfinished one"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    options = parser.parse_intermixed_args(arguments)
    os.environ.setdefault(THREADS, str(max(1, options.workers)))
    try:
        about = make(load(options.config, options.overrides), options.out, options.workers)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues where it stopped", file=sys.stderr)
        return 130
    print(summary(about, options.out))
    return 0


if __name__ == "__main__":
    terminal.run(main)
