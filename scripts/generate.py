"""Complete a prompt with a model that scripts.export has written, on a GPU or a CPU:

    python -m scripts.generate model.safetensors "def " [--tokens 200] [--temperature 0.8]

Every token is predicted from all before it, without a cache: short, and slow for long texts.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from models.config import PATH_NAMES
from models.gpt import GPT, build_gpt
from models.moe.runtime import why_not
from scripts import terminal
from scripts.export import read
from train import parallel
from train.checkpoint.files import is_of_model
from train.config import Config, ConfigError
from train.data.tokenizer import Tokenizer, load_tokenizer

Number = TypeVar("Number", int, float)


def load_model(
    path: Path, device: str, moe_path: str | None = None
) -> tuple[GPT, Tokenizer, Config]:
    """The model on `cpu` or `cuda`, ready to predict, in bfloat16 on a GPU; its tokenizer, config.

    Experts compute by `moe_path`, by default the one the model was trained on. Starts a process
    group of this process alone. Raises ConfigError.
    """
    weights, config, _, tokenizer = read(path)
    if tokenizer is None:  # an older file, or one whose tokenizer was gone
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.eod_token)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{config.model.vocab_size}; data.tokenizer={config.data.tokenizer} is not what it "
            "was trained with"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch sees no GPU here; leave --device out")
    if moe_path is not None and moe_path not in PATH_NAMES:
        raise ConfigError(f"--path {moe_path}: no such path; known: {', '.join(PATH_NAMES)}")
    # Every token is to be served, each by the experts that its router chooses.
    moe = config.moe.model_copy(
        update={
            "path": moe_path or config.moe.path,
            "capacity": None,
            "force_balance": False,
            "dispatch": "all_to_all",
        }
    )
    shape = config.model.model_copy(update={"attention_backend": "auto"})  # of any machine
    reason = why_not(shape, moe, device, 1)
    if reason:
        raise ConfigError(reason)
    ranks = parallel.start(device, 1, config.train.seed, timeout_s=600)
    model = build_gpt(shape, moe, ranks.device, config.train.seed)
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} does not fit its own config: {reason}") from None
    missing = {key for key in model.state_dict() if is_of_model(key)} - weights.keys()
    if missing:
        raise ConfigError(f"{path} lacks weights: {', '.join(sorted(missing))}")
    if device == "cuda":
        for parameter in model.parameters():  # buffers stay what they are in training
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval(), tokenizer, config


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
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from 0 to {most:g}")

    return read_number


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for bad input, said in one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="a file that scripts.export has written")
    parser.add_argument("prompt")
    parser.add_argument(
        "--tokens", type=_number(int, 1e9), default=200, help="how many at most (200)"
    )
    parser.add_argument(
        "--temperature", type=_number(float, 1e9), default=0.8, help="0: the likeliest (0.8)"
    )
    parser.add_argument("--seed", type=_number(int, 2**63 - 1), default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--path", help="moe.path to compute by (default: the model's own)")
    options = parser.parse_args(arguments)
    # What of the prompt is no UTF-8 comes as characters that nothing can encode.
    prompt = options.prompt.encode("utf-8", "replace").decode()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, tokenizer, config = load_model(options.model, device, options.path)
    except ConfigError as error:
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
