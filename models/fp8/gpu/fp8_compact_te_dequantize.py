"""fp8_compact with TransformerEngine's dequantize, for a benchmark; see the baseline's."""

from models.fp8 import te
from models.fp8.kernels import *

dequantize = te.dequantize
