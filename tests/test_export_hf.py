"""The exported folder is the model that was trained, to transformers, without code of ours."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from torch import Tensor

from models.gpt import GPT
from models.hf import config as hf_config
from scripts.export import check_fits_hf, write, write_hf
from scripts.export import main as export
from scripts.generate import main as generate
from scripts.train_tokenizer import train_bpe
from tests.models.test_gpt import build, configure
from tests.support import hf
from tests.support.ranks import run_alone, run_ranks, run_train
from tests.support.tiny import argv
from tests.test_export import printed
from train.checkpoint import hf_writer
from train.config import Config, ConfigError
from train.data.hf_tokenizer import files_of
from train.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

QWEN, MIXTRAL = "model.qk_norm=true", "model.qk_norm=false"
# Numbers that are nobody's defaults.
ODD = ["model.rope_base=777", "model.norm_eps=0.003", "parallel.expert_parallel=1"]
SHAPES = {
    "qwen": [QWEN],
    "qwen-head-dim": [QWEN, "model.head_dim=80", "model.num_heads=6"],
    "qwen-tied": [QWEN, "model.tie_embeddings=true"],
    "qwen-top-1": [QWEN, "moe.top_k=1"],
    "qwen-top-8": [QWEN, "moe.num_experts=12", "moe.top_k=8"],
    "qwen-one-kv-head": [QWEN, "model.num_kv_heads=1"],
    "mixtral": [MIXTRAL],
    "mixtral-head-dim": [MIXTRAL, "model.head_dim=80", "model.num_heads=6"],
    "mixtral-tied": [MIXTRAL, "model.tie_embeddings=true"],
    "mixtral-top-8": [MIXTRAL, "moe.num_experts=12", "moe.top_k=8"],
    "mixtral-no-groups": [MIXTRAL, "model.num_kv_heads=4", "moe.ffn_hidden_size=256"],
}


def some_tokens(config: Config) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, config.model.vocab_size, (2, 32), generator=generator)


def random_model(config: Config) -> GPT:
    """With random weights, norms among them."""
    model = build(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.15, generator=generator)
    return model


def random_weights(rank: int, config: Config) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in random_model(config).named_parameters()}


def export_random(rank: int, config: Config, folder: Path, dtype: str) -> Tensor:
    """Write a model with random weights; its logits."""
    model = random_model(config)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    write_hf(folder, weights, config, dtype, ByteTokenizer())
    with torch.no_grad():
        return model(some_tokens(config), None)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_writer, "SHARD_BYTES", 500_000)
    config = configure(*ODD, *SHAPES[shape])
    check_fits_hf(config)
    (want,) = run_ranks(1, export_random, config, tmp_path / "hf", "float32")
    got = run_alone(hf.logits, tmp_path / "hf", some_tokens(config))
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert about["architectures"] == [
        "Qwen3MoeForCausalLM" if shape.startswith("qwen") else "MixtralForCausalLM"
    ]
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert max(file.stat().st_size for file in files) < 600_000


def test_bfloat16_is_the_same_numbers_rounded(tmp_path):
    config = configure(*ODD, QWEN)
    for dtype in ("float32", "bfloat16"):
        run_ranks(1, export_random, config, tmp_path / dtype, dtype)
    exact, rounded = hf.tensors(tmp_path / "float32"), hf.tensors(tmp_path / "bfloat16")
    assert exact.keys() == rounded.keys()
    for name, value in exact.items():
        assert torch.equal(value.bfloat16(), rounded[name]), name
    about = json.loads((tmp_path / "bfloat16" / "config.json").read_text())
    assert about["torch_dtype"] == "bfloat16"
    rights = {path.stat().st_mode for path in (tmp_path / "bfloat16").iterdir()}
    assert len(rights) == 1, "all files have the same permissions"


@pytest.fixture(scope="module", params=[QWEN, MIXTRAL])
def run_dir(tmp_path_factory, request) -> Path:
    folder = tmp_path_factory.mktemp("export")
    keys = ["train.steps=40", "optim.lr=0.01", "model.seq_len=64", request.param]
    assert run_train(2, argv(folder, "a", *keys)) == [0, 0]
    return folder / "a"


def test_a_prompt_is_completed_as_by_generate(run_dir, tmp_path, capsys):
    """Greedily, without a word on how a text begins or which tokens there are not."""
    out, file = tmp_path / "hf", tmp_path / "model.safetensors"
    assert export([str(run_dir), "--out", str(out), "--format", "hf"]) == 0
    assert "weights of a after step 40" in capsys.readouterr().out
    assert export([str(run_dir), "--out", str(file)]) == 0
    for prompt in ("def ", "", "class \N{LATIN SMALL LETTER E WITH ACUTE}"):
        options = ["--temperature", "0", "--tokens", "48", "--device", "cpu"]
        want = run_alone(printed, generate, [str(file), prompt, *options])
        got = run_alone(hf.completed, out, prompt, 48)
        assert got + "\n" == want
        assert len(want) > len(prompt) + 5
    assert generate([str(out), "def "]) == 2
    assert "has Hugging Face's layout, which is not read here" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [[QWEN], [MIXTRAL]])
def test_it_ends_as_generate_does_and_says_nothing_else(keys, tmp_path):
    """With a model that can emit anything, even rows without a token, unlike a trained one."""
    config = configure(*ODD, *keys)
    tokenizer = ByteTokenizer()
    (weights,) = run_ranks(1, random_weights, config)
    rows = weights["output_layer.weight"]
    rows[:32] = rows[127:256] = 0  # so that it is text

    def completed(name: str) -> str:
        file, out = tmp_path / f"{name}.safetensors", tmp_path / name
        write(file, weights, config, 0, tokenizer)
        write_hf(out, weights, config, "float32", tokenizer)
        options = ["--temperature", "0", "--tokens", "24", "--device", "cpu"]
        want = run_alone(printed, generate, [str(file), "def ", *options])
        assert run_alone(hf.completed, out, "def ", 24) + "\n" == want
        return want.removeprefix("def ").removesuffix("\n")

    rows[tokenizer.eod] = 0
    text = completed("long")
    assert len(text) == 24
    assert len(set(text)) > 8
    rows[tokenizer.eod] = 2 * rows[ord(text[8])]
    short = completed("short")
    assert text.startswith(short)
    assert len(short) < 9


TEXTS = [
    *("", "def a(b):\n\treturn b", " two  spaces ", "\x00\x7f\xad\xff\n", "\U0001f600 \u4e16"),
    "".join(map(chr, range(0x250))),
]


def a_bpe(folder: Path) -> FileTokenizer:
    """One that would cut, pad and put tokens around a text, as files made for inference do."""
    inner = train_bpe(iter(TEXTS * 10), 300)
    inner.enable_truncation(5)
    inner.enable_padding(length=9)
    inner.save(str(folder / "a.json"))
    tokenizer = load_tokenizer(str(folder / "a.json"))
    assert isinstance(tokenizer, FileTokenizer)
    return tokenizer


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("model_type", hf_config.FAMILIES)
def test_tokenizer_gives_the_same_numbers(kind, model_type, tmp_path):
    """Under both classes' configs, for which transformers has ideas of its own."""
    tokenizer: Tokenizer = ByteTokenizer() if kind == "bytes" else a_bpe(tmp_path)
    texts = TEXTS + (["a <|endoftext|> b"] if kind == "bytes" else [])
    for name, text in files_of(tokenizer, 64).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    want = [ids.tolist() for ids in tokenizer.encode(texts)]
    assert run_alone(hf.numbers, tmp_path, texts, False) == want
    begun = [[tokenizer.eod, *ids] for ids in want]
    assert run_alone(hf.numbers, tmp_path, texts, True) == begun
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw = [inner.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert raw == want[: len(TEXTS)]
    ours = load_tokenizer(str(tmp_path))
    assert [ids.tolist() for ids in ours.encode(texts)] == want
    assert (ours.eod, ours.vocab_size) == (tokenizer.eod, tokenizer.vocab_size)
    assert [ours.decode(ids) for ids in want] == [tokenizer.decode(ids) for ids in want]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["moe.shared_ffn_hidden_size=128"], r"moe\.shared_ffn_hidden_size=128: neither"),
        (["moe.top_k=1"], r"moe\.top_k=1 with model\.qk_norm=false: Mixtral"),
    ],
)
def test_what_no_class_fits_is_one_line(keys, says):
    with pytest.raises(ConfigError, match=says):
        check_fits_hf(configure(*keys))


def test_bad_options_are_one_line(run_dir, tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    for arguments, says in (
        (["--out", str(tmp_path), "--format", "hf"], "is there already; name a folder to make"),
        (["--out", str(link), "--format", "hf"], "is there already; name a folder to make"),
        (["--out", "x" * 300, "--format", "hf"], "cannot be written: File name too long"),
        (["--out", "/proc/nowhere/x", "--format", "hf"], "/proc/nowhere/x cannot be written"),
        (["--out", str(tmp_path / "x"), "--dtype", "bfloat16"], "a native file is in float32"),
    ):
        assert export([str(run_dir), *arguments]) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
    assert [*tmp_path.iterdir()] == [link]
