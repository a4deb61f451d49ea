"""What transformers makes of a folder, and models that it makes at random; in processes of their
own, since it starts threads. Imported here, or each of them would spend seconds on it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CLASSES = {
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
}

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
OF_CLASS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 256,
        "head_dim": 48,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 4, "intermediate_size": 256},
}


def make(kind: str, hub: Path, packed: Path, dtype: torch.dtype, **keys: object) -> None:
    """Write a model with random weights, norms among them, in several files: as the hub's are, and
    as transformers 5 holds it."""
    config_class, model_class = CLASSES[kind]
    config = config_class(**{**SMALL, **OF_CLASS[kind], **keys})
    torch.manual_seed(3)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    model = model.to(dtype)
    model.save_pretrained(hub, max_shard_size="500KB")
    model.save_pretrained(packed, max_shard_size="500KB", save_original_format=False)


def logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of the model in a folder, computed in float32 without our code."""
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    with torch.no_grad():
        return model.eval()(tokens).logits


def completed(folder: Path, prompt: str, tokens: int) -> str:
    """A prompt and what greedily follows it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def load_tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def numbers(folder: Path, texts: list[str], begun: bool) -> list[list[int]]:
    """Token numbers of texts, by the tokenizer in a folder; `begun`: with the tokens that it puts
    before them."""
    tokenizer = load_tokenizer(folder)
    return [tokenizer(text, add_special_tokens=begun)["input_ids"] for text in texts]


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that the files of a folder hold."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict[str, Tensor] = {}
    for file in set(index["weight_map"].values()):
        found |= load_file(folder / file)
    assert found.keys() == index["weight_map"].keys()
    return found


def edit_config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
