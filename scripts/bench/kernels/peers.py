"""Other libraries' kernels, where they can be loaded here."""

from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Peers:
    """Modules; None where one cannot be loaded."""

    te: ModuleType | None = None
    """Our operations by TransformerEngine: `models/fp8/te.py`."""
    te_grouped: ModuleType | None = None
    """TransformerEngine's GEMMs of all experts in one launch, `models/fp8/te_grouped.py`, where the
    cuBLAS loaded has them."""
    deep_gemm: ModuleType | None = None
    """DeepGEMM itself."""


def find_peers() -> Peers:
    """Those that can be loaded; a line on stdout for each that cannot."""
    te, deep_gemm = _find_te(), _find_deep_gemm()
    return Peers(te, _find_te_grouped(te), deep_gemm)


def _find_te() -> ModuleType | None:
    try:
        from models.fp8 import te
    except Exception as error:
        print(f"without TransformerEngine: {type(error).__name__}: {error}")
        return None
    return te


def _find_te_grouped(te: ModuleType | None) -> ModuleType | None:
    if te is None:
        return None
    from models.fp8 import te_grouped

    return te_grouped if te_grouped.is_supported() else None


def _find_deep_gemm() -> ModuleType | None:
    try:
        import deep_gemm
    except Exception as error:
        print(f"without DeepGEMM: {type(error).__name__}: {error}")
        return None
    return deep_gemm
