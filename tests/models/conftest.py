import secrets

import pytest
import torch


@pytest.fixture
def gen():
    """Random inputs, other ones every time; a failure prints the seed."""
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)
