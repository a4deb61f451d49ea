"""What can go wrong with data while it is being read, as one line."""

from collections.abc import Iterator
from typing import TypeVar

from datasets.exceptions import DatasetsError
from pyarrow import ArrowException

from train.config import ConfigError
from train.failure import RESUMES, TrainingFailed

Item = TypeVar("Item")

UNREADABLE = (DatasetsError, ArrowException, OSError, ValueError)
"""What `datasets` and the libraries below it raise for a record or a file that they cannot read."""


class Unreadable(ValueError):
    """A file or a record that cannot be read. The text is one line that names it."""


def explained(batches: Iterator[Item], source: str) -> Iterator[Item]:
    """The same batches; where the next one cannot be read, TrainingFailed says why.

    `source` is the data as an error message names it.
    """
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except ConfigError:
            raise
        except UNREADABLE as error:
            raise TrainingFailed(
                f"{source} cannot be read any further: {last_line(error)}; once that is fixed, "
                f"start again, which {RESUMES}"
            ) from error
        yield batch


def last_line(error: BaseException) -> str:
    """What happened; an error in a worker process arrives as its whole traceback."""
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[-1].strip().removeprefix(f"{Unreadable.__module__}.{Unreadable.__name__}: ")
