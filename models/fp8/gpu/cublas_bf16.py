"""Triton's operations, with cuBLAS's bfloat16 GEMMs, where cuBLAS is new enough."""

from models.fp8 import te_grouped
from models.fp8.kernels import *

grouped_mm = te_grouped.grouped_mm
grouped_mm_wgrad = te_grouped.grouped_mm_wgrad
grouped_wgrad = te_grouped.grouped_wgrad
