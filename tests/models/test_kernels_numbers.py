"""Where the kernel tests run, and that numbers are converted there as the kernels rely on.

On a GPU, marked `gpu`. Without one, in Triton's interpreter, if asked for:

    TRITON_INTERPRET=1 python -m pytest -k kernels

The interpreter runs the kernels' own code, so it checks every index and mask, but its conversions
between floating-point types are not those of the hardware: to bfloat16 it truncates, to E4M3 it
does not round to even, does not saturate, and gets subnormals and NaN wrong. `set_up` puts
PyTorch's conversions in their place. What the hardware's conversions do is tested on the GPU.
"""

import os
import secrets

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from models.fp8.kernels.blocks import reciprocal, scale_from_amax, to_e4m3
from models.fp8.reference.quantize import _scale_from_amax, _to_e4m3
from models.fp8.tensor import E4M3

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICES = [
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not INTERPRETED, reason="set TRITON_INTERPRET=1 to run the kernels without a GPU"
        ),
    ),
]

TYPES = {
    tl.float32: torch.float32,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float8e4nv: E4M3,
}


def set_up(monkeypatch, device):
    """What every kernel test needs: memory that shows what was not written, exact conversions."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        """`torch.empty`, full of NaN, or of a number that no test expects."""
        t = empty(*args, **kwargs)
        if t.dtype is E4M3:
            t.view(torch.uint8).fill_(0xFF)
        else:
            t.fill_(torch.nan if t.is_floating_point() else 77)
        return t

    monkeypatch.setattr(torch, "empty", poisoned)
    if device == "cpu":
        monkeypatch.setattr(interpreter, "_convert_float", convert)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        # Bounds of loops: from NumPy 2.4 on, int() no longer takes an array of one element.
        patch_tensor = interpreter._patch_lang_tensor

        def patch(tensor, scope):
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


def generator():
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_bits(got, expected):
    """Tensors, or FP8 block tensors; NaN equals NaN, as its payload is not guaranteed."""
    if not isinstance(got, torch.Tensor):
        assert getattr(got, "layout", None) is getattr(expected, "layout", None)
        assert torch.equal(bits(got.data), bits(expected.data))
        assert torch.equal(bits(got.scale_inv), bits(expected.scale_inv))
        return
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    same = bits(got) == bits(expected)
    if got.is_floating_point() and got.dtype is not E4M3:
        same |= got.isnan() & expected.isnan()
    assert same.all(), f"{(~same).sum()} of {same.numel()} differ"


def convert(array, source, target, rounding):
    """`interpreter._convert_float`, exactly."""
    x = torch.from_numpy(np.array(array)).view(TYPES[source])
    out = _to_e4m3(x.float()) if target is tl.float8e4nv else x.to(TYPES[target])
    return bits(out).numpy().view(f"uint{target.primitive_bitwidth}")


def dot(self, a, b, acc, *_):
    """`tl.dot` on the values, summed in float32; the interpreter multiplies bfloat16's bits."""
    a, b = (convert(t.data, t.dtype.scalar, tl.float32, None).view(np.float32) for t in (a, b))
    return interpreter.TensorHandle(a @ b + acc.data, acc.dtype.scalar)


@pytest.fixture(autouse=True)
def prepared(monkeypatch, request):
    set_up(monkeypatch, request.node.callspec.params["device"])


@triton.jit
def _to_e4m3_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y_ptr + at, to_e4m3(tl.load(x_ptr + at).to(tl.float32)))


@triton.jit
def _copy_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


def every_bfloat16(device):
    return torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(torch.bfloat16)


@pytest.mark.parametrize("device", DEVICES)
def test_every_bfloat16_to_e4m3(device):
    x = every_bfloat16(device)
    y = torch.empty(x.shape, dtype=E4M3, device=device)
    _to_e4m3_kernel[(64,)](x, y, SIZE=1024)
    assert_same_bits(y, _to_e4m3(x.float()))


@pytest.mark.parametrize("device", DEVICES)
def test_float32_to_e4m3_around_every_boundary(device):
    """Each E4M3 number, the middle to the next, and float32's neighbours of both."""
    values = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    values = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([464.0, 480.0])])
    x = torch.cat([values, torch.nextafter(values, torch.tensor(torch.inf)),
                   torch.nextafter(values, torch.tensor(-torch.inf))])  # fmt: skip
    x = torch.cat([x, -x, torch.zeros(2048 - 2 * x.numel())]).to(device)
    y = torch.empty(x.shape, dtype=E4M3, device=device)
    _to_e4m3_kernel[(2,)](x, y, SIZE=1024)
    assert_same_bits(y, _to_e4m3(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_e4m3_from_e4m3(device, dtype):
    x = torch.arange(256, device=device).to(torch.uint8).view(E4M3)
    y = torch.empty(256, dtype=dtype, device=device)
    _copy_kernel[(1,)](x, y, SIZE=256)
    assert_same_bits(y, x.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_float32_to_bfloat16(device):
    x = torch.randint(-(2**31), 2**31, (2**16,), generator=generator()).to(torch.int32)
    x = x.view(torch.float32).to(device)
    y = torch.empty(x.shape, dtype=torch.bfloat16, device=device)
    _copy_kernel[(64,)](x, y, SIZE=1024)
    assert_same_bits(y, x.bfloat16())


@triton.jit
def _scale_kernel(amax_ptr, scale_ptr, scale_inv_ptr, dtype_max, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    scale = scale_from_amax(tl.load(amax_ptr + at), dtype_max)
    tl.store(scale_ptr + at, scale)
    tl.store(scale_inv_ptr + at, reciprocal(scale))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scale_of_every_amax(device, dtype):
    """All float32 from 0 to infinity on a GPU, some in the interpreter: a quotient that a division
    rounds the wrong way to or from a power of two is an octave."""
    infinity = 0x7F80_0000
    chunk, chunks = (2**26, 32) if device == "cuda" else (2**12, 4)
    for number in range(chunks):
        if device == "cuda":
            pattern = torch.arange(number * chunk, (number + 1) * chunk, device=device)
        else:
            pattern = torch.randint(0, infinity, (chunk,), generator=generator())
        amax = pattern.clamp(max=infinity).int().view(torch.float32)
        scale, scale_inv = torch.empty_like(amax), torch.empty_like(amax)
        _scale_kernel[(chunk // 1024,)](amax, scale, scale_inv, torch.finfo(dtype).max, SIZE=1024)
        want = _scale_from_amax(amax, dtype)
        assert torch.equal(bits(scale), bits(want))
        assert torch.equal(bits(scale_inv), bits(want.reciprocal()))
