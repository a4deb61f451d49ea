"""The training loop and all that it needs.

It silences what megatron-core prints while it is imported, and about its GPTModel (see
`models/gpt.py`), as every rank would repeat it; and a broken package is a missing one. This file is
loaded before any other of the package and imports nothing that takes time.
"""

import logging
import warnings

from train.safety import packages

packages.guard()

logging.getLogger("megatron").setLevel(logging.ERROR)
# It imports this from PyTorch, which misses the GPU wherever CUDA's compiler is without one.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="megatron")
warnings.filterwarnings("ignore", message=".*Apex.*")
