"""Text to token numbers and back: bytes, or any file of the `tokenizers` library.

    tokenizer = load_tokenizer("bytes")          # or "tokenizer.json", a folder, a name on the hub
    ids = tokenizer.encode(["a document"])[0]

Encoding adds nothing: the end-of-document token `eod` is put between documents by `packed.py`
and `batches.py`.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from train.config import ConfigError
from train.data.cache import about_the_cache
from train.data.pieces import cut

END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
"""Names under which tokenizers hold their end-of-document token; the first one found is taken,
where neither `data.eod_token` nor the tokenizer's own config names one."""

FILE = "tokenizer.json"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""What a folder or a tokenizer on the hub holds; the settings may name the `eos_token`."""

TOGETHER = 1 << 20
"""Characters that the library is given at once, in pieces that it encodes in parallel."""


class Tokenizer(Protocol):
    """What the data code needs of a tokenizer."""

    vocab_size: int
    """One more than the largest token number."""
    eod: int
    """The token that ends every document and that no text encodes to."""
    digest: str
    """Two tokenizers with the same one encode alike; packed data is found by it."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Integer array [tokens] for each text, without `eod`.

        Raises ConfigError for a text that the tokenizer has no tokens for.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the tokens; `eod` is left out and invalid text replaced."""
        ...

    def count_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Bytes of UTF-8 that the tokens stand for; `eod` stands for none.

        Off by a few where the tokens begin or end within a character.
        """
        ...


