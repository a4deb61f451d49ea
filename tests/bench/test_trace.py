"""Kernels of a traced step, summed by kind."""

import gzip
import json
from pathlib import Path

import pytest

from scripts.bench.trace import Event, kind_of, main, summarize


def kernel(name: str, start: float, duration: float, category: str = "kernel") -> Event:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


EVENTS = [
    kernel("void deep_ep::intranode::dispatch<2>", 1000, 2000),
    kernel("ncclDevKernel_ReduceScatter", 2000, 3000),  # beside the one before
    kernel("Memcpy DtoD", 6000, 500, "gpu_memcpy"),
    kernel("aten::mm", 0, 9000, "cpu_op"),
]


def test_kinds_add_up_and_what_overlaps_is_not_idle():
    sums = summarize(EVENTS)
    assert sums["dispatch and combine"] == 2.0
    assert sums["FSDP's communication"] == 3.0
    assert sums["other"] == 0.5
    assert sums["span"] == 5.5
    assert sums["idle"] == 1.0
    assert sum(ms for kind, ms in sums.items() if kind not in ("idle", "span")) == 5.5


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_grouped_mm_wgrad_kernel", "expert weight gradients"),
        ("_grouped_gemm_kernel", "expert GEMMs"),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<128>", "expert GEMMs"),
        ("nvjet_sm90_tst_256x128_64x4", "dense GEMMs"),
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bx_coopB_ptrGroup_TNN", "expert GEMMs"),
        ("nvjet_sm90_tss_192x192_64x3_1x2_h_bx_coopB_ptrGroup_NTN", "expert weight gradients"),
        ("_swiglu_backward_kernel", "SwiGLU"),
        ("void deep_ep::elastic::dispatch_copy_epilogue_impl<1>", "dispatch and combine"),
        ("_place_arrivals_kernel", "dispatch and combine"),
        ("_count_expand_kernel", "dispatch and combine"),
        ("_place_kernel", "permute, unpermute"),
        ("at::native::multi_tensor_apply_kernel<FusedAdam>", "optimizer, gradient norm"),
        ("_adamw_quantize_kernel", "optimizer, gradient norm"),
        ("triton_poi_fused_add_0", "other"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_a_file_is_written_and_bad_traces_are_one_line(tmp_path: Path, capsys):
    trace = tmp_path / "t.json.gz"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": EVENTS}).encode()))
    out = tmp_path / "step.json"
    assert main([f"bf16={trace}", "--out", str(out), "--commit", "abc"]) == 0
    content = json.loads(out.read_text())
    assert content["commit"] == "abc"
    assert content["rows"] == [{"traced": "bf16", "ms": summarize(EVENTS)}]
    capsys.readouterr()
    (tmp_path / "empty.json").write_text('{"traceEvents": []}')
    packed = trace.read_bytes()
    (tmp_path / "cut.json.gz").write_bytes(packed[:-12])
    (tmp_path / "damaged.json.gz").write_bytes(packed[:20] + bytes(8) + packed[28:])
    (tmp_path / "list.json").write_text(json.dumps(EVENTS))
    (tmp_path / "null.json").write_text('{"traceEvents": null}')
    (tmp_path / "odd.json").write_text(json.dumps({"traceEvents": [{**EVENTS[0], "dur": None}]}))
    there = [f"bf16={path}" for path in tmp_path.glob("*.json*") if path not in (trace, out)]
    assert len(there) == 6
    for bad in ("bf16=nowhere.json", "nothing", *there):
        assert main([bad]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert main([str(trace)]) == 2
    assert capsys.readouterr().err == f"{trace}: no name for this trace; give PATH=TRACE\n"
    (tmp_path / "folder").mkdir()
    assert main([f"bf16={trace}", "--out", str(tmp_path / "folder")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
