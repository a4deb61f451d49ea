"""The operations that a path and the experts' linear layers call, and which library runs them here.

    CPU     reference/, plain PyTorch
    GPU     kernels/: Triton, and PyTorch's grouped GEMM of bfloat16; but
            fp8_baseline             TransformerEngine's quantize and permute
            bf16, fp8_direct, fused  cuBLAS's grouped GEMM of bfloat16 where it is new enough
            fp8_direct, fused        DeepGEMM's grouped GEMM of FP8 where it is installed

`Operations` has the signatures; `reference/`, `kernels/` and the modules of `gpu/` fit it, which
mypy checks. The meaning is that of `reference/`. What `fp8_baseline` and `fp8_compact` share is the
same code, so that they differ in layouts alone.
"""

import importlib
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from models.config import PATH_NAMES, PathName
from models.fp8 import reference
from models.fp8.reference.adamw import AdamWStep
from models.fp8.reference.plan_arrivals import Arrivals
from models.fp8.reference.plan_expand import ExpandedArrivals
from models.fp8.reference.plan_rows import RowMap
from models.fp8.tensor import BLOCK, BlockScaledTensor, BlockScaledWeights, Layout

FP8_CAPABILITY = (9, 0)
"""The first GPUs whose tensor cores take FP8 in blocks: Hopper."""

INSTALL = "pip install --no-build-isolation -r requirements-gpu.txt"


