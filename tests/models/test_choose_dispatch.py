"""Which dispatcher runs where: which version of DeepEP, and what is said where it can't run.

No GPU is needed: what the driver, NCCL and the package answer is made up.
"""

import os
import sys
import types
from typing import Any

import pytest
import torch

from models.config import DispatchName, ModelConfig, MoEConfig, PathName
from models.fp8 import reference
from models.moe import dispatch, runtime
from models.moe.dispatch import deep_ep_v1, deep_ep_v2, deep_ep_v2_needs
from models.moe.dispatch.deep_ep import GUIDE
from models.moe.dispatch.deep_ep_v2_needs import loaded_nccl, unavailable
from tests.support import elastic

MODEL = ModelConfig(
    num_layers=1, hidden_size=256, num_heads=2, num_kv_heads=2, vocab_size=64, seq_len=32
)


def moe(path: PathName, dispatch: DispatchName = "auto") -> MoEConfig:
    return MoEConfig(path=path, dispatch=dispatch, num_experts=4, top_k=2, ffn_hidden_size=128)


@pytest.fixture
def machine(monkeypatch):
    """Two Hopper GPUs with a new NCCL, and no package yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(deep_ep_v2_needs, "loaded_nccl", lambda: (2, 30, 7))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv(deep_ep_v2.DISABLE_GIN, raising=False)
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    return monkeypatch


def has(monkeypatch: Any, *classes: str, version: str | None = "2.1.0") -> types.ModuleType:
    """A package with these classes."""
    package = types.ModuleType("deep_ep")
    if version is not None:
        package.__version__ = version  # type: ignore[attr-defined]
    for name in classes:
        setattr(package, name, elastic.EPHandle if name == "EPHandle" else object)
    monkeypatch.setitem(sys.modules, "deep_ep", package)
    return package


V1, BOTH = ("Buffer",), ("Buffer", "ElasticBuffer", "EPHandle")


def test_nothing_speaks_against_it(machine):
    has(machine, *BOTH)
    assert unavailable(2, 2, 2048, 8) is None
    for ranks in (3, 5, 6):  # any number that a node has
        assert unavailable(ranks, ranks) is None
    assert unavailable(16, 8, 7168, 32) is None


@pytest.mark.parametrize(
    ("ranks", "here", "shape", "said"),
    [
        (1, 1, (), "nobody to send to"),
        (4, 6, (), "groups of 4 expert-parallel ranks don't divide a node's 6"),
        (12, 8, (), "12 expert-parallel ranks are not several whole nodes of 8"),
        (2, 2, (128,), "hidden size 128: it takes multiples of 256"),
        (2, 2, (256, 33), "top_k 33: it takes up to 32"),
    ],
)
def test_what_speaks_against_it(machine, ranks, here, shape, said):
    has(machine, *BOTH)
    assert unavailable(ranks, here, *shape) == said or said in (unavailable(ranks, here) or "")


def test_no_gpu_or_an_old_one(machine):
    machine.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert unavailable(2, 2) == "A GPU is older than Hopper, whose instructions it uses"
    machine.setattr(torch.cuda, "is_available", lambda: False)
    assert unavailable(2, 2) == "no NVIDIA GPU is visible"


def test_packages_that_lack_something(machine):
    assert unavailable(2, 2) == f"the package deep_ep is missing; {GUIDE}"
    has(machine, *V1, version="1.2.1")
    said = f"the package deep_ep that is installed is v1 and has no ElasticBuffer; {GUIDE}"
    assert unavailable(2, 2) == said
    has(machine, version=None)
    said = "the package deep_ep is an empty one: it has no ElasticBuffer; uninstall it, and"
    assert unavailable(2, 2) == f"{said} {GUIDE}"
    has(machine, version="0.0.1")
    assert "deep_ep (0.0.1) is another one: it has no ElasticBuffer" in (unavailable(2, 2) or "")


def test_a_package_that_asserts_when_it_is_imported(machine, tmp_path):
    """As version 2 does without CUDA's compiler, or beside another NCCL than it was built with."""
    (tmp_path / "deep_ep.py").write_text("assert False, 'Invalid NCCL\\nversions'")
    machine.syspath_prepend(tmp_path)
    machine.delitem(sys.modules, "deep_ep")
    said = "the package deep_ep does not load (Invalid NCCL versions)"
    assert unavailable(2, 2) == f"{said}; {GUIDE}"
    machine.setattr(deep_ep_v2_needs, "loaded_nccl", lambda: (2, 28, 9))
    assert (unavailable(2, 2) or "").startswith("NCCL 2.28.9 is loaded: it needs 2.30.4 or newer;")


