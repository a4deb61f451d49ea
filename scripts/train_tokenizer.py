"""Train a byte-level BPE tokenizer on the text that a config names.

python -m scripts.train_tokenizer configs/NAME.yaml --vocab-size 32768 --out tokenizer.json \
    [--documents N] [key=value ...]

It sees only the training documents, so that validation text stays unseen.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from scripts import terminal
from train import whole_file
from train.config import ConfigError, load
from train.data.sources import quiet, training_texts
from train.data.tokenizer import END_OF_DOCUMENT

SMALLEST = 257
"""Every byte, so that any text can be encoded, and the end-of-document token."""

LARGEST = 10_000_000
"""More would only take memory, which the library reserves at the start."""

SAMPLE = 20
"""Texts of which it is said how far they shrink."""


def train_bpe(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens; fewer where the text is short."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input, reported in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_tokenizer",
        description="Train a byte-level BPE tokenizer on the training text of a config.",
    )
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="overrides, as for training"
    )
    parser.add_argument("--vocab-size", type=int, default=32768, help="most tokens (32768)")
    parser.add_argument(
        "--out", type=Path, default=Path("tokenizer.json"), help="the file to write (%(default)s)"
    )
    parser.add_argument(
        "--documents",
        type=int,
        default=200_000,
        help="learn from no more than this many (200000); a text file counts as one for each "
        "128 KiB",
    )
    args = parser.parse_intermixed_args(argv)
    try:
        check(args.vocab_size, args.documents, args.out)
        config = load(args.config, args.overrides)
        quiet()
        texts = islice(training_texts(config), args.documents)
        sample = [*islice(texts, SAMPLE)]  # reading them again would survey all text again
        tokenizer = train_bpe(chain(sample, texts), args.vocab_size)
        save(tokenizer, args.out)
        print(how_to_use("".join(sample), tokenizer, args.out))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check(vocab_size: int, documents: int, out: Path) -> None:
    """Check the options before anything is read. Raises ConfigError."""
    if not SMALLEST <= vocab_size <= LARGEST:
        raise ConfigError(f"--vocab-size={vocab_size} is not in {SMALLEST} to {LARGEST}; change it")
    if documents < 1:
        raise ConfigError(f"--documents={documents} leaves nothing to learn from; take 1 or more")
    if not out.name.endswith(".json"):
        raise ConfigError(f"--out {out} must end in .json, by which data.tokenizer knows a file")
    whole_file.check_out(out)


def save(tokenizer: tokenizers.Tokenizer, out: Path) -> None:
    """Write the file; whole, or not at all. Raises ConfigError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file.whole(out) as new:
            new.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None


def how_to_use(sample: str, tokenizer: tokenizers.Tokenizer, out: Path) -> str:
    """The lines that the script ends with: how far a sample shrinks, and the keys to set."""
    size = tokenizer.get_vocab_size()
    ratio = len(sample.encode()) / max(1, len(tokenizer.encode(sample).ids))
    rounded = -(-size // 64) * 64  # GEMMs like it
    return (
        f"{out}: {size} tokens, {ratio:.2f} bytes of this text per token. To train with it:\n"
        f"  {shlex.quote(f'data.tokenizer={out}')} model.vocab_size={max(rounded, 64)}"
    )


if __name__ == "__main__":
    terminal.run(main)
