"""The line of the rank that failed first, in a file for the process that waits for the result.

A rank that fails alone cannot tell the others: inside a collective or a kernel of DeepEP they wait
for it until a timeout, and then report that instead of the reason.
"""

from pathlib import Path


def tell(file: Path | None, line: str) -> str:
    """Add this rank's line to the file, and return the first rank's; without a file, its own."""
    if file is None:
        return line
    try:
        with file.open("a", encoding="utf-8", errors="replace") as lines:
            lines.write(f"{line}\n")  # in one piece, whatever the other ranks write
        return read(file) or line
    except OSError:  # nobody waits any longer: the folder is gone
        return line


def read(file: Path) -> str | None:
    """The first rank's line; None while none has failed."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")  # a full disk cuts anywhere
        return text.partition("\n")[0] or None
    except FileNotFoundError:
        return None
