"""What DeepEP's own tests print, beside a layer of ours."""

import json

import pytest

from scripts.bench.deep_ep_tests import main, own_test

V1 = """
[tuning] SMs 24, NVL chunk default: 102.30 GB/s (NVL), 1225.73 us
[tuning] Best dispatch (FP8): SMs 24, NVL chunk 32, 172.95 GB/s (NVL), t: 725.01 us
[tuning] Best dispatch (BF16): SMs 24, NVL chunk 16, 260.21 GB/s (NVL), t: 934.58 us
[tuning] Best combine: SMs 24, NVL chunk 16: 326.22 GB/s (NVL), t: 745.47 us
"""
V2 = """
   * EP:   0/2 | dispatch: 0 GB/s (SO), 405 GB/s (SU), 323.9 us, 131 bytes | copy: 2493 GB/s, 105.3 us
   - EP:   0/2 | expanded dispatch: 0 GB/s (SO), 404 GB/s (SU), 324.0 us, 131 bytes | copy: 2 GB/s, 195.5 us
   - EP:   1/2 | expanded dispatch: 0 GB/s (SO), 406 GB/s (SU), 325.0 us, 131 bytes | copy: 2 GB/s, 196.5 us
   @ EP:   0/2 | combine: 0 GB/s (SO), 394 GB/s (SU), 1.0 us, 245 bytes | reduce: 2655 GB/s, 1.0 us
   + EP:   0/2 | reduced combine: 0 GB/s (SO), 393 GB/s (SU), 623.5 us, 245 bytes | reduce: 2 GB/s, 118.0 us
"""  # noqa: E501 - as it prints them


def layer(dispatch="deep_ep_v2", path="fp8_fused"):
    part = {"dispatch": {"median": 1.5}, "combine": {"median": 0.75}}
    row = {"path": path, "gpus": 2, "forward_parts_ms": part, "backward_parts_ms": part}
    origin = {"machine": {"cpu": "none", "devices": 2}, "versions": {}, "commit": "abc"}
    return {**origin, "config": {"dispatch": dispatch}, "rows": [row]}


def test_the_figures_that_each_version_prints():
    assert own_test(V1) == {
        "dispatch": {"gb_per_s": 172.95, "us": 725.01},
        "combine": {"gb_per_s": 326.22, "us": 745.47},
    }
    found = own_test(V2)
    assert {name: one["us"] for name, one in found.items()} == {"dispatch": 520.5, "combine": 741.5}
    # What is sent, in the time of both kernels.
    assert found["combine"]["gb_per_s"] == pytest.approx(393 * 623.5 / 741.5)
    assert own_test("nothing of that") == {}


def test_a_row_for_each_call(tmp_path):
    out = tmp_path / "out.json"
    (tmp_path / "log").write_text(V2)
    (tmp_path / "layer.json").write_text(json.dumps(layer()))
    assert main([f"{tmp_path / 'log'},{tmp_path / 'layer.json'}", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    dispatch, combine = written["rows"]
    assert (written["commit"], dispatch["gpus"], dispatch["path"]) == ("abc", 2, "fp8_fused")
    assert (dispatch["call"], dispatch["forward_us"]) == ("dispatch", 1500)
    assert (combine["call"], combine["backward_us"]) == ("combine", 750)
    assert combine["own_test"]["us"] == 741.5


@pytest.mark.parametrize(
    ("log", "measured", "said"),
    [
        (V2, layer(dispatch="all_to_all"), "dispatched by all_to_all"),
        (V1, layer(dispatch="deep_ep_v1"), "not run in fp8_direct"),
        ("killed", layer(), "no figures of dispatch and combine"),
        (2 * (" > Testing with a\n" + V2), layer(), "several modes in one log"),
        (V2, [], "list indices"),
        (V2, {key: value for key, value in layer().items() if key != "commit"}, "no 'commit'"),
        (V2, {**layer(), "rows": None}, "NoneType"),
    ],
)
def test_what_does_not_fit_together_is_one_line(log, measured, said, tmp_path, capsys):
    (tmp_path / "log").write_text(log)
    (tmp_path / "layer.json").write_text(json.dumps(measured))
    out = tmp_path / "out.json"
    assert main([f"{tmp_path / 'log'},{tmp_path / 'layer.json'}", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not out.exists()


def test_layers_of_two_commits_are_not_mixed(tmp_path, capsys):
    (tmp_path / "log").write_text(V2)
    for name, commit in (("a", "abc"), ("b", "def")):
        (tmp_path / name).write_text(json.dumps({**layer(), "commit": commit}))
    pairs = [f"{tmp_path / 'log'},{tmp_path / name}" for name in "ab"]
    assert main([*pairs, "--out", str(tmp_path / "out.json")]) == 2
    assert "of different machines, versions or commits" in capsys.readouterr().err


def test_what_is_missing_or_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "log").write_text(V2)
    (tmp_path / "layer.json").write_text(json.dumps(layer()))
    pair = f"{tmp_path / 'log'},{tmp_path / 'layer.json'}"
    for arguments, said in (
        ([str(tmp_path / "layer.json"), "--out", str(tmp_path / "o")], "no log for this layer"),
        ([f"{tmp_path / 'none'},{tmp_path / 'layer.json'}", "--out", str(tmp_path / "o")], "none"),
        ([pair, "--out", str(tmp_path)], "is a folder; name the file to write"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