class Operations(Protocol):
    """Every operation, one signature each; any module with these functions is an `Operations`.

    Shapes, dtypes and errors are documented in `reference/`.
    """

    @property
    def GEMM_LAYOUT(self) -> Layout:
        """Where a producer of `grouped_gemm`'s x puts its scales."""

    # quantize
    def quantize(self, x: Tensor, layout: Layout) -> BlockScaledTensor: ...

    def quantize_columns(self, x: Tensor, layout: Layout) -> BlockScaledTensor: ...

    def quantize_weights_both_ways(
        self, w: Tensor, dtype: torch.dtype
    ) -> tuple[BlockScaledWeights, BlockScaledWeights]: ...

    def dequantize(self, x: BlockScaledTensor, dtype: torch.dtype) -> Tensor: ...

    # plan_arrivals
    def plan_arrivals(self, expert_ids: Tensor, rank: int, local_experts: int) -> Arrivals: ...

    # plan_expand
    def plan_expand(
        self,
        expert_ids: Tensor,
        rank: int,
        local_experts: int,
        alignment: int = BLOCK,
        max_rows: int | None = None,
        step: int = 1,
    ) -> ExpandedArrivals: ...

    # plan_rows
    def plan_rows(
        self,
        expert_ids: Tensor,
        num_experts: int,
        alignment: int = BLOCK,
        max_rows: int | None = None,
        step: int = 1,
    ) -> RowMap: ...

    # permute
    def permute(self, x: Tensor, row_map: RowMap) -> Tensor: ...

    def permute_scaled(
        self, x: BlockScaledTensor, row_map: RowMap, layout: Layout = Layout.COMPACT
    ) -> BlockScaledTensor: ...

    def permute_probs(self, weights: Tensor, row_map: RowMap) -> Tensor: ...

    def unpermute(self, y: Tensor, row_map: RowMap) -> Tensor: ...

    def unpermute_probs(self, p: Tensor, row_map: RowMap) -> Tensor: ...

    # grouped_gemm: FP8 operands
    def rows_step(self) -> int:
        """P is best a multiple of this many rows for `grouped_gemm`."""

    def grouped_gemm(
        self,
        x: BlockScaledTensor,
        w: BlockScaledWeights,
        offsets: Tensor,
        out_dtype: torch.dtype,
    ) -> Tensor: ...

    def grouped_gemm_wgrad(
        self,
        dy_t: BlockScaledTensor,
        x_t: BlockScaledTensor,
        offsets: Tensor,
        out_dtype: torch.dtype,
    ) -> Tensor: ...

    # grouped_mm: high-precision products
    def grouped_mm(self, x: Tensor, w: Tensor, offsets: Tensor) -> Tensor: ...

    def grouped_mm_wgrad(
        self, dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype
    ) -> Tensor: ...

    def grouped_wgrad(
        self,
        dy: BlockScaledTensor | Tensor,
        x: BlockScaledTensor | Tensor,
        offsets: Tensor,
        dtype: torch.dtype,
    ) -> Tensor: ...

    # swiglu
    def swiglu(self, h: Tensor, probs: Tensor, offsets: Tensor | None = None) -> Tensor: ...

    def swiglu_quantize(
        self, h: Tensor, probs: Tensor, layout: Layout, offsets: Tensor | None = None
    ) -> BlockScaledTensor: ...

    def swiglu_backward(
        self, da: Tensor, h: Tensor, probs: Tensor, offsets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def swiglu_backward_quantize(
        self, da: Tensor, h: Tensor, probs: Tensor, layout: Layout, offsets: Tensor | None = None
    ) -> tuple[Tensor, BlockScaledTensor, Tensor, Tensor]: ...

    # adamw
    def adamw(
        self, w: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: AdamWStep
    ) -> None: ...

    def adamw_cast(
        self,
        w: Tensor,
        grad: Tensor,
        mean: Tensor,
        square: Tensor,
        step: AdamWStep,
        dtype: torch.dtype,
    ) -> Tensor: ...

    def adamw_quantize(
        self,
        w: Tensor,
        grad: Tensor,
        mean: Tensor,
        square: Tensor,
        step: AdamWStep,
        dtype: torch.dtype,
    ) -> tuple[BlockScaledWeights, BlockScaledWeights]: ...


class Chosen(NamedTuple):
    """Operations, and which library runs them, for the user."""

    operations: Operations
    description: str


Variant = Literal["triton", "te_dequantize"]
"""Other operations for a path on a GPU, so that a benchmark can isolate their effect: Triton's
wherever a path uses a library's; TransformerEngine's dequantize."""

VARIANTS: dict[Variant, tuple[PathName, ...]] = {
    "triton": tuple(path for path in PATH_NAMES if path != "fp8_compact"),  # has no others
    "te_dequantize": ("fp8_baseline", "fp8_compact"),
}
"""The paths that have each variant."""


def choose(path: PathName, device: str, variant: Variant | None = None) -> Chosen:
    """The operations of a path on `cpu` or `cuda`; of a path that has the variant, those."""
    if device == "cpu":
        return Chosen(reference, "operations by reference (PyTorch)")
    from models.fp8 import kernels

    triton = "operations by Triton"
    if variant == "te_dequantize":
        from models.fp8.gpu import fp8_baseline_te_dequantize, fp8_compact_te_dequantize

        if path == "fp8_baseline":
            names = "quantize, permute_scaled, dequantize by TransformerEngine"
            return Chosen(fp8_baseline_te_dequantize, f"{triton}, {names}")
        return Chosen(fp8_compact_te_dequantize, f"{triton}, dequantize by TransformerEngine")
    if variant == "triton":
        return Chosen(kernels, triton)
    if path == "fp8_baseline":
        from models.fp8.gpu import fp8_baseline

        return Chosen(fp8_baseline, f"{triton}, quantize and permute_scaled by TransformerEngine")
    if path == "fp8_compact":
        return Chosen(kernels, triton)
    return _choose_gemms(path, kernels, triton)


def _choose_gemms(path: PathName, kernels: Operations, said: str) -> Chosen:
    """For bf16, fp8_direct and fp8_fused: the fastest GEMM of each kind on this machine."""
    from models.fp8 import te, te_grouped

    cublas = te_grouped.is_supported()
    if cublas:
        from models.fp8.gpu import cublas_bf16

        chosen: Operations = cublas_bf16
        said += f", grouped_mm by cuBLAS {te.cublas_version()} through TransformerEngine"
    else:
        chosen = kernels
        said += f", grouped_mm by PyTorch ({te.NEWER_CUBLAS})"
    if path == "bf16":
        return Chosen(chosen, said)
    try:
        from models.fp8.gpu import cublas_bf16_deep_gemm_fp8, deep_gemm_fp8
    except Exception as error:
        state = "not installed" if _is_missing(error, "deep_gemm") else f"broken: {error}"
        return Chosen(chosen, f"{said}; DeepGEMM, which is faster for FP8, is {state}")
    from models.fp8 import deep_gemm

    chosen = cublas_bf16_deep_gemm_fp8 if cublas else deep_gemm_fp8
    return Chosen(chosen, f"{said}, grouped_gemm by {deep_gemm.SAID}")


def why_not(path: PathName, device: str) -> str | None:
    """Why a path cannot run on a device of this machine, in one line; None if it can."""
    if device == "cpu":
        return None
    if path != "bf16" and (reason := why_no_fp8(device)) is not None:
        return f"{reason}; set moe.path=bf16"
    # On a GPU attention and dense layers are TransformerEngine's, whatever the path.
    return _why_not_loaded("triton") or _why_not_loaded("transformer_engine.pytorch")


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
