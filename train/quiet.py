"""Keeps imports quiet that chatter: each rank would say it."""

import logging
import warnings


def hush_imports() -> None:
    """To call before megatron-core is imported."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", message=".*Apex.*")
