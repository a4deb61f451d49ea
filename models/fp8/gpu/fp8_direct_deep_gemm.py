"""What fp8_direct calls on a GPU where DeepGEMM is installed, which is faster."""

from models.fp8 import deep_gemm
from models.fp8.kernels import *

GEMM_LAYOUT = deep_gemm.GEMM_LAYOUT
grouped_gemm = deep_gemm.grouped_gemm
