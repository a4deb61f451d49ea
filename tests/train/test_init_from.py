"""A run starts from the weights of a checkpoint that transformers has written."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.hf import config as hf_config
from scripts.export import main as export
from scripts.import_config import main as import_config
from scripts.import_config import write as write_config
from tests.support import hf
from tests.support.ranks import read_metrics, run_alone, run_main, run_train
from tests.support.tiny import TINY
from train.__main__ import main as train
from train.checkpoint import hf_reader
from train.config import ConfigError, load
from train.data import batches as data

LAYOUTS = [(kind, layout) for kind in hf_config.FAMILIES for layout in ("hub", "packed")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """KIND/LAYOUT/model: a model in both layouts, each with a config that fits beside it."""
    made = tmp_path_factory.mktemp("hf")
    for kind in hf_config.FAMILIES:
        hub, packed = (made / kind / layout / "model" for layout in ("hub", "packed"))
        run_alone(hf.make, kind, hub, packed, torch.bfloat16)
        for folder in (hub, packed):
            assert import_config([str(folder), "--out", str(yaml_of(folder))]) == 0
    return made


@pytest.fixture
def folder(models) -> Path:
    """One of them, where it does not matter which."""
    return models / "qwen3_moe" / "hub" / "model"


def yaml_of(folder: Path) -> Path:
    return folder.with_name("imported.yaml")


def keys_of(run_dir: Path, name: str, *more: str) -> list[str]:
    """What makes a run of an imported config a small one."""
    small = [key for key in TINY[1:] if not key.startswith(("model.num_layers", "moe.num_"))]
    return [*small, f"run.dir={run_dir}", f"run.name={name}", "train.steps=1", *more]


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_files_are_as_they_are_on_the_hub_or_packed(models, kind, layout):
    """The tests below need both layouts; transformers might change what it writes."""
    folder = models / kind / layout / "model"
    last = {"qwen3_moe": "mlp.experts.3.up_proj.weight"}.get(
        kind, "block_sparse_moe.experts.3.w3.weight"
    )
    name = last if layout == "hub" else "mlp.experts.gate_up_proj"
    assert f"model.layers.1.{name}" in hf.tensors(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2


class Counting:
    """safe_open, and how many numbers of experts were had from it."""

    read = 0

    def __init__(self, *args: Any, **keys: Any) -> None:
        self.inner = safe_open(*args, **keys)

    def __enter__(self) -> "Counting":
        self.inner.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.inner.__exit__(*args)

    def keys(self) -> list[str]:
        return self.inner.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self.count(name, self.inner.get_tensor(name))

    def count(self, name: str, found: Tensor) -> Tensor:
        Counting.read += found.numel() if ".experts." in name else 0
        return found

    def get_slice(self, name: str) -> Any:
        inner, count = self.inner.get_slice(name), self.count

        class Slice:
            get_shape, get_dtype = inner.get_shape, inner.get_dtype

            def __getitem__(self, at: Any) -> Tensor:
                return count(name, inner[at])

        return Slice()


def train_counting(argv: list[str]) -> int:
    """Train, and leave how many numbers of experts this rank has read, in the folder argv[0]."""
    hf_reader.safe_open = Counting  # type: ignore[assignment,misc]
    code = train(argv[1:])
    (Path(argv[0]) / f"read_{os.environ['RANK']}").write_text(str(Counting.read))
    return code


WAYS = [
    *((kind, layout, 2, 2) for kind, layout in LAYOUTS),
    *(("qwen3_moe", "hub", ranks, ep) for ranks, ep in ((1, 1), (4, 4), (4, 2))),
    *(("mixtral", "packed", ranks, ep) for ranks, ep in ((1, 1), (4, 4))),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout", "ranks", "ep"), WAYS)
def test_round_trip_is_bit_for_bit(models, tmp_path, kind, layout, ranks, ep):
    """Into a run whose one step changes nothing, and out again, in the source's dtype. Each rank
    reads of the experts those that it holds."""
    folder = models / kind / layout / "model"
    # In float32 this rate is 0.
    keys = keys_of(tmp_path, "a", f"parallel.expert_parallel={ep}", "optim.lr=1e-300")
    argv = [str(tmp_path), str(yaml_of(folder)), *keys]
    assert run_main(ranks, train_counting, argv) == [0] * ranks
    out = tmp_path / "hf"
    command = [str(tmp_path / "a"), "--out", str(out), "--format", "hf", "--dtype", "bfloat16"]
    assert export(command) == 0
    there, back = hf.tensors(models / kind / "hub" / "model"), hf.tensors(out)
    assert there.keys() == back.keys()
    for name, value in there.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, back[name]), name
    held = sum(value.numel() for name, value in there.items() if ".experts." in name)
    for rank in range(ranks):
        assert int((tmp_path / f"read_{rank}").read_text()) == held // ep


@pytest.mark.parametrize("kind", hf_config.FAMILIES)
def test_the_first_loss_is_that_of_transformers(models, tmp_path, kind):
    """What is trained is the model, not only its numbers in some order."""
    folder = models / kind / "packed" / "model"
    argv = [str(yaml_of(folder)), *keys_of(tmp_path, "a", "train.global_batch=2")]
    assert run_train(1, argv) == [0]
    corpus = data.load(load(argv[0], argv[1:]))
    batch = next(iter(corpus.train_batches(0, 1, 0)))
    logits = run_alone(hf.logits, folder, batch.tokens)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert read_metrics(tmp_path / "a")[0]["loss/train"] == pytest.approx(float(want), rel=1e-5)


def test_a_resumed_run_has_weights_of_its_own(folder, tmp_path):
    """It does not look for the folder, which may be gone."""
    copy = shutil.copytree(folder, tmp_path / "model")
    assert import_config([str(copy), "--out", str(tmp_path / "a.yaml")]) == 0
    argv = [str(tmp_path / "a.yaml"), *keys_of(tmp_path, "a", "optim.lr=0.01", "train.steps=4")]
    assert run_train(1, [*argv, "train.steps=3"]) == [0]
    shutil.rmtree(copy)
    assert run_train(1, argv) == [0]
    assert run_train(1, [*argv, "model.init_from=null"]) == [2], "another run"
    rows = read_metrics(tmp_path / "a")
    assert [row["progress/step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["loss/train"] < rows[0]["loss/train"] - 0.3


CONFIGS = {
    "qwen3_moe": [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling\.type='linear'"),
        ({"rope_parameters": {"rope_theta": 0.5}}, "rope_theta=0.5"),
        ({"use_sliding_window": True, "sliding_window": 32}, "sliding_window=32"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ({"router_sparkle": 3}, "router_sparkle=3"),
        ({"model_type": "llama"}, "model_type='llama' is not a model of this kind"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"num_attention_heads": "many"}, "num_attention_heads='many' is not a number"),
    ],
    "mixtral": [
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ({"num_experts_per_tok": 1}, r"num_experts_per_tok=1 \(its one expert is weighed with 1"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "keys", "says"), [(kind, *case) for kind, cases in CONFIGS.items() for case in cases]
)
def test_what_this_model_has_not_is_refused_by_name(kind, keys, says, tmp_path, capsys):
    about = hub_config(kind) | keys
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert import_config([str(tmp_path), "--out", str(tmp_path / "a.yaml")]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path}: config.json" in err
    assert re.search(says, err), err
    assert err.count("\n") == 1
    assert not (tmp_path / "a.yaml").exists()


def hub_config(kind: str) -> dict[str, Any]:
    """As the hub's own files have it, written by transformers 4."""
    same: dict[str, Any] = {
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": kind,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
    }
    if kind == "qwen3_moe":
        same |= {
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "intermediate_size": 6144,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "rope_scaling": None,
            "use_sliding_window": False,
        }
    return {**same, **hf.SMALL, **hf.OF_CLASS[kind]}


