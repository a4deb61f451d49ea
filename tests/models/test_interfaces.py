"""mypy sees an implementation that does not fit its Protocol: operations, linear layers, paths."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BROKEN = [
    # file, its text, what stands there instead, what mypy then says about which file
    (
        "models/fp8/reference/permute.py",
        "def unpermute(y: Tensor, row_map: RowMap) -> Tensor:",
        "def unpermute(y: Tensor, row_map: RowMap, scale: float) -> Tensor:",
        ("models/fp8/operations.py", "unpermute"),
    ),
    (
        "models/fp8/kernels/plan_rows.py",
        "    max_rows: int | None = None,\n    step: int = 1,\n) -> PlannedRows:",
        "    step: int = 1,\n) -> PlannedRows:\n    max_rows = None",
        ("models/fp8/operations.py", "plan_rows"),
    ),
    (
        "models/fp8/te.py",
        "def dequantize(x: BlockScaledTensor, dtype: torch.dtype) -> Tensor:",
        "def dequantize(x: BlockScaledTensor) -> Tensor:\n    dtype = torch.float32",
        ("models/fp8/gpu/fp8_compact_te_dequantize.py", "assignment"),
    ),
    (
        "models/fp8/te.py",
        "def wgrad(self, dy: Columns, x: Columns, offsets: Tensor, dtype: torch.dtype) -> Tensor:",
        "def wgrad(self, dy: Columns, x: Columns, dtype: torch.dtype, offsets: Tensor) -> Tensor:",
        ("models/moe/runtime.py", "wgrad"),
    ),
    (
        "models/fp8/te_grouped.py",
        "    ) -> tuple[Tensor, GroupedColumns]:",
        "    ) -> Tensor:",
        ("models/fp8/te_grouped.py", "forward"),
    ),
    (
        "models/moe/paths/fp8_direct.py",
        "    ops: Operations,\n",
        "",
        ("models/moe/paths/__init__.py", "fp8_direct"),
    ),
    (
        "models/moe/dispatch/all_to_all.py",
        "self, x: Tensor, handle: Handle | None, weights: Tensor | None = None\n    )",
        "self, x: Tensor, handle: Handle | None\n    )",
        ("models/moe/dispatch/__init__.py", "AllToAll"),
    ),
    (
        "models/moe/dispatch/deep_ep_v2.py",
        "    def expand_again(self, x: Rows, layout: Layout, handle: Handle) -> Rows:",
        "    def expand_again(self, x: Rows, handle: Handle) -> Rows:\n        layout = ...",
        ("models/moe/dispatch/__init__.py", "DeepEPv2"),
    ),
    (
        "models/fp8/kernels/plan_arrivals.py",
        "def plan_arrivals(expert_ids: Tensor, rank: int, local_experts: int) -> Arrivals:",
        "def plan_arrivals(expert_ids: Tensor, local_experts: int, rank: int) -> Arrivals:",
        ("models/fp8/operations.py", "plan_arrivals"),
    ),
    (
        "models/fp8/deep_gemm.py",
        "def rows_step() -> int:",
        "def rows_step(device: torch.device) -> int:",
        ("models/fp8/gpu/deep_gemm_fp8.py", "assignment"),
    ),
    (
        "models/fp8/reference/plan_expand.py",
        ") -> ExpandedArrivals:",
        ") -> Arrivals:",
        ("models/fp8/operations.py", "plan_expand"),
    ),
]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> str:
    """What mypy says of a copy of models/ in which all of `BROKEN` are broken, one run for all."""
    copy = tmp_path_factory.mktemp("repository")
    shutil.copy2(ROOT / "pyproject.toml", copy)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "models", copy / "models", ignore=ignored)
    # What mypy has found out about PyTorch, so that it need not be found out again.
    if (ROOT / ".mypy_cache").is_dir():
        shutil.copytree(ROOT / ".mypy_cache", copy / ".mypy_cache")
    for name, text, other, _ in BROKEN:
        file = copy / name
        before = file.read_text()
        assert before.count(text) == 1, f"{name} has changed; break it in another way"
        file.write_text(before.replace(text, other))
    # Not this repository's packages for those of the copy.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-m", "mypy", "models"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("file", "about"), [wanted for *_, wanted in BROKEN])
def test_a_signature_that_does_not_fit_is_seen(said, file, about):
    lines = [line for line in said.splitlines() if line.startswith(f"{file}:")]
    assert any(about in line for line in lines), said
