import os

# Before torch is imported: the tests fork, and threads do not survive that.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tqdm import tqdm

torch.set_num_threads(1)
tqdm.monitor_interval = 0

LONG = ("test_slurm.py", "test_faults.py")
"""Files that take minutes, most of them waiting: begun first, they do not come last."""

LEAVE_THREADS = (
    "test_dashboard.py",
    "test_page.py",
    "test_sync.py",
    "test_tracking.py",
)
"""Files after which threads of W&B, V8 or asyncio live on in this process: nothing forks then."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with the reason, where there is none that can run them."""
    order = {name: place for place, name in enumerate((*LONG, None, *LEAVE_THREADS))}
    items.sort(key=lambda item: order.get(item.path.name, order[None]))
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        reason = f"the GPU's compute capability is {capability}, FP8 needs (9, 0)"
        usable = capability >= (9, 0)
    else:
        reason, usable = "no GPU", False
    for item in items:
        if "gpu" in item.keywords and not usable:
            item.add_marker(pytest.mark.skip(reason=reason))
