"""A tokenizer, also that of bytes, as the files that Hugging Face's `transformers` loads."""

import json

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from train.data.tokenizer import END_OF_DOCUMENT, FILE, SETTINGS, FileTokenizer, Tokenizer


def files_of(tokenizer: Tokenizer, seq_len: int) -> dict[str, str]:
    """Texts by file name; they give the same numbers as `tokenizer`.

    What they encode begins with the end of a document, as every document did in training; that is
    left out with `add_special_tokens=False`.
    """
    is_bytes = not isinstance(tokenizer, FileTokenizer)
    if isinstance(tokenizer, FileTokenizer):
        text, eod = tokenizer.__reduce__()[1]
    else:
        text, eod = _bytes(tokenizer.eod), END_OF_DOCUMENT[0]
    file = json.loads(text)
    # Files made for inference may cut or pad, and put other tokens around a text than training did.
    file |= {"truncation": None, "padding": None}
    file["post_processor"] = _begins_with(eod, tokenizer.eod)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eod,
        "eos_token": eod,
        "pad_token": eod,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        # Bytes are bytes, those that spell the end of a document too. In another tokenizer's text
        # its special tokens are meant, as in a chat.
        "split_special_tokens": is_bytes,
    }
    return {
        FILE: json.dumps(file, ensure_ascii=False, indent=1) + "\n",
        SETTINGS[0]: json.dumps(settings, indent=2) + "\n",
    }


def generation_config(tokenizer: Tokenizer, vocab_size: int) -> dict[str, object]:
    """What `generate` begins with, ends at, and never says: rows of the embedding that no token of
    the tokenizer has."""
    unused = list(range(tokenizer.vocab_size, vocab_size))
    return {
        "bos_token_id": tokenizer.eod,
        "eos_token_id": tokenizer.eod,
        "pad_token_id": tokenizer.eod,
        **({"suppress_tokens": unused} if unused else {}),
    }


def _begins_with(token: str, number: int) -> dict[str, object]:
    """A post-processor of the `tokenizers` library."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, first, other],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _bytes(eod: int) -> str:
    """A file of the `tokenizers` library whose tokens 0 to 255 are the bytes of UTF-8."""
    # The library stands a character for each byte: printable ones for themselves, the others,
    # in order, the characters from 256 on.
    printable = {*range(ord("!"), 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable}
    vocab |= {chr(256 + place): byte for place, byte in enumerate(others)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_DOCUMENT[0], normalized=False, special=True)])
    assert tokenizer.token_to_id(END_OF_DOCUMENT[0]) == eod
    return tokenizer.to_str()
