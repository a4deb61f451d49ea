"""Long texts in pieces, cut where tokenizers split them too: before the end of a line.

A byte-level tokenizer looks at a run of white space together with what follows it, so a cut before
the run changes no token. Other tokenizers may give a token more or less there.
"""

from collections.abc import Iterator

PIECE = 1 << 17
"""Characters. The `tokenizers` library takes about 100 bytes of memory for each that it encodes."""


def cut(text: str, size: int = PIECE) -> Iterator[str]:
    """Pieces of at most `size` characters, which joined are the text."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = last_cut(text, start, end)
        yield text[start:end]
        start = end


def last_cut(text: str, start: int, end: int) -> int:
    """The last place to cut between `start` and `end`; where no line ends, that is `end`."""
    place = text.rfind("\n", start + 1, end)
    while place > start and text[place - 1].isspace():
        place = text.rfind("\n", start + 1, place)
    return place if place > start else end
