"""What scripts.evaluate finds is what training logged, whatever holds the model."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.evaluate import main as evaluate
from scripts.export import main as export
from tests.support.ranks import read_metrics, run_alone, run_train
from tests.support.tiny import argv

KEYS = ["train.steps=30", "optim.lr=0.01", "train.valid_every=15", "train.valid_batches=3"]
KEYS += ["checkpoint.every=15", "model.qk_norm=true", "moe.path=fp8_direct"]


def trained(folder: Path, name: str, ranks: int, *keys: str) -> Path:
    assert run_train(ranks, argv(folder, name, *KEYS, *keys)) == [0] * ranks
    return folder / name


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    # The global batch follows from the number of ranks, which the checkpoint alone knows.
    return trained(folder, "two", 2, "train.global_batch=null")


def called(arguments: list[str]) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = evaluate([*arguments, "--device", "cpu"])
    return code, out.getvalue(), err.getvalue()


def run_evaluate(*arguments: object) -> tuple[int, str, str]:
    """In a process of its own: a group leaves threads behind, and later tests fork."""
    return run_alone(called, [str(one) for one in arguments])


def result_of(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    out = tmp_path / "result.json"
    code, _, err = run_evaluate(*arguments, "--out", out)
    assert code == 0, err
    return json.loads(out.read_text())


def test_a_run_of_one_rank_to_the_last_bit(tmp_path):
    run = trained(tmp_path, "one", 1, "parallel.expert_parallel=1")
    logged = read_metrics(run)[-1]
    found = result_of(tmp_path, run)
    assert found["step"] == 30
    assert (found["loss"], found["bits_per_byte"]) == (
        logged["loss/valid"],
        logged["loss/valid_bpb"],
    )
    # 3 global batches of 8 sequences of 32 tokens; ends of documents are not bytes.
    assert found["tokens"] == 768
    assert 700 < found["bytes"] <= 768
    earlier = next(row for row in read_metrics(run) if row["progress/step"] == 15)
    checkpoint = run / "checkpoints" / "step_00000015"
    assert result_of(tmp_path, checkpoint)["loss"] == earlier["loss/valid"] != found["loss"]


def kept_for_backward(arguments: list[str]) -> tuple[int, list[bool]]:
    """The exit code, and for each batch whether a graph was built, whose activations stay."""
    from train import loop

    losses, kept = loop.losses, []

    def noted(*args):
        found = losses(*args)
        kept.append(found.requires_grad)
        return found

    loop.losses = noted
    return called(arguments)[0], kept


def test_nothing_is_kept_for_a_backward_pass(run_dir):
    assert run_alone(kept_for_backward, [str(run_dir)]) == (0, [False] * 6)


def test_whatever_holds_the_model(run_dir, tmp_path):
    logged = read_metrics(run_dir)[-1]
    file, folder = tmp_path / "model.safetensors", tmp_path / "hf"
    assert export([str(run_dir), "--out", str(file)]) == 0
    assert export([str(run_dir), "--out", str(folder), "--format", "hf"]) == 0
    keys = ["data.path=models", "model.seq_len=32", "train.micro_batch=2", "train.global_batch=4"]
    keys += ["train.valid_batches=3"]
    found = [
        result_of(tmp_path, run_dir),
        result_of(tmp_path, file),
        result_of(tmp_path, folder, *keys, "--path", "fp8_direct"),
    ]
    for one in found:
        assert one["tokens"] == 3 * 4 * 32, "the batch of the two ranks that trained"
        assert one["loss"] == pytest.approx(logged["loss/valid"], rel=1e-6)
        assert one["bits_per_byte"] == pytest.approx(logged["loss/valid_bpb"], rel=1e-6)
    in_bf16 = result_of(tmp_path, run_dir, "--path", "bf16")
    assert in_bf16["path"] == "bf16"
    assert 0 < abs(in_bf16["loss"] - logged["loss/valid"]) < 0.1
    more = result_of(tmp_path, run_dir, "--batches", "5")
    assert more["tokens"] == 5 * 4 * 32


@pytest.mark.parametrize("keys", [["data.path=null", "data.mixture={train: 1, models: 3}"], []])
def test_what_is_named_replaces_what_was_trained_on(tmp_path, keys):
    """Whichever of the keys the run had, and whichever is named now."""
    run = trained(tmp_path, "run", 1, "parallel.expert_parallel=1", "train.steps=2", *keys)
    for named in (["data.path=train"], ["data.mixture={train: 1}"], ["--data", "train"]):
        found = result_of(tmp_path, run, *named, "--batches", "1")
        assert "train: " in found["data"]
        assert "models: " not in found["data"]


def losses_of_windows(file: Path, text: bytes) -> tuple[float, int]:
    """The mean loss over all of a text's windows, and how many tokens those are."""
    from scripts.generate import load_model

    model, _, config = load_model(file, "cpu")
    tokens = np.append(np.frombuffer(text, np.uint8).astype(np.int64), 256)
    length = config.model.seq_len + 1
    windows = torch.from_numpy(tokens[: len(tokens) // length * length].reshape(-1, length))
    with torch.no_grad():
        losses = model(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
    return float(losses.double().mean()), losses.numel()


def test_every_document_of_other_data(run_dir, tmp_path):
    file, text = tmp_path / "model.safetensors", tmp_path / "text.txt"
    assert export([str(run_dir), "--out", str(file)]) == 0
    text.write_text("".join(f"line {number}: one more\n" for number in range(120)))
    loss, tokens = run_alone(losses_of_windows, file, text.read_bytes())
    found = result_of(tmp_path, file, "--data", text)
    assert found["tokens"] == tokens
    assert found["bytes"] == tokens, "the end of the document is in no whole window"
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(loss / np.log(2), rel=1e-6)
    few = result_of(tmp_path, file, "--data", text, "--batches", "2")
    assert few["tokens"] == 2 * 2 * 32


LM_EVAL = """
import json, pathlib
from lm_eval.tasks import TaskManager

def simple_evaluate(model, model_args, tasks, task_manager, device, batch_size, limit):
    assert isinstance(task_manager, TaskManager)
    folder = pathlib.Path(model_args["pretrained"])
    if "offline" in tasks:
        raise OSError("no\\nnetwork")
    config = json.loads((folder / "config.json").read_text())
    assert (model, model_args["dtype"], device) == ("hf", "float32", "cpu")
    assert list(folder.glob("*.safetensors")) and (folder / "tokenizer.json").is_file()
    row = {"alias": "a", "acc,none": 0.25, "acc_stderr,none": 0.125}
    row |= {"layers,none": config["num_hidden_layers"], "limit,none": limit or 0, "sample_len": 4}
    return {"results": {task: dict(row) for task in tasks}}
"""
LM_EVAL_TASKS = """
class TaskManager:
    all_tasks = ["hellaswag", "piqa", "offline"]

    def match_tasks(self, names):
        return [task for task in self.all_tasks if task in names]
"""


def test_tasks_are_run_on_the_export(run_dir, tmp_path, monkeypatch):
    """A module that stands for lm_eval: it sees what lm_eval would load."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text(LM_EVAL)
    (tmp_path / "lm_eval" / "tasks.py").write_text(LM_EVAL_TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    out = tmp_path / "found.json"
    options = ("--tasks", "hellaswag,piqa", "--limit", "7", "--out", out)
    code, said, err = run_evaluate(run_dir, *options)
    assert code == 0, err
    assert "hellaswag      acc 0.2500 ± 0.1250, layers 1.0000, limit 7.0000" in said
    tasks = json.loads(out.read_text())["tasks"]
    assert tasks["piqa"] == {"acc": 0.25, "acc_stderr": 0.125, "layers": 1, "limit": 7}
    code, said, err = run_evaluate(run_dir, "--tasks", "offline")
    assert code == 2
    assert "\nloss " in said, "what was computed before is lost"
    assert err == "error: --tasks offline: lm_eval: OSError: no network\n"
    code, said, err = run_evaluate(run_dir, "--tasks", "piqa,helaswag")
    assert (code, said) == (2, ""), "before anything is computed"
    assert err == "error: --tasks helaswag: lm_eval has no such task; like it: hellaswag\n"


def test_without_lm_eval(run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = run_evaluate(run_dir, "--tasks", "hellaswag")
    assert (code, err) == (
        2,
        'error: --tasks needs lm_eval, which is missing; pip install "lm_eval[hf]"\n',
    )


def test_with_an_lm_eval_that_is_broken(run_dir, tmp_path, monkeypatch):
    (tmp_path / "lm_eval.py").write_text("import a_module_that_is_gone")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    code, said, err = run_evaluate(run_dir, "--tasks", "hellaswag")
    assert (code, said) == (2, "")
    assert "lm_eval, which cannot be imported: ModuleNotFoundError: No module named" in err
    assert err.count("\n") == 1


def test_bad_input_is_one_line(run_dir, tmp_path):
    folder = tmp_path / "hf"
    assert export([str(run_dir), "--out", str(folder), "--format", "hf"]) == 0
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        (["none"], "none cannot be read"),
        ([tmp_path / "empty"], "has no whole checkpoint"),
        ([folder], "does not say what it was validated on"),
        ([run_dir, "--data", "none"], "data.path=none"),
        ([run_dir, "--data", "models", "data.path=models"], "are both given; keep one"),
        ([run_dir, "--path", "fp8"], "--path fp8: no such path"),
        ([run_dir, "--out", "x.txt"], "must end in .json"),
        ([run_dir, "--limit", "3"], "--limit 3 counts examples of tasks"),
        ([run_dir, "--tasks", ","], "--tasks ',' names no task"),
        ([run_dir, "model.sparkle=1"], "unknown config key model.sparkle"),
        ([run_dir, "model.num_layers=3"], "lacks weights"),
        ([run_dir, "model.hidden_size=256"], "does not fit its own config"),
        ([run_dir, "train.micro_batch=3"], "is not a multiple of train.micro_batch=3"),
        ([run_dir, "model.vocab_size=100"], "the tokenizer has 257 tokens"),
    ):
        code, _, err = run_evaluate(*arguments)
        assert code == 2, (arguments, err)
        assert says in err, (arguments, err)
        assert err.count("\n") == 1, err


def test_a_result_that_cannot_be_written_is_known_before(run_dir, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    for out, why in (
        ("folder.json", "is a folder; name the file to write"),
        ("file/x.json", "cannot be written: Not a directory"),
    ):
        code, said, err = run_evaluate(run_dir, "--out", tmp_path / out)
        assert (code, said) == (2, "")
        assert err.startswith(f"error: --out {tmp_path / out} {why}")
        assert err.count("\n") == 1


def called_twice(first: list[str], then: list[str]) -> list[int]:
    return [called(arguments)[0] for arguments in (first, then)]


def test_one_that_fails_leaves_the_next_its_turn(run_dir):
    """In one process, as in a notebook."""
    for wrong in ("model.num_layers=3", "model.hidden_size=256"):
        assert run_alone(called_twice, [str(run_dir), wrong], [str(run_dir)]) == [2, 0]


def test_forced_routing_is_said(tmp_path):
    run = trained(tmp_path, "forced", 1, "parallel.expert_parallel=1", "moe.force_balance=true")
    code, _, err = run_evaluate(run)
    assert code == 0
    assert "moe.force_balance=true trained with experts drawn at random" in err
