"""The training loop and all that it needs.

What megatron-core says while it is imported, and of its GPTModel (see `models/gpt.py`), is left
out here, or every rank would repeat it. This file is loaded before any other of the package, and
itself imports nothing that takes time.
"""

import logging
import warnings

logging.getLogger("megatron").setLevel(logging.ERROR)
# It imports this from PyTorch, which misses the GPU wherever CUDA's compiler is without one.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="megatron")
warnings.filterwarnings("ignore", message=".*Apex.*")
