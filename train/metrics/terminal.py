"""What a person sees on the terminal: what runs where, a line per logging interval, a summary."""

import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from train.config import Config
from train.metrics import flops
from train.parallel import Ranks
from train.preflight import resolve_dtype

WIDTH = 100
"""Columns that a printed line takes at most, unless it is a single word such as a long path."""
INDENT = 10
"""Columns of a fact's name, and before the rest of a line that is broken."""
SPACE = "\0"
"""Stands for a space of a path while a line is broken; no path has it."""


class Progress:
    """Rank 0's terminal. The bar is for terminals only; a log file gets the lines."""

    def __init__(self, steps: int, first_step: int) -> None:
        # Paths are printed as they are: `[/b]` and `:x:` are not markup.
        self.console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        terminal = self.console.is_terminal
        if self.console.width == 0:  # COLUMNS=0 in the environment, at which rich prints nothing
            self.console.width = WIDTH
        self.width = min(WIDTH, self.console.width) if terminal else WIDTH
        self.steps = steps
        self.bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not terminal,
        )
        self.task = self.bar.add_task("train", total=steps, completed=first_step)
        self.begin = time.monotonic()

    def start(self, facts: Mapping[str, str]) -> None:
        """Print what runs where."""
        for name, value in facts.items():
            self._say(f"{name:<{INDENT}}", _whole(value) if name == "run" else value)
        self.bar.start()

    def line(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for one logged step. TFLOP/s are left to the files: MFU says the same."""
        self.bar.update(self.task, completed=step)
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}"]
        for name, label, form in (
            ("loss/train", "loss", ".4f"),
            ("loss/valid", "valid", ".4f"),
            ("optim/grad_norm", "grad", ".2f"),
            ("optim/lr", "lr", ".2e"),
            ("throughput/tokens_per_sec", "tok/s", ",.0f"),
            ("throughput/mfu", "MFU", ".1%"),
            ("memory/peak_allocated_gib", "GiB", ".1f"),
            ("moe/max_expert_load", "load", ".2f"),
        ):
            if name in metrics:
                parts.append(f"{label} {metrics[name]:{form}}")
        for line in joined(parts, self.width):
            self.console.print(line)

    def finish(
        self, last: Mapping[str, float], summary: Mapping[str, float], run_dir: Path
    ) -> None:
        """Print how it ended and where everything is."""
        self.bar.stop()
        seconds = time.monotonic() - self.begin
        losses = ", ".join(
            f"{label} loss {last[name]:.4f}"
            for name, label in (("loss/train", "training"), ("loss/valid", "validation"))
            if name in last
        )
        speed = summary.get("throughput/tokens_per_sec_median")
        said = f"{losses}; median {speed:,.0f} tokens/s" if speed else losses
        self._say(f"done in {seconds:.0f} s: ", said)
        folder = _whole(str(run_dir))
        self._say("everything is in ", f"{folder}: metrics.jsonl, config.yaml, checkpoints/")

    def _say(self, begin: str, text: str) -> None:
        """Print a line, broken between words where it is too long; no word is broken."""
        lines = textwrap.wrap(
            text,
            self.width,
            initial_indent=begin,
            subsequent_indent=" " * INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines or [begin]:
            self.console.print(line.replace(SPACE, " "))


def _whole(path: str) -> str:
    """The path as one word for `_say`, whatever spaces are in it."""
    return path.replace(" ", SPACE)


def joined(parts: Sequence[str], width: int) -> Iterator[str]:
    """The parts on one line, or on several where one would be wider; no part is broken."""
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        if line and len(longer) > width:
            yield line
            longer = " " * INDENT + part
        line = longer
    yield line


def facts(config: Config, ranks: Ranks, device_name: str, runs_on: str) -> dict[str, str]:
    """What is trained where, as the terminal shows it at the start."""
    count = flops.count(config.model, config.moe)
    dtype = resolve_dtype(config, ranks.device.type)
    world_size, expert_parallel = ranks.world_size, config.parallel.expert_parallel
    return {
        "run": str(config.run_dir),
        "machine": f"{world_size} x {device_name}",
        "model": f"{count.total_params / 1e6:,.1f} M parameters, "
        f"{count.active_params / 1e6:,.1f} M active per token",
        "experts": f"{config.moe.num_experts}, top {config.moe.top_k}; "
        f"{config.moe.num_experts // expert_parallel} on each of {expert_parallel} rank(s)",
        "path": f"{config.moe.path}, computed in {str(dtype).removeprefix('torch.')}",
        "runs on": runs_on,
        "batch": f"{config.global_batch(world_size)} sequences of {config.model.seq_len} = "
        f"{config.tokens_per_step(world_size):,} tokens a step "
        f"({config.accumulation(world_size)} micro-batch(es) of {config.train.micro_batch} a rank)",
    }
