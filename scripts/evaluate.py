"""Loss and bits per byte of a trained model, on one GPU or a CPU, and the tasks of lm_eval.

    python -m scripts.evaluate runs/NAME                          # its newest whole checkpoint
    python -m scripts.evaluate model.safetensors --data my/text   # every document of my/text
    python -m scripts.evaluate FOLDER data.path=my/folder         # Hugging Face's, as exported
    python -m scripts.evaluate runs/NAME --tasks hellaswag,arc_easy --out result.json

By default it evaluates validation sequences of the model's own config, `train.valid_batches` global
batches of them: what training logs as `loss/valid` and `loss/valid_bpb`. Other config keys can
follow.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import torch

from scripts import harness, terminal, trained
from scripts.bench.results import write_json
from scripts.trained import Trained
from train import loop, parallel
from train.config import Config, ConfigError
from train.data import batches as data
from train.data.batches import Batch, Corpus, make_batch
from train.whole_file import check_out


def loss_of(
    found: Trained, device: str, path: str | None, whole: bool, batches: int | None
) -> dict[str, Any]:
    """Evaluate validation sequences, or with `whole` all: `loss` (nats a token), `bits_per_byte`
    (absent where the tokens stand for no text), `tokens`, `bytes`, and what was computed how.

    batches: at most this many micro-batches of `whole`. Raises ConfigError.
    """
    config = found.config
    tokenizer = found.fitting_tokenizer()
    check_batch(config)
    data.check(config)
    corpus = data.load(config)
    if corpus.tokenizer.digest != tokenizer.digest:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer} is not the one that {found.path} was trained "
            "with; name that one"
        )
    model = trained.build(found, device, path)
    source = every(corpus, batches) if whole else corpus.valid_batches(0, 1)
    where = next(model.parameters())
    total = loop.sum_losses(model, source, tokenizer, config, where.device)
    means = loop.means(total)
    _, tokens, text_bytes = total.tolist()
    result: dict[str, Any] = {"loss": means["loss/valid"]}
    if text_bytes:
        result["bits_per_byte"] = means["loss/valid_bpb"]
    return result | {
        "tokens": int(tokens),
        "bytes": int(text_bytes),
        "data": corpus.describe(),
        "sequences": "all" if whole else "validation",
        "path": path or config.moe.path,
        "dtype": str(where.dtype).removeprefix("torch."),
    }


def check_batch(config: Config) -> None:
    """Raises ConfigError where micro-batches do not divide the global batch."""
    train = config.train
    if config.global_batch(1) % train.micro_batch:
        raise ConfigError(
            f"train.global_batch={train.global_batch} is not a multiple of "
            f"train.micro_batch={train.micro_batch}; set one of them"
        )


def every(corpus: Corpus, most: int | None) -> Iterator[Batch]:
    """All sequences of local data, whichever side they are on; micro-batches, `most` of them."""
    if isinstance(corpus.train, datasets.IterableDataset):
        raise ConfigError("--data takes local data; for a data set on the hub set data.name=...")
    size, eod, count = corpus.config.train.micro_batch, corpus.tokenizer.eod, 0
    for side in (corpus.train, corpus.valid):
        for begin in range(0, len(side), size):
            if count == most:
                return
            count += 1
            yield make_batch(side[begin : begin + size], eod)


SOURCES = {"data.path": "null", "data.name": "null", "data.mixture": "{}"}
"""The keys that say what is read, one at a time, and how each is unset."""


def with_data(found: Trained, source: str | None, keys: list[str], batches: int | None) -> Trained:
    """The same with the keys that say what it is evaluated on. Raises ConfigError."""
    given = [key.partition("=")[0] for key in keys]
    named = {*given} & {*SOURCES}
    if source is not None:
        if named:
            raise ConfigError(f"--data {source} and {min(named)} are both given; keep one")
        named, keys = {"data.path"}, [*keys, f"data.path={source}"]
    elif batches is not None:
        keys = [*keys, f"train.valid_batches={batches}"]
    if found.weights is None and not named:
        raise ConfigError(
            f"{found.path} does not say what it was validated on; name text with --data, or the "
            "run's with data.path=... or data.name=..."
        )
    if named:  # instead of what the run was trained on, whichever way that was named
        keys = [*(f"{key}={none}" for key, none in SOURCES.items() if key not in named), *keys]
    return found.with_keys(keys)


def report(found: Trained, result: dict[str, Any]) -> str:
    """Lines for the terminal, without the tasks."""
    step = "" if found.step is None else f" after step {found.step}"
    lines = [f"{'model':<15}{found.path}{step}"]
    for name in ("data", "path", "loss", "bits_per_byte", "tokens", "bytes"):
        if name in result:
            value = result[name]
            said = f"{value:.6f}" if isinstance(value, float) else f"{value}"
            said = f"{value:,}" if isinstance(value, int) else said
            said += f", computed in {result['dtype']}" if name == "path" else ""
            lines.append(f"{name.replace('_', ' '):<15}{said}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """Raises ConfigError."""
    tasks = [task for task in (options.tasks or "").split(",") if task]
    if tasks:
        known = harness.check(tasks)
    elif options.tasks is not None:
        raise ConfigError(f"--tasks {options.tasks!r} names no task of lm_eval")
    elif options.limit is not None:
        raise ConfigError(
            f"--limit {options.limit} counts examples of tasks; name some with --tasks"
        )
    if options.out is not None and options.out.suffix != ".json":
        raise ConfigError(f"--out {options.out} must end in .json")
    check_out(options.out)
    found = trained.find(options.model)
    if tasks:
        harness.check_fits(found)
    found = with_data(found, options.data, options.keys, options.batches)
    if found.config.moe.force_balance:
        print(
            "warning: moe.force_balance=true trained with experts drawn at random; here the router "
            "chooses, so the loss is not what training logged",
            file=sys.stderr,
        )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"model": str(found.path), "step": found.step}
    whole = options.data is not None
    result |= loss_of(found, device, options.path, whole, options.batches)
    parallel.stop()
    print(report(found, result), flush=True)  # whatever becomes of the tasks
    if tasks:
        result["tasks"] = harness.evaluate(found, tasks, known, device, options.limit)
        for name, value in harness.lines(result["tasks"]):
            print(f"{name:<15}{value}")
    if options.out is not None:
        try:
            write_json(options.out, result)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--out {options.out} cannot be written: {error}") from None
    return 0


def positive(text: str) -> int:
    """An argument that is a count."""
    with suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input, reported in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL|RUN")
    parser.add_argument(
        "keys",
        nargs="*",
        default=[],
        metavar="key=value",
        help="overrides, such as train.micro_batch=1",
    )
    parser.add_argument("--data", metavar="PATH", help="evaluate every document of this local text")
    parser.add_argument(
        "--batches", type=positive, metavar="N",
        help="validation batches (train.valid_batches); with --data, micro-batches (all)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--path", help="moe.path to compute with (default: the model's own)")
    parser.add_argument(
        "--tasks", metavar="TASK,TASK", help="tasks of lm_eval, run on the HF export"
    )
    parser.add_argument("--limit", type=positive, help="examples of each task (all)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the result as JSON")
    options = parser.parse_intermixed_args(arguments)
    try:
        return run(options)
    except (ConfigError, OSError) as error:  # the latter of a folder of somebody else
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    terminal.run(main)
