"""Triton's operations, with cuBLAS's bfloat16 and DeepGEMM's FP8 GEMMs."""

from models.fp8 import deep_gemm
from models.fp8.gpu.cublas_bf16 import *

GEMM_LAYOUT = deep_gemm.GEMM_LAYOUT
grouped_gemm = deep_gemm.grouped_gemm
rows_step = deep_gemm.rows_step
