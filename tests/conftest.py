import gc
import os
import threading
from pathlib import Path

# Before torch is imported: the tests fork, and threads do not survive that.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Or `datasets` tells a server of every local file that it loads, from each rank of each run.
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

import pytest
import torch
from tqdm import tqdm

torch.set_num_threads(1)
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())  # its own is shared with forks: one killed may leave it locked
gc.disable()  # until all is collected: Python looks for cycles among the imports for a second

LONG = ("train/test_train.py", "test_slurm.py", "train/test_faults.py")
"""Files that take minutes, begun first: the first computes while the others wait."""

SLOW = (
    "test_evaluate.py",
    "test_export.py",
    "test_export_hf.py",
    "test_start.py",
    "test_sync.py",
    "compare/test_page.py",
    "models/test_interfaces.py",
    "train/test_artifacts.py",
    "train/test_bf16_states.py",
    "train/test_checkpoint.py",
    "train/test_dropless.py",
    "train/test_expert_bias.py",
    "train/test_faults.py",
    "train/test_init_from.py",
    "train/test_lifeline.py",
    "train/test_nonfinite.py",
    "train/test_output.py",
    "train/test_resume.py",
    "train/test_saving.py",
    "train/test_signals.py",
    "train/test_train.py",
)
"""Files most of whose tests start runs or processes of their own: all of them are slow."""

LEAVE_THREADS = (
    "compare/test_dashboard.py",
    "compare/test_page.py",
    "test_sync.py",
    "train/test_tracking.py",
    "models/test_kernels_rows_in_use.py",
    "models/test_no_wait.py",
)
"""Files after which threads of W&B, V8, asyncio or gloo live on in this process: nothing forks
then."""


OF_A_COMMAND = ("PYTORCH_ALLOC_CONF", "RAYON_NUM_THREADS")
"""Variables that a command sets for its process, which here runs other tests too."""


@pytest.fixture(autouse=True)
def variables():
    before = {name: os.environ.get(name) for name in OF_A_COMMAND}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_unconfigure() -> None:
    """Freeze objects, or Python at exit looks for cycles in all that was imported: two seconds."""
    gc.freeze()


def name_of(item: pytest.Item) -> str:
    """Its file, as the lists above name it."""
    return item.path.relative_to(Path(__file__).parent).as_posix()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with the reason, where there is none that can run them."""
    for item in items:
        if name_of(item) in SLOW:
            item.add_marker(pytest.mark.slow)
    order = {name: place for place, name in enumerate((*LONG, None, *LEAVE_THREADS))}
    items.sort(key=lambda item: order.get(name_of(item), order[None]))
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        reason = f"the GPU's compute capability is {capability}, FP8 needs (9, 0)"
        usable = capability >= (9, 0)
    else:
        reason, usable = "no GPU", False
    for item in items:
        if "gpu" in item.keywords and not usable:
            item.add_marker(pytest.mark.skip(reason=reason))
