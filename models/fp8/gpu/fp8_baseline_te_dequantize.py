"""fp8_baseline with TransformerEngine's dequantize, to compare with ours."""

from models.fp8 import te
from models.fp8.gpu.fp8_baseline import *

dequantize = te.dequantize
