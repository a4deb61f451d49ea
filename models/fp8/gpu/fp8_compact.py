"""What fp8_compact calls on a GPU: as fp8_baseline, but Triton writes and permutes COMPACT scales.

TransformerEngine's quantize stopped writing them with version 2.12.
"""

from models.fp8 import te
from models.fp8.kernels import *

dequantize = te.dequantize
