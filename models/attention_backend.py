"""Which attention TransformerEngine uses on a GPU: `model.attention_backend`.

It chooses among those that environment variables leave on. megatron-core sets these from its own
config when a model is built, and refuses other values.
"""

import os
from importlib.metadata import PackageNotFoundError, version

from models.config import AttentionBackend

FLASH_PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4")
SWITCHES: dict[str, dict[str, str]] = {
    name: dict(zip(("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"), on, strict=True))
    for name, on in (("auto", "111"), ("flash", "100"), ("fused", "010"))
}
"""What megatron-core sets."""


def why_not(backend: AttentionBackend, device: str) -> str | None:
    """Why it is not available on `cpu` or `cuda` here, in one line; None if it is."""
    key = f"model.attention_backend={backend}"
    if device == "cpu" and backend != "auto":
        return f"{key} is for GPUs; a CPU has PyTorch's attention alone: leave it at auto"
    for switch, wanted in SWITCHES[backend].items():
        if (found := os.environ.get(switch, wanted)) != wanted:
            return (
                f"{switch}={found} is in the environment, where {key} needs {wanted}; unset it, "
                "and choose by model.attention_backend"
            )
    if backend == "flash" and not any(_has(package) for package in FLASH_PACKAGES):
        return f"{key} needs one of {', '.join(FLASH_PACKAGES)}, and none is installed"
    return None


def _has(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