def test_an_nccl_that_is_too_old(machine):
    has(machine, *BOTH)
    for version, fits in (((2, 30, 3), False), ((2, 30, 4), True), ((2, 31, 0), True)):
        machine.setattr(deep_ep_v2_needs, "loaded_nccl", lambda version=version: version)
        assert (unavailable(2, 2) is None) == fits
    machine.setattr(deep_ep_v2_needs, "loaded_nccl", lambda: None)  # nobody to ask
    assert unavailable(2, 2) is None
    machine.setattr(deep_ep_v2_needs, "loaded_nccl", lambda: (2, 28, 9))
    machine.setitem(sys.modules, "deep_ep", None)
    assert "is missing" in (unavailable(2, 2) or ""), "which comes first"


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this PyTorch loads NCCL")
def test_a_pytorch_for_cpus_has_no_nccl_to_ask():
    assert loaded_nccl() is None


def test_the_nccl_that_is_loaded_is_asked(monkeypatch):
    class Library:
        def __init__(self, name: str, mode: int) -> None:
            assert name == "libnccl.so.2"
            assert mode == os.RTLD_NOLOAD, "one that PyTorch has not loaded says nothing"

        def ncclGetVersion(self, version: Any) -> None:
            version._obj.value = 23007

    monkeypatch.setattr("ctypes.CDLL", Library)
    assert loaded_nccl() == (2, 30, 7)


def test_a_handle_of_another_version(machine):
    package = has(machine, *BOTH, version="2.2.0")
    package.EPHandle = types.SimpleNamespace  # type: ignore[attr-defined]

    class Other:
        def __init__(self, do_expand, something_new):
            pass

    package.EPHandle = Other  # type: ignore[attr-defined]
    reason = unavailable(2, 2) or ""
    assert reason.startswith("deep_ep 2.2.0 has another handle than is known here (channel_linked")
    assert reason.endswith(": install that of 2.1.0")
    assert "something_new" in reason
    assert "do_expand" not in reason
    package.__version__ = "2.1.0"  # type: ignore[attr-defined]
    assert (unavailable(2, 2) or "").endswith(": rebuild it from a commit that has that of 2.1.0")
    del package.EPHandle
    assert unavailable(2, 2) == "deep_ep 2.1.0 exports no EPHandle: install 2.1.0"


def test_between_nodes_it_needs_what_is_switched_off(machine):
    has(machine, *BOTH)
    machine.setenv(deep_ep_v2.DISABLE_GIN, "1")
    assert unavailable(2, 2) is None
    assert "EP_DISABLE_GIN switches off" in (unavailable(16, 8) or "")
    machine.setenv(deep_ep_v2.DISABLE_GIN, "0")
    assert unavailable(16, 8) is None


class Made:
    """Instead of a dispatcher's class: what it was made with."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class MadeV1(Made):
    name, expands = "deep_ep_v1", False


class MadeV2(Made):
    name, expands = "deep_ep_v2", True


@pytest.fixture
def chosen(machine):
    """The dispatcher of a path, for `moe.dispatch` and the package's classes, and what is said."""
    machine.setattr(runtime.operations, "why_not", lambda path, device: None)
    machine.setattr(deep_ep_v1, "DeepEPv1", MadeV1)
    machine.setattr(deep_ep_v2, "DeepEPv2", MadeV2)
    machine.setattr("models.moe.dispatch.deep_ep.half_of_the_multiprocessors", lambda: 66)

    def choose(path: PathName, wanted: DispatchName, classes: tuple[str, ...], ranks: int = 2):
        has(machine, *classes)
        machine.setenv("LOCAL_WORLD_SIZE", str(ranks))
        group = types.SimpleNamespace(size=lambda: ranks, rank=lambda: 0)
        return dispatch.choose(MODEL, moe(path, wanted), "cuda", group, reference)  # type: ignore[arg-type]

    return choose


