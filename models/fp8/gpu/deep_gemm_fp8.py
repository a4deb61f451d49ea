"""Triton's operations, with DeepGEMM's FP8 GEMMs, where DeepGEMM is installed."""

from models.fp8 import deep_gemm
from models.fp8.kernels import *

GEMM_LAYOUT = deep_gemm.GEMM_LAYOUT
grouped_gemm = deep_gemm.grouped_gemm
rows_step = deep_gemm.rows_step
