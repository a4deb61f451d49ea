"""The versions that a result names are those that ran."""

import os
from typing import Any

import pytest

from train.metrics import environment


class Library:
    """cuBLASLt 13.10 and NCCL 2.30.7."""

    def __init__(self, name: str, mode: int) -> None:
        assert name in ("libcublasLt.so.13", "libnccl.so.2")
        assert mode == os.RTLD_NOLOAD, "one that PyTorch has not loaded says nothing"
        self.cublasLtGetVersion = Version()

    def ncclGetVersion(self, version: Any) -> None:
        version._obj.value = 23007


class Version:
    restype: Any = None

    def __call__(self) -> int:
        return 131000


@pytest.mark.parametrize("packages", ["there", "missing"])
def test_of_libraries_those_that_are_loaded(monkeypatch, packages):
    """Whatever their packages say: another copy can be loaded first."""
    if packages == "there":
        monkeypatch.setattr(environment, "version", lambda package: "13.1.0.3")
    monkeypatch.setattr("ctypes.CDLL", Library)
    found = environment.versions()
    assert found["nvidia-cublas"] == "13.10.0"
    assert found["nvidia-nccl-cu13"] == "2.30.7"


def test_without_them_their_packages_speak(monkeypatch):
    def gone(name: str, mode: int) -> None:
        raise OSError

    monkeypatch.setattr("ctypes.CDLL", gone)
    monkeypatch.setattr(environment, "version", lambda package: "1.2")
    assert environment.versions()["nvidia-cublas"] == "1.2"
