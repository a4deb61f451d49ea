"""The operations of `models/fp8/reference/` as Triton kernels for Hopper GPUs.

    from models.fp8 import kernels as ops      # what a path calls `ops`

The functions that `Operations` names (`models/fp8/operations.py`), with the meaning of
`reference/`. What differs:

- Operations that only move or quantize have the reference's bits; `swiglu` and the GEMMs are within
  bounds stated in their files.
- The last dimension is a multiple of 128 where there are blocks, and errors say so. GEMM operands
  that are not FP8 are bfloat16.
- Values on the device are not looked at, as that would make the host wait for it: `offsets` are
  trusted. `plan_rows` and `plan_expand` are the ones that wait, one of them once per layer, and say
  how not to.

This is the only part of the project that imports Triton.
"""

from models.fp8.kernels.adamw import adamw, adamw_cast, adamw_quantize
from models.fp8.kernels.grouped_gemm import (
    GEMM_LAYOUT,
    grouped_gemm,
    grouped_gemm_wgrad,
    rows_step,
)
from models.fp8.kernels.grouped_mm import grouped_mm, grouped_mm_wgrad, grouped_wgrad
from models.fp8.kernels.permute import (
    permute,
    permute_probs,
    permute_scaled,
    unpermute,
    unpermute_probs,
)
from models.fp8.kernels.plan_arrivals import plan_arrivals
from models.fp8.kernels.plan_expand import plan_expand
from models.fp8.kernels.plan_rows import plan_rows
from models.fp8.kernels.quantize import (
    dequantize,
    quantize,
    quantize_columns,
    quantize_weights,
    quantize_weights_both_ways,
)
from models.fp8.kernels.swiglu import (
    swiglu,
    swiglu_backward,
    swiglu_backward_quantize,
    swiglu_quantize,
)
from models.fp8.reference.plan_rows import RowMap  # what plan_rows returns is one, with its inverse
