"""Every command says in one line that a path cannot be looked up."""

import pytest

from scripts import evaluate, export, generate, import_config, prepare_data, train_tokenizer
from scripts.compare import dashboard
from scripts.compare.__main__ import main as compare
from scripts.plan.__main__ import main as plan

LONG = "x" * 300
"""A path whose file system refuses to look it up, as it does in the folder of somebody else."""
DEMO = "configs/demo_cpu.yaml"


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (export.main, [LONG, "--out", "OUT"]),
        (evaluate.main, [LONG]),
        (generate.main, [LONG, "x"]),
        (import_config.main, [LONG, "--out", "OUT.yaml"]),
        (compare, [LONG]),
        (compare, ["--group", "x", "--runs", LONG]),
        (dashboard.main, ["x", "--runs", LONG, "--out", "OUT.json"]),
        (plan, [LONG]),
        (train_tokenizer.main, [DEMO, f"data.path={LONG}", "--out", "OUT.json"]),
        (prepare_data.main, [DEMO, f"data.path={LONG}", "--out", "OUT"]),
        (prepare_data.main, [DEMO, f"data.tokenizer=./{LONG}", "--out", "OUT"]),
    ],
)
def test_what_cannot_be_looked_up_is_one_line(tmp_path, capsys, main, arguments):
    out = str(tmp_path / "out")
    assert main([one.replace("OUT", out) for one in arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not [*tmp_path.iterdir()]
