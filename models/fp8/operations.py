"""Who carries out the operations that paths name: settled once, when the model is built.

    CPU             reference.py, plain PyTorch
    GPU             bf16            Triton, and PyTorch's grouped GEMM
                    fp8_baseline    TransformerEngine's quantize, permute and GEMMs
                    fp8_compact     Triton's quantize and permute, which write COMPACT scales;
                                    TransformerEngine's dequantize and GEMMs, as the baseline's
                    fp8_direct      Triton; DeepGEMM's grouped GEMM where it is installed

All have the names and the meaning of `reference.py`. What `fp8_baseline` and `fp8_compact` share
is the same code, so that they differ in layouts alone.
"""

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch

from models.config import PathName
from models.fp8 import reference

FP8_CAPABILITY = (9, 0)
"""The first GPUs whose tensor cores take FP8 in blocks: Hopper."""

INSTALL = "pip install --no-build-isolation -r requirements-gpu.txt"

# Operations that fp8_baseline and fp8_compact take from TransformerEngine, above Triton's.
FROM_TE = {
    "fp8_baseline": ("quantize", "dequantize", "permute_scaled", "Fp8Linear"),
    "fp8_compact": ("dequantize", "Fp8Linear"),
}


def choose(path: PathName, device: str, deep_gemm: bool = True) -> Any:
    """The operations of a path on `cpu` or `cuda`, and a `description` of them for the user.

    Without `deep_gemm` DeepGEMM is left alone.
    """
    if device == "cpu":
        return _namespace(reference, "operations by reference (PyTorch)")
    triton = importlib.import_module("models.fp8.kernels")
    operations = _namespace(triton, "operations by Triton")
    if path in FROM_TE:
        te = importlib.import_module("models.fp8.te")
        for name in FROM_TE[path]:
            setattr(operations, name, getattr(te, name))
        operations.description += f", {', '.join(FROM_TE[path])} by TransformerEngine"
    if path == "fp8_direct" and deep_gemm:
        try:
            faster = importlib.import_module("models.fp8.deep_gemm")
        except Exception as error:
            state = "not installed" if _is_missing(error, "deep_gemm") else f"broken: {error}"
            operations.description += f" (DeepGEMM, which is faster, is {state})"
        else:
            operations.grouped_gemm = faster.grouped_gemm
            operations.GEMM_LAYOUT = faster.GEMM_LAYOUT
            operations.description += ", grouped_gemm by DeepGEMM"
    return operations


def why_not(path: PathName, device: str) -> str | None:
    """Why a path cannot run on a device of this machine, in one line; None if it can."""
    if device == "cpu":
        return None
    if path != "bf16" and (reason := why_no_fp8(device)) is not None:
        return f"{reason}; set moe.path=bf16"
    # Attention and dense layers are TransformerEngine's on a GPU, whatever the path.
    return _why_not_loaded("triton") or _why_not_loaded("transformer_engine.pytorch")


def why_te_is_broken() -> str | None:
    """Why TransformerEngine does not load, in one line; None if it does, or is not installed.

    To ask before megatron-core is imported, which imports it on any machine where it finds it.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    return _why_not_loaded("transformer_engine")


def _why_not_loaded(package: str) -> str | None:
    try:
        importlib.import_module(package)
    except Exception as error:  # a package for another CUDA fails in its own ways
        text = " ".join(str(error).split())
        state = "is missing" if _is_missing(error, package) else f"does not load ({text})"
        return f"{package.partition('.')[0]} {state}; {INSTALL}"
    return None


def why_no_fp8(device: str) -> str | None:
    """Why a device of this machine has no FP8 tensor cores, in one line; None if it has."""
    if device == "cpu":
        return "a CPU has no FP8 arithmetic"
    capability = torch.cuda.get_device_capability()
    if capability < FP8_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name()} has compute capability "
            f"{'.'.join(map(str, capability))}, and FP8 in blocks needs 9.0 (Hopper)"
        )
    return None


def _is_missing(error: Exception, package: str) -> bool:
    return isinstance(error, ModuleNotFoundError) and package.startswith(str(error.name))


def _namespace(module: Any, description: str) -> SimpleNamespace:
    names = {name: getattr(module, name) for name in module.__all__}
    return SimpleNamespace(**names, description=description)
