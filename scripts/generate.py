"""Complete a prompt with a model written by scripts.export, on a GPU or a CPU:

    python -m scripts.generate model.safetensors "def " [--tokens 200] [--temperature 0.8]

Every token is predicted from all tokens before it, without a cache: simple code, but slow for long
texts.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from models.gpt import GPT
from scripts import terminal, trained
from train import parallel
from train.config import Config, ConfigError
from train.data.tokenizer import Tokenizer

Number = TypeVar("Number", int, float)


def load_model(
    path: Path, device: str, moe_path: str | None = None
) -> tuple[GPT, Tokenizer, Config]:
    """The model on `cpu` or `cuda`, ready to predict, in bfloat16 on a GPU; its tokenizer, config.

    Experts compute by `moe_path`, by default the one the model was trained on. Starts a process
    group of this process alone. Raises ConfigError.
    """
    found = trained.of_file(path)
    config = found.config
    tokenizer = found.fitting_tokenizer()
    return trained.build(found, device, moe_path), tokenizer, config


@torch.no_grad()
def complete(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    context: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Tokens that follow `prompt`, at most `tokens` of them and none after the document's end.

    Drawn at a temperature; at 0 the likeliest one each time. The model sees the last `context`
    tokens.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    # In training a document begins after the end of another.
    ids = [tokenizer.eod, *(int(token) for token in tokenizer.encode([prompt])[0])]
    for _ in range(tokens):
        window = torch.tensor([ids[-context:]], device=device)
        logits = model(window, None)[0, -1].float().cpu()[: tokenizer.vocab_size]
        if temperature > 0:
            # From the largest down, so that no temperature is too low for float32.
            chances = torch.softmax((logits - logits.max()).double() / temperature, 0)
            token = int(torch.multinomial(chances, 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == tokenizer.eod:
            return
        ids.append(token)
        yield token


def _number(kind: type[Number], most: float) -> Callable[[str], Number]:
    """A reader of numbers from 0 to `most`, for argparse."""

    def read_number(text: str) -> Number:
        with suppress(ValueError):
            value = kind(text)
            if 0 <= value <= most:
                return value
        number = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {number} from 0 to {most:g}")

    return read_number


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input, reported in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="a file written by scripts.export")
    parser.add_argument("prompt")
    parser.add_argument(
        "--tokens", type=_number(int, 1e9), default=200, help="most tokens to add (200)"
    )
    parser.add_argument(
        "--temperature",
        type=_number(float, 1e9),
        default=0.8,
        help="0 takes the likeliest token (0.8)",
    )
    parser.add_argument("--seed", type=_number(int, 2**63 - 1), default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--path", help="moe.path to compute with (default: the model's own)")
    options = parser.parse_args(arguments)
    # Bytes of the prompt that are not UTF-8 arrive as surrogates, which cannot be encoded.
    prompt = options.prompt.encode("utf-8", "replace").decode()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, tokenizer, config = load_model(options.model, device, options.path)
    except (ConfigError, OSError) as error:  # the latter of a folder of somebody else
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = complete(
        *(model, tokenizer, prompt, options.tokens, config.model.seq_len),
        *(options.temperature, options.seed),
    )
    print(prompt + tokenizer.decode(list(found)))
    parallel.stop()
    return 0


if __name__ == "__main__":
    terminal.run(main)
