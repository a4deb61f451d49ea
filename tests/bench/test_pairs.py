"""Two paths in turn on one model."""

import json

import pytest
import torch

from scripts.bench import pairs
from tests.support.ranks import _run
from tests.support.tiny import TINY_MODEL

TINY = [*TINY_MODEL, "model.num_layers=1"]


def test_a_pair_cancels_a_drift():
    """Steps that get slower all the time, and a second path that takes 2 ms less."""
    drift = torch.arange(40, dtype=torch.float64).view(10, 4) * 0.5
    noise = torch.randn(10, 4, generator=torch.Generator().manual_seed(1)) * 0.01
    times = 100 + drift + noise - 2 * torch.tensor([0, 1, 1, 0])
    found = pairs.differences(times)
    assert abs(found["saved_ms"]["mean"] - 2) <= found["saved_ms"]["plus_minus"] < 0.02
    mean = float((times[:, 0] + times[:, 3]).mean() / 2)
    assert found["saved_percent"]["mean"] == pytest.approx(found["saved_ms"]["mean"] / mean * 100)


@pytest.mark.slow
def test_two_paths_alternate_on_one_model(tmp_path, capfd):
    out = tmp_path / "pairs.json"
    argv = [*TINY, "--pairs", "fp8_baseline,fp8_compact", "--blocks", "2", "--out", str(out)]
    assert _run(2, pairing, (argv,), 180) == [0, 0]
    (row,) = json.loads(out.read_text())["rows"]
    assert row["pair"] == ["fp8_baseline", "fp8_compact"]
    assert row["relayouts_a_layer"] == [10, 4]
    assert row["blocks"] == 2
    assert "fp8_compact against fp8_baseline, hidden 128" in capfd.readouterr().out


def pairing(rank: int, argv: list[str]) -> int:
    return pairs.main(argv)


@pytest.mark.parametrize(
    ("pair", "line"),
    [
        ("bf16,fp8_compact", "their GEMMs differ; measure them with bench.train"),
        ("fp8_compact", "needs two of our paths"),
        ("fp8_compact,stock:fp8", "needs two of our paths"),
        ("fp8_compact,fp8_baseline:prepare", "only triton, te_dequantize can alternate"),
    ],
)
def test_what_is_no_pair(pair, line, capsys):
    assert pairs.main([*TINY, "--pairs", pair]) == 2
    assert f"error: --pairs {pair}: " in (said := capsys.readouterr().err)
    assert line in said
