"""`model.attention_backend` sets what TransformerEngine looks at, or is refused in one line."""

import os

import pytest
from megatron.core.transformer.enums import AttnBackend

from models import attention_backend
from models.attention_backend import SWITCHES, why_not
from scripts.bench.stacks.stock_settings import transformer_arguments
from scripts.export import write
from scripts.generate import main as generate
from tests.models.test_gpt import build, configure
from tests.support.ranks import run_alone, run_ranks
from tests.support.tiny import TINY
from tests.test_export import printed
from tests.test_export_hf import random_weights
from train.__main__ import main
from train.data.tokenizer import ByteTokenizer

ALONE = "parallel.expert_parallel=1"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for switch in SWITCHES["auto"]:
        monkeypatch.delenv(switch, raising=False)


def switches_of_a_model(rank: int, config) -> dict[str, str | None]:
    build(config)
    return {switch: os.environ.get(switch) for switch in SWITCHES["auto"]}


@pytest.mark.parametrize("backend", SWITCHES)
def test_a_model_switches_the_others_off(backend):
    config = configure(ALONE, f"model.attention_backend={backend}")
    assert run_ranks(1, switches_of_a_model, config) == [SWITCHES[backend]]
    peer = transformer_arguments(config, "bf16", (), "alltoall")
    assert peer["attention_backend"] is AttnBackend[backend]


def test_what_keeps_one_from_being_had(monkeypatch):
    monkeypatch.setattr(attention_backend, "_has", lambda package: False)
    assert why_not("auto", "cuda") is why_not("auto", "cpu") is why_not("fused", "cuda") is None
    assert "needs one of flash-attn, flash-attn-3" in (why_not("flash", "cuda") or "")
    monkeypatch.setattr(attention_backend, "_has", lambda package: package == "flash-attn-3")
    assert why_not("flash", "cuda") is None
    monkeypatch.setenv("NVTE_FUSED_ATTN", "1")
    assert why_not("fused", "cuda") is why_not("auto", "cuda") is None
    assert why_not("flash", "cuda") == (
        "NVTE_FUSED_ATTN=1 is in the environment, where model.attention_backend=flash needs 0; "
        "unset it, and choose by model.attention_backend"
    )


def test_a_run_refuses_it_in_one_line(capsys, monkeypatch):
    keys = [*TINY, "train.steps=1", ALONE, "train.device=cpu"]
    assert main([*keys, "model.attention_backend=fused"]) == 2
    assert capsys.readouterr().err == (
        "error: model.attention_backend=fused is for GPUs; a CPU has PyTorch's attention alone: "
        "leave it at auto\n"
    )
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    assert main(keys) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: NVTE_FLASH_ATTN=0 is in the environment")
    assert error.count("\n") == 1


def test_a_model_that_was_trained_with_one_completes_anywhere(tmp_path):
    config = configure(ALONE, "model.attention_backend=fused")
    (weights,) = run_ranks(1, random_weights, config)
    file = tmp_path / "model.safetensors"
    write(file, weights, config, 0, ByteTokenizer())
    options = ["--temperature", "0", "--tokens", "4", "--device", "cpu"]
    assert run_alone(printed, generate, [str(file), "def ", *options]).startswith("def ")
