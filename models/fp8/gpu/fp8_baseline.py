"""What fp8_baseline calls on a GPU: stock TransformerEngine wherever it makes or moves a scale."""

from models.fp8 import te
from models.fp8.kernels import *

quantize = te.quantize
permute_scaled = te.permute_scaled
