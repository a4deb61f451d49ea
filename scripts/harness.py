"""Tasks of EleutherAI's lm_eval on a trained model, through lm_eval's own class for transformers.

A model that is not in Hugging Face's layout is exported first, so the exported model is what is
evaluated.
"""

import difflib
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from scripts import export
from scripts.trained import Trained
from train.config import ConfigError


def check(tasks: list[str]) -> Any:
    """lm_eval's list of tasks, which takes seconds to read.

    tasks: names, patterns or files of tasks. Raises ConfigError for one that is not there, and
    where lm_eval is not installed, with how to get it, or is broken.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('--tasks needs lm_eval, which is missing; pip install "lm_eval[hf]"')
    try:
        known = importlib.import_module("lm_eval.tasks").TaskManager()
    except Exception as error:  # of many kinds: it imports much
        raise ConfigError(
            f"--tasks needs lm_eval, which cannot be imported: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    for task in tasks:
        if not Path(task).exists() and not known.match_tasks([task]):
            close = difflib.get_close_matches(task, known.all_tasks)
            like = f"; like it: {', '.join(close)}" if close else ""
            raise ConfigError(f"--tasks {task}: lm_eval has no such task{like}")
    return known


def check_fits(found: Trained) -> None:
    """Raises ConfigError where no class of transformers fits, or there is no tokenizer."""
    if found.weights is not None:
        export.check_fits_hf(found.config)
        found.fitting_tokenizer()


def evaluate(
    found: Trained, tasks: list[str], known: Any, device: str, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """The figures of each task by their names, such as `acc`. `known` is what `check` returned.
    Raises ConfigError."""
    import lm_eval

    with nullcontext(found.path) if found.weights is None else _exported(found) as folder:
        try:
            results = lm_eval.simple_evaluate(
                model="hf",
                model_args={
                    "pretrained": str(folder),
                    "dtype": "bfloat16" if device == "cuda" else "float32",
                },
                tasks=tasks,
                task_manager=known,
                device=device,
                batch_size="auto" if device == "cuda" else 1,
                limit=limit,
            )
        except Exception as error:  # of many kinds: no network, no memory
            raise ConfigError(
                f"--tasks {','.join(tasks)}: lm_eval: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from None
    return {task: _figures(row) for task, row in results["results"].items()}


@contextmanager
def _exported(found: Trained) -> Iterator[Path]:
    """A folder for transformers, which exists inside the `with`."""
    assert found.weights is not None
    with tempfile.TemporaryDirectory(prefix="evaluate-") as parent:
        folder = Path(parent) / "hf"
        export.write_hf(folder, found.weights, found.config, "float32", found.fitting_tokenizer())
        yield folder


def _figures(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of `{"acc,none": 0.3, "alias": "x"}`; a filter called none is not named."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in row.items()
        if "," in name and isinstance(value, int | float)  # the number of examples has none
    }


def lines(tasks: dict[str, dict[str, float]]) -> Iterator[tuple[str, str]]:
    """For the terminal: a task, and its figures with their standard errors."""
    for task, figures in tasks.items():
        said = []
        for name, value in figures.items():
            if "_stderr" in name:
                continue
            head, comma, rest = name.partition(",")
            error = figures.get(f"{head}_stderr{comma}{rest}")
            said.append(f"{name} {value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        yield task, ", ".join(said)
