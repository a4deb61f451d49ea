"""The versions that a result names are those that ran."""

import os
from typing import Any

from train.metrics import environment


class Version:
    restype: Any = None

    def __call__(self) -> int:
        return 131002


class Library:
    """cuBLASLt 13.10.2 and NCCL 2.30.7."""

    cublasLtGetVersion = Version()

    def __init__(self, name: str, mode: int) -> None:
        assert name in ("libcublasLt.so.13", "libnccl.so.2")
        assert mode == os.RTLD_NOLOAD, "one that PyTorch has not loaded says nothing"

    def ncclGetVersion(self, version: Any) -> None:
        version._obj.value = 23007


def test_libraries_that_are_loaded(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", Library)
    found = environment.versions()
    assert (found["cublas"], found["nccl"]) == ("13.10.2", "2.30.7")


def test_libraries_that_are_not(monkeypatch):
    def gone(name: str, mode: int) -> None:
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", gone)
    found = environment.versions()
    assert not {"cublas", "nccl"} & set(found)
    assert found["torch"]