@pytest.mark.parametrize("wanted", ["auto", "deep_ep"])
@pytest.mark.parametrize(
    ("path", "ranks", "classes", "name"),
    [
        ("fp8_direct", 2, V1, "deep_ep_v1"),
        ("fp8_direct", 2, BOTH, "deep_ep_v2"),
        ("fp8_direct", 4, BOTH, "deep_ep_v1"),
        ("fp8_direct", 4, BOTH[1:], "deep_ep_v2"),
        ("fp8_fused", 4, BOTH, "deep_ep_v2"),
        ("fp8_fused", 4, V1, "deep_ep_v1"),
    ],
)
def test_the_version_that_is_first(chosen, wanted, path, ranks, classes, name):
    found, said = chosen(path, wanted, classes, ranks)
    assert found.name == name
    assert said.startswith(f"dispatch by {name}")
    assert runtime.why_not(MODEL, moe(path, wanted), "cuda", ranks) is None


def test_what_is_said_of_the_other_one(chosen, machine):
    reason = "the package deep_ep that is installed is v1 and has no ElasticBuffer"
    _, said = chosen("fp8_fused", "auto", V1)
    assert said.startswith("dispatch by deep_ep_v1, which is followed by a permute (not deep_ep_v2")
    assert reason in said
    _, said = chosen("fp8_fused", "auto", BOTH)
    assert said == "dispatch by deep_ep_v2, which does the permute too"
    _, said = chosen("fp8_direct", "auto", BOTH)
    assert said == "dispatch by deep_ep_v2"
    _, said = chosen("fp8_direct", "deep_ep_v1", BOTH)
    assert said == "dispatch by deep_ep_v1"
    _, said = chosen("fp8_direct", "deep_ep_v2", BOTH)
    assert said == "dispatch by deep_ep_v2"
    _, said = chosen("fp8_fused", "deep_ep_v1", BOTH)
    assert said == "dispatch by deep_ep_v1, which is followed by a permute"
    _, said = chosen("bf16", "auto", ())
    assert said.startswith("dispatch by all_to_all (not deep_ep_v2: the package deep_ep")
    assert "; deep_ep_v1: the package deep_ep" in said
    machine.setattr(torch.cuda, "is_available", lambda: False)
    _, said = chosen("bf16", "auto", ())
    two = "deep_ep_v2 or deep_ep_v1"
    assert said == f"dispatch by all_to_all (not {two}: no NVIDIA GPU is visible)"


def test_what_a_dispatcher_is_made_with(chosen):
    v2, _ = chosen("fp8_fused", "auto", BOTH)
    assert v2.arguments[1:] == (reference, 4, 256, 2, 32, 66, 1)
    v1, _ = chosen("bf16", "deep_ep_v1", BOTH)
    assert v1.arguments[1:] == (4, 256, None)


@pytest.mark.parametrize("name", ["deep_ep", "deep_ep_v1", "deep_ep_v2"])
def test_a_version_that_is_named_and_is_not_there(machine, name):
    machine.setattr(runtime.operations, "why_not", lambda path, device: None)
    reason = runtime.why_not(MODEL, moe("bf16", name), "cuda", 2) or ""
    assert reason == f"moe.dispatch={name} cannot run here: the package deep_ep is missing; {GUIDE}"
    reason = runtime.why_not(MODEL, moe("bf16", name), "cpu", 2) or ""
    assert reason.startswith(f"moe.dispatch={name} needs GPUs; set moe.dispatch=all_to_all")