def load_tokenizer(name: str, eod_token: str | None = None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: `bytes`, a JSON file, a folder, a name on the hub.

    It ends documents with `eod_token`, or with what its own settings call `eos_token`, or with one
    of END_OF_DOCUMENT. Raises ConfigError where there is no such tokenizer or token.
    """
    if name == "bytes":
        if eod_token is not None:
            raise ConfigError(
                f"data.eod_token={eod_token} is set and data.tokenizer=bytes has an end of its "
                "own; leave it out"
            )
        return ByteTokenizer()
    try:
        path, settings = _local(name) if is_local(name) else _from_hub(name)
    except OSError as error:  # a folder of somebody else
        raise ConfigError(f"data.tokenizer={name}: {error.strerror}") from None
    try:
        text = path.read_text(encoding="utf-8")
        inner = tokenizers.Tokenizer.from_str(text)
    except OSError as error:
        raise ConfigError(f"data.tokenizer={name}: {path}: {error.strerror}") from None
    except Exception as error:  # the Rust library raises nothing narrower
        raise ConfigError(
            f"data.tokenizer={name}: {path} is not a file of the tokenizers library "
            f"({_one_line(error)})"
        ) from None
    return FileTokenizer(text, _end_of_document(name, inner, eod_token, settings))


def is_local(name: str) -> bool:
    """Whether `data.tokenizer` names a file or a folder, rather than `bytes` or one on the hub.

    A hub's name is `name` or `user/name`; whatever else looks like a path is one.
    """
    looks_like_path = (
        name.lower().endswith(".json")
        or name.startswith((".", "~", os.sep))
        or name.endswith(os.sep)
        or name.count("/") > 1
    )
    return name != "bytes" and (looks_like_path or os.path.exists(name))


class ByteTokenizer:
    """Tokens 0 to 255 are the bytes of UTF-8; token 256 ends a document."""

    vocab_size = 257
    eod = 256
    digest = "bytes"

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", "replace")

    def count_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        return int((np.asarray(ids) < 256).sum())


class FileTokenizer:
    """A tokenizer of the `tokenizers` library, from the text of its JSON file.

    `eod_token` is one of its tokens. It pickles to the same bytes every time.
    """

    def __init__(self, text: str, eod_token: str) -> None:
        self._text, self._eod_token = text, eod_token
        self._inner = tokenizers.Tokenizer.from_str(text)
        # A document that spells `<|endoftext|>` out must not end there, and files made for
        # inference may cut or pad what they encode.
        self._inner.encode_special_tokens = True
        self._inner.no_truncation()
        self._inner.no_padding()
        vocab = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1  # not len(vocab): numbers may have gaps
        self.eod = vocab[eod_token]
        # Of the file's content, not of its formatting or of what this version would write.
        same = json.dumps([json.loads(text), eod_token], sort_keys=True)
        self.digest = hashlib.blake2b(same.encode(), digest_size=16).hexdigest()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        found: list[list[np.ndarray]] = [[] for _ in texts]
        for batch in _batches(texts):
            for (text, _), ids in zip(batch, self._encode([p for _, p in batch]), strict=True):
                found[text].append(ids)
        return [np.concatenate(ids) if ids else np.empty(0, np.uint32) for ids in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._inner.decode([int(i) for i in ids])

    def count_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        return len(self.decode(ids).encode("utf-8", "replace"))

    def _encode(self, pieces: list[str]) -> list[np.ndarray]:
        try:
            encoded = self._inner.encode_batch_fast(pieces, add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust library is not an Exception
            if len(pieces) > 1:  # find the one
                return [ids for piece in pieces for ids in self._encode([piece])]
            begin = pieces[0][:60] if isinstance(pieces[0], str) else pieces[0]
            raise ConfigError(
                f"data.tokenizer cannot encode the text that begins {begin!r}: "
                f"{_one_line(error)}; take one that has a token for unknown text, or a "
                "byte-level one"
            ) from None
        return [np.array(e.ids, dtype=np.uint32) for e in encoded]

    def __reduce__(self) -> tuple[Any, ...]:
        return FileTokenizer, (self._text, self._eod_token)


def _batches(texts: list[str]) -> Iterator[list[tuple[int, str]]]:
    """Pieces with the number of their text, about TOGETHER characters at a time."""
    batch: list[tuple[int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        for piece in cut(text):
            batch.append((number, piece))
            size += len(piece)
            if size >= TOGETHER:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _end_of_document(
    name: str, inner: tokenizers.Tokenizer, eod_token: str | None, settings: list[Path]
) -> str:
    if eod_token is not None:
        if inner.token_to_id(eod_token) is None:
            near = difflib.get_close_matches(eod_token, inner.get_vocab(), n=1)
            hint = f"did you mean {near[0]}?" if near else _special_tokens(inner)
            raise ConfigError(
                f"data.eod_token={eod_token} is not a token of data.tokenizer={name}; {hint}"
            )
        return eod_token
    for token in (*filter(None, map(_eos_token, settings)), *END_OF_DOCUMENT):
        if inner.token_to_id(token) is not None:
            return token
    raise ConfigError(
        f"data.tokenizer={name} has no end-of-document token of a usual name; set data.eod_token "
        f"to one of its tokens; {_special_tokens(inner)}"
    )


def _special_tokens(inner: tokenizers.Tokenizer) -> str:
    added = [token.content for _, token in sorted(inner.get_added_tokens_decoder().items())]
    if not added:
        return "it has no special tokens, so add one to the file"
    more = f" and {len(added) - 10} more" if len(added) > 10 else ""
    return f"its special tokens: {', '.join(added[:10])}{more}"


def _eos_token(settings: Path) -> str | None:
    """What a settings file calls `eos_token`: a text, or an object with the text in it."""
    try:
        token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _local(name: str) -> tuple[Path, list[Path]]:
    """The tokenizer's file and its settings. Those beside a file of another name are not its."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / FILE).is_file():
            raise ConfigError(
                f"data.tokenizer={name}: this folder has no {FILE}; save_pretrained of a fast "
                "tokenizer of the transformers library writes one"
            )
        path = path / FILE
    if not path.is_file():
        raise ConfigError(
            f"data.tokenizer={name}: no such file; train one with "
            "python -m scripts.train_tokenizer, or set data.tokenizer=bytes"
        )
    return path, [path.parent / one for one in SETTINGS] if path.name == FILE else []


def _from_hub(name: str) -> tuple[Path, list[Path]]:
    # Imported here, as it takes a second that a local tokenizer need not wait for.
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(name, FILE))
    except Exception as error:  # of many kinds: of the name, the network, the disk
        raise ConfigError(
            f"data.tokenizer={name}: no such file or folder here, and not available from the hub "
            f"({_one_line(error)}){about_the_cache(error)}"
        ) from None
    settings = []
    for one in SETTINGS:
        try:
            settings.append(Path(hf_hub_download(name, one)))
        except Exception:  # it may well have none
            continue
    return path, settings


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
