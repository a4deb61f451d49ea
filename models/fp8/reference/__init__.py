"""Every operation in plain PyTorch: the definition of right, and the CPU's implementation.

A path says `ops.quantize(...)`, `ops.permute_scaled(...)`; on a CPU `ops` is this package, on a GPU
another one with the same functions (`models/fp8/operations.py`). One idea per file, under the same
names as in `kernels/`: read them side by side.
"""

from models.fp8.reference.adamw import adamw, adamw_cast, adamw_quantize
from models.fp8.reference.grouped_gemm import (
    GEMM_LAYOUT,
    grouped_gemm,
    grouped_gemm_wgrad,
    rows_step,
)
from models.fp8.reference.grouped_mm import grouped_mm, grouped_mm_wgrad, grouped_wgrad
from models.fp8.reference.permute import (
    permute,
    permute_probs,
    permute_scaled,
    unpermute,
    unpermute_probs,
)
from models.fp8.reference.plan_arrivals import plan_arrivals
from models.fp8.reference.plan_expand import plan_expand
from models.fp8.reference.plan_rows import RowMap, plan_rows
from models.fp8.reference.quantize import (
    dequantize,
    quantize,
    quantize_columns,
    quantize_weights,
    quantize_weights_both_ways,
)
from models.fp8.reference.swiglu import (
    swiglu,
    swiglu_backward,
    swiglu_backward_quantize,
    swiglu_quantize,
)
