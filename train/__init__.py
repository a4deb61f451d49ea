"""The training loop and all that it needs.

What megatron-core says while it is imported is left out here, or every rank would repeat it. This
file is loaded before any other of the package, and itself imports nothing that takes time.
"""

import logging
import warnings

logging.getLogger("megatron").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="megatron")
warnings.filterwarnings("ignore", message=".*Apex.*")
