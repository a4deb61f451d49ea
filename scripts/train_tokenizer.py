"""Train a byte-level BPE tokenizer on the text that a config names.

python -m scripts.train_tokenizer configs/NAME.yaml --vocab-size 32768 --out tokenizer.json \
    [--documents N] [key=value ...]

It sees the training documents alone, so that validation stays text nobody has looked at.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.config import Config, ConfigError, load
from train.data.sources import training_texts
from train.data.tokenizer import END_OF_DOCUMENT

SMALLEST = 257
"""Every byte, so that any text can be encoded, and the end-of-document token."""


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
    """Returns the exit status: 0, or 2 for bad input, said in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.train_tokenizer",
        description="Train a byte-level BPE tokenizer on the training text of a config.",
    )
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for training")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--out", type=Path, default=Path("tokenizer.json"))
    parser.add_argument(
        "--documents", type=int, default=200_000, help="read no more than this many"
    )
    args = parser.parse_intermixed_args(argv)
    if args.vocab_size < SMALLEST:
        parser.error(f"--vocab-size={args.vocab_size} is too small; take {SMALLEST} or more")
    if not args.out.name.endswith(".json"):
        parser.error(f"--out={args.out} must end in .json, by which data.tokenizer knows a file")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out={args.out}: {error.strerror}")
    try:
        config = load(args.config, args.overrides)
        tokenizer = train_bpe(islice(training_texts(config), args.documents), args.vocab_size)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tokenizer.save(str(args.out))
    print(how_to_use(config, tokenizer, args.out))
    return 0


def how_to_use(config: Config, tokenizer: tokenizers.Tokenizer, out: Path) -> str:
    """The lines that the script ends with: how far the text shrinks, and the keys to set."""
    size = tokenizer.get_vocab_size()
    sample = "".join(islice(training_texts(config), 20))
    ratio = len(sample.encode()) / max(1, len(tokenizer.encode(sample).ids))
    rounded = -(-size // 64) * 64  # GEMMs like it
    return (
        f"{out}: {size} tokens, {ratio:.2f} bytes of this text per token. To train with it:\n"
        f"  data.tokenizer={out} model.vocab_size={max(rounded, 64)}"
    )


if __name__ == "__main__":
    sys.exit(main())
