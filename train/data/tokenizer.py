"""Text to token numbers and back: bytes, or any file of the `tokenizers` library.

    tokenizer = load_tokenizer("bytes")          # or "tokenizer.json", or a name on the hub
    ids = tokenizer.encode(["a document"])[0]

Encoding adds nothing: the end-of-document token `eod` is put between documents by `train.data`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from train.config import ConfigError

END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
"""Names under which tokenizers hold their end-of-document token; the first one found is taken."""


class Tokenizer(Protocol):
    """What the data code needs of a tokenizer. It pickles to the same bytes every time, because
    `datasets` finds its cached tokens by a hash of that."""

    vocab_size: int
    """One more than the largest token number."""
    eod: int
    """The token that ends every document and that no text encodes to."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Integer array [tokens] for each text, without `eod`."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the tokens; `eod` and what is no valid text are left out or replaced."""
        ...


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `bytes`, a JSON file or a name on the hub.

    Raises ConfigError where there is none, or none with an end-of-document token.
    """
    if name == "bytes":
        return ByteTokenizer()
    if is_file(name) and not Path(name).is_file():
        raise ConfigError(
            f"data.tokenizer={name}: no such file; train one with "
            "python -m scripts.train_tokenizer, or set data.tokenizer=bytes"
        )
    read = tokenizers.Tokenizer.from_file if is_file(name) else _from_hub
    try:
        inner = read(name)
    except Exception as error:  # the Rust library raises nothing narrower
        what = "not a file of the tokenizers library" if is_file(name) else "not on the hub"
        raise ConfigError(f"data.tokenizer={name}: {what} ({_one_line(error)})") from None
    if not any(inner.token_to_id(token) is not None for token in END_OF_DOCUMENT):
        raise ConfigError(
            f"data.tokenizer={name} has no end-of-document token; add one of "
            f"{', '.join(END_OF_DOCUMENT)} to its vocabulary"
        )
    return FileTokenizer(inner.to_str())


def is_file(name: str) -> bool:
    """Whether `data.tokenizer` names a local file rather than `bytes` or a tokenizer on the hub."""
    return name.endswith(".json") or Path(name).is_file()


class ByteTokenizer:
    """Tokens 0 to 255 are the bytes of UTF-8; token 256 ends a document."""

    vocab_size = 257
    eod = 256

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer of the `tokenizers` library, from the text of its JSON file."""

    def __init__(self, json: str) -> None:
        self._json = json
        self._inner = tokenizers.Tokenizer.from_str(json)
        # A document that spells `<|endoftext|>` out must not end there, and files made for
        # inference may cut or pad what they encode.
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        vocab = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1  # numbers may have gaps, so not len(vocab)
        self.eod = next(vocab[token] for token in END_OF_DOCUMENT if token in vocab)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint32) for e in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._inner.decode([int(i) for i in ids])

    def __reduce__(self) -> tuple[Any, ...]:
        return FileTokenizer, (self._json,)


def _from_hub(name: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_pretrained(name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
