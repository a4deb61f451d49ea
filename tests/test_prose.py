"""Documents, comments, docstrings and messages say things in the words of the field.

A reader in a hurry, whose first language may not be English, knows "resume" and "training run". The
words of `BETTER` look translated: each comes with what to write instead.
"""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PATTERNS = (
    *("*.md", "docs/*.md", "*.txt", "configs/*.yaml", "slurm/*", ".ci/run"),
    *("models/**/*.py", "train/**/*.py", "scripts/**/*.py", "tests/**/*.py"),
    *("scripts/**/*.sh", "scripts/**/*.js", "scripts/**/*.css"),
)
OF_A_RUN = (
    "run|runs|step|steps|loop|process|processes|example|batch|batches|sequence|sequences|document|"
    "documents|thread|token|tokens|job|jobs|loss|losses|benchmark|benchmarks|data|text|speed|order|"
    "script|generator|code|config|part|set|time"
)
BETTER = {
    rf"(?:a|one|another|each|the|this|every) training(?!\s+(?:{OF_A_RUN})\b)": "a run, training",
    r"trainings|trainings?'s": "runs, the run's",
    r"anew": "again, from scratch",
    r"go(?:es)? on|going on|went on": "continue, resume",
    r"(?:is|are|be|was|were) let be|left aside": "left alone, ignored",
    r"let go|let (?:its|their|the) \w+ go": "free, release",
    r"mend(?:s|ed|ing)?": "fix",
    r"arms?": "variant, side",
    r"what travels|travel\w* (?:home|by it|with it)": "is sent",
    r"by (?:itself|themselves)": "automatically, on its own",
    r"(?:its|their|the) makers?(?:'s?)?": "its authors, the vendor",
    r"in the place of": "instead of",
    r"take[sn]? the place of": "replace",
    r"carr(?:y|ies|ied|ying) (?:\w+ )?out": "run, compute",
    r"(?:way|go|goes|going|sent|send|rows|again|at) home": "back, on its own rank",
    r"heed(?:s|ed)?": "honour, apply, ignore",
    r"for ever": "forever",
    r"for want of": "for lack of",
    r"whoever": "the caller, the reader",
    r"(?:comes?|came|coming) of (?:it|them|that)": "the result",
    r"(?:is|are|was|were|be) held against": "compared with",
    r"lay(?:s|ing)? runs|(?:laid|lay) side by side": "compare",
    r"(?<!there\x20)(?:is|are|was|were) no(?! (?:longer|more|less|other))": "is not a",
    r"all the same": "anyway, still",
    r"anyhow": "anyway",
    r"but for": "except for",
    r"seldom": "rarely",
    r"would do(?=\W)(?!\s+(?:so|it|this|that))": "would work",
    r"in silence": "silently",
    r"in the mean(?!\s*time)": "on average",
    r"be had": "be available, be read",
    r"cannot be meant": "makes no sense",
    r"fullest": "most loaded, peak",
    r"makes? room": "free space",
    r"at work in": "running in, using",
    r"so many(?! that)": "this many",
    r"from begin to|(?:its|the|their) begin": "start, beginning",
    r"the matter": "wrong",
    r"(?:round|rout|shuffl|draw)\w* otherwise": "differently",
    r"such a one": "such a rank, it",
    r"said in one line": "reported in one line",
}
"""What looks translated, as a regular expression, and what to write instead."""

ALLOWED = {
    ("scripts/bench/tables/comparison.py", "arm"): "a key of compare.json",
    ("scripts/compare/__main__.py", "arm"): "a key of compare.json",
    ("scripts/compare/arms.py", "arm"): "the class that is being defined",
    ("tests/compare/test_compare.py", "arm"): "a key of compare.json",
}
"""Where a word of the list is right, by file and word, and why."""


CODE = "\0"


class Found(NamedTuple):
    path: str
    line: int
    word: str
    better: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.word!r}: write {self.better}"