def test_what_is_not_said_is_what_transformers_takes():
    about = hub_config("mixtral")
    del about["rope_theta"], about["rms_norm_eps"], about["tie_word_embeddings"]
    _, keys = hf_config.from_theirs(about)
    assert (keys["model.rope_base"], keys["model.norm_eps"]) == (1_000_000, 1e-5)
    about = hub_config("qwen3_moe")
    del about["rope_theta"], about["rms_norm_eps"], about["head_dim"]
    _, keys = hf_config.from_theirs(about)
    assert (keys["model.rope_base"], keys["model.norm_eps"]) == (10_000, 1e-6)
    assert keys["model.head_dim"] == 32
    del about["norm_topk_prob"]
    with pytest.raises(ValueError, match="norm_topk_prob=False"):
        hf_config.from_theirs(about)


@pytest.mark.parametrize("kind", hf_config.FAMILIES)
def test_the_hubs_own_config_is_taken(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hub_config(kind)))
    family, keys = hf_reader.read_config(tmp_path)
    assert family.model_type == kind
    assert keys["model.rope_base"] == 1_000_000
    assert keys["model.norm_eps"] == 1e-6
    assert keys["model.head_dim"] == {"qwen3_moe": 48, "mixtral": 32}[kind]
    assert keys["moe.num_experts"] == 4
    assert keys["moe.ffn_hidden_size"] == 256