def prose(path: Path, text: str) -> str:
    """What a reader reads of a file, each character at its own place.

    Of Python that is comments and strings, docstrings among them, without the expressions in
    f-strings: code becomes a character that no word has, quotes and `#` become spaces. Of other
    files it is everything but the marks of comments.
    """
    if path.suffix != ".py":
        return re.sub(r"(?m)^\s*(?:#+|//|\*)(?= )", lambda match: _blank(match[0]), text)
    lines = text.split("\n")
    kept = [list(re.sub(r"\S", CODE, line)) for line in lines]
    middle, *quotes = (  # Python 3.11 has none
        getattr(tokenize, f"FSTRING_{part}", None) for part in ("MIDDLE", "START", "END")
    )
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.STRING, middle, *quotes):
            continue
        string = token.string
        if token.type in quotes:
            string = _blank(string)
        elif token.type == tokenize.COMMENT:
            string = re.sub(r"^#+", lambda match: _blank(match[0]), string)
        elif token.type == tokenize.STRING:
            head = re.match(r"(?i)[rbfu]*(\"{3}|'{3}|\"|')", string)
            assert head is not None
            if "f" in head[0].lower():  # one token of Python 3.11, several of a newer one
                string = re.sub(r"\{[^{}]*\}", lambda match: CODE * len(match[0]), string)
            end = len(string) - len(head[1])
            string = " " * len(head[0]) + string[len(head[0]) : end] + " " * len(head[1])
        row, column = token.start
        for number, part in enumerate(string.split("\n")):
            start = column if number == 0 else 0
            kept[row - 1 + number][start : start + len(part)] = part
    return "\n".join("".join(line) for line in kept)


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def find(path: Path, text: str) -> Iterator[Found]:
    """Every word of the list, also where a line breaks within it."""
    read = prose(path, text)
    for word, better in BETTER.items():
        spaced = word.replace(" ", r"\s+")
        pattern = re.compile(rf"\b(?:{spaced})\b", re.IGNORECASE)
        for match in pattern.finditer(read):
            here = " ".join(match[0].split())
            if (str(path), here.lower()) not in ALLOWED:
                yield Found(str(path), read.count("\n", 0, match.start()) + 1, here, better)


def texts() -> Iterator[Path]:
    """The files to read, from the root."""
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            if path != Path(__file__):
                yield path.relative_to(ROOT)


def test_words_of_the_field():
    found = [one for path in texts() for one in find(path, (ROOT / path).read_text("utf-8"))]
    assert not found, "\n" + "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.md", "A training\ngoes on\nfrom there.", ["A training", "goes on"]),
        ("a.md", "a training run resumes; tokens travel; what travels", ["what travels"]),
        ("a.sh", "# in the\n# place of this\nfor arm in x; do", ["in the place of", "arm"]),
        ("a.py", 'def go(arm):  # begins anew\n    """Is let\n    be."""', ["anew", "Is let be"]),
        ("a.py", 'x = "it goes "\\\n    f"{arm} on and goes "\n    "on"', ["goes on"]),
        ("a.py", 'for arm in ("goes", "on"):\n    mend = arm.travels', []),
        ("a.py", "f'{arm} is no {file}' + 'there is no file, and no more'", ["is no"]),
        ("a.py", "'it is no longer so; that would do' # would do so", ["would do"]),
    ],
)
def test_what_is_found(name, text, words):
    assert sorted(one.word for one in find(Path(name), text)) == sorted(words)


def test_it_names_the_place_and_a_better_word():
    (found,) = find(Path("a.md"), "One line.\nAnother starts\nanew.\n")
    assert str(found) == "a.md:3: 'anew': write again, from scratch"


def test_a_word_is_allowed_in_one_file_only():
    (path, word), _ = next(iter(ALLOWED.items()))
    assert not list(find(Path(path), f'"{word}"'))
    assert [one.word for one in find(Path("a.py"), f'"{word}"')] == [word]


def test_every_kind_of_text_is_read():
    read = set(map(str, texts()))
    for path in ("README.md", "docs/data.md", "requirements.txt", "configs/demo_cpu.yaml"):
        assert path in read
    for path in ("slurm/train.sbatch", "scripts/demo.sh", "train/loop.py", "tests/conftest.py"):
        assert path in read