def test_the_whole_model_is_its_hub_config():
    """Qwen3-30B-A3B's, by what its model card and its config.json say."""
    config = load("configs/qwen3_30b_a3b.yaml")
    theirs = hf_config.to_theirs(config.model, config.moe, "bfloat16", None)
    want: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "head_dim": 128,
    }
    want |= {"num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128}
    want |= {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    want |= {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    assert {key: theirs[key] for key in want} == want


def refused(folder: Path, *keys: str) -> str:
    """The one line."""
    config = load(yaml_of(folder), [f"model.init_from={folder}", *keys])
    with pytest.raises(ConfigError) as error:
        hf_reader.source(config)
    assert "\n" not in str(error.value)
    assert f"model.init_from={folder}" in str(error.value)
    return str(error.value)


def test_files_that_do_not_fit_are_one_line(folder, tmp_path):
    shutil.copy(yaml_of(folder), tmp_path)
    copy = shutil.copytree(folder, tmp_path / "model")
    assert "model.num_layers=1 (there 2)" in refused(copy, "model.num_layers=1")
    assert "model.rope_base=9 (there 10000)" in refused(copy, "model.rope_base=9")
    file = next(iter(sorted(copy.glob("*.safetensors"))))
    whole = load_file(file)
    name = next(iter(whole))

    def changed(weights: dict[str, Tensor]) -> str:
        save_file(weights, file)
        line = refused(copy)
        save_file(whole, file)
        return line

    without = {key: value for key, value in whole.items() if key != name}
    assert f"{name} is missing" in changed(without)
    assert f"{name} is [3, 5], not [" in changed({**without, name: torch.zeros(3, 5)})
    assert f"{name} is in I8, not in F32" in changed({**whole, name: whole[name].to(torch.int8)})
    assert "sparkle is not known" in changed({**whole, "sparkle": torch.zeros(1)})
    assert "and 1 more like it" in changed(
        {**whole, **{f"sparkle.{i}": torch.zeros(1) for i in range(4)}}
    )
    file.write_bytes(b"not safetensors")
    assert f"{file.name} cannot be read" in refused(copy)
    file.unlink()
    assert f"{file.name} cannot be read" in refused(copy)
    index = copy / "model.safetensors.index.json"
    index.write_text("[]")
    assert "is not an index of weights" in refused(copy)
    index.unlink()
    assert "has neither model.safetensors.index.json nor model.safetensors" in refused(copy)
    (copy / "config.json").write_text("{")
    assert "config.json is not JSON" in refused(copy)
    (copy / "config.json").unlink()
    assert "config.json: No such file" in refused(copy)


def test_nothing_starts_with_a_folder_that_is_not_there(folder, tmp_path, capfd):
    none = tmp_path / "none"
    keys = keys_of(tmp_path, "b", f"model.init_from={none}")
    assert run_train(1, [str(yaml_of(folder)), *keys]) == [2]
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert f"error: model.init_from={none}: config.json: No such file" in err
    assert not (tmp_path / "b").exists()


def test_import_config(folder, tmp_path, capsys):
    text = yaml_of(folder).read_text()
    sections = yaml.safe_load(text)
    assert sections["model"]["init_from"] == str(folder)
    assert "billion parameters" in text
    for arguments, says in (
        ([str(folder), "--out", str(tmp_path / "a.json")], "must end in .yaml"),
        ([str(folder), "--out", str(yaml_of(folder))], "is there already"),
        ([str(folder), "--out", "/proc/nowhere/a.yaml"], "cannot be written"),
        ([str(tmp_path), "--out", str(tmp_path / "a.yaml")], "config.json: No such file"),
    ):
        assert import_config(arguments) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
    file = tmp_path / "file"
    file.touch()
    assert import_config([str(folder), "--out", str(file / "a.yaml")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    odd = shutil.copytree(folder, tmp_path / "odd")
    hf.edit_config(odd, hidden_size=100)
    assert import_config([str(odd), "--out", str(tmp_path / "a.yaml")]) == 2
    assert "hidden_size=100 is not a multiple of 128" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.yaml*"))


def test_import_config_of_a_broken_checkpoint_leaves_no_file(folder, tmp_path, capsys):
    """So that the same command works once it is whole."""
    broken = shutil.copytree(folder, tmp_path / "broken")
    for file in broken.glob("*.safetensors*"):
        file.unlink()
    assert import_config([str(broken), "--out", str(tmp_path / "a.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [*tmp_path.iterdir()] == [broken]


def test_import_config_of_a_folder_with_an_odd_name(folder, tmp_path):
    odd = shutil.copytree(folder, tmp_path / "a b'\ntrain: 3")
    out = tmp_path / "a b'.yaml"
    assert import_config([str(odd), "--out", str(out)]) == 0
    assert load(out).model.init_from == str(odd)
    command = next(line for line in out.read_text().splitlines() if "torchrun" in line)
    assert str(out) in shlex.split(command.removeprefix("#"))
    raw = os.fsdecode(b"\xff.yaml")  # no YAML holds this one
    copy = shutil.copytree(folder, tmp_path / raw)
    for out, source in ((tmp_path / "b.yaml", copy), (tmp_path / f"b{raw}", folder)):
        with pytest.raises(ConfigError, match=r"not (valid )?UTF-8"):
            write_config(out, source)
    assert not [*tmp_path.glob("b*")]
