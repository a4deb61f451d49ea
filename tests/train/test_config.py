"""The config: what is accepted, and one clear line for what is not."""

import re

import pytest

from train.config import Config, ConfigError, check_world, describe_keys, is_free, is_said, load

DEMO = "configs/demo_cpu.yaml"


def test_override_is_typed():
    config = load(
        DEMO, ["train.steps=7", "optim.lr=3e-4", "moe.path=fp8_compact", "data.path=null"]
    )
    assert (config.train.steps, config.optim.lr, config.moe.path) == (7, 3e-4, "fp8_compact")
    assert config.data.path is None


def test_saved_config_is_read_back(tmp_path):
    config = load(DEMO, ["run.tags=[a, b]", "moe.top_k=1"])
    config.save(tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


def test_name_and_group_follow_from_the_file_and_the_path():
    config = load(DEMO, ["moe.path=fp8_direct"])
    assert (config.run.name, config.run.group) == ("demo_cpu-fp8_direct", "demo_cpu")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("moe.pth=bf16", "unknown config key moe.pth='bf16'; did you mean path?"),
        ("mode.path=bf16", "unknown config key mode={'path': 'bf16'}; did you mean model?"),
        ("train.steps=many", "config key train.steps='many': input should be a valid integer"),
        ("train.steps=1.5", "config key train.steps=1.5: "),
        ("train.steps=0", "config key train.steps=0: input should be greater than 0"),
        ("optim.lr=.nan", "config key optim.lr=nan"),
        ("moe.path=fp9", "'bf16', 'fp8_baseline', 'fp8_compact' or 'fp8_direct'"),
        ("model.hidden_size=200", "hidden_size=200 is not a multiple of 128"),
        ("moe.ffn_hidden_size=100", "ffn_hidden_size=100 is not a multiple of 128"),
        ("model.num_kv_heads=3", "num_kv_heads=3 does not divide num_heads=2"),
        ("model.num_heads=3 model.num_kv_heads=2", "num_kv_heads=2 does not divide num_heads=3"),
        ("model.num_heads=3", "num_heads=3 does not divide hidden_size=128"),
        ("moe.top_k=9", "top_k=9 is more than num_experts=8"),
        ("moe.num_experts=7", "num_experts=7 is not divisible by parallel.expert_parallel=2"),
        ("run.name=../elsewhere", "config key run.name='../elsewhere'"),
        ("steps=3", "override 'steps=3' must look like section.key=value"),
        ("train.steps", "must look like section.key=value"),
        ("train.steps=[1", "is not a YAML value"),
        ("data.name=some/set data.path=x", "keep one"),
    ],
)
def test_bad_input_is_one_line(override, says):
    with pytest.raises(ConfigError) as error:
        load(DEMO, override.split(" "))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_key_is_named(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {num_layers: 1}\n")
    with pytest.raises(ConfigError, match=r"config key model\.hidden_size is missing"):
        load(path)


@pytest.mark.parametrize(("text", "says"), [("a: [", "is not YAML"), ("- 1", "must hold sections")])
def test_unreadable_file_is_one_line(tmp_path, text, says):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"config file configs/none\.yaml: No such file"):
        load("configs/none.yaml")


@pytest.mark.parametrize(
    ("ranks", "overrides", "says"),
    [
        (3, [], "expert_parallel=2 does not divide the 3 rank"),
        (1, [], "expert_parallel=2 does not divide the 1 rank"),
        (2, ["train.global_batch=20"], "20 is not a multiple of train.micro_batch x ranks"),
        (2, ["train.global_batch=8"], "8 is not a multiple"),
        (
            6,
            ["train.global_batch=null", "train.micro_batch=1"],
            "3 replicas of each expert do not divide model.hidden_size=128",
        ),
        (4, ["optim.prepare_weights=true"], "with 2 replicas of each expert: a rank then updates"),
    ],
)
def test_number_of_ranks_is_checked(ranks, overrides, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        check_world(load(DEMO, overrides), ranks)
    assert "\n" not in str(error.value)


def test_accumulation():
    config = load(DEMO, ["train.micro_batch=2", "train.global_batch=16"])
    assert [config.accumulation(ranks) for ranks in (2, 4, 8)] == [4, 2, 1]
    alone = load(DEMO, ["train.global_batch=null"])
    assert (alone.global_batch(4), alone.accumulation(4)) == (32, 1)


def test_every_key_is_explained():
    text = describe_keys()
    for section, info in Config.model_fields.items():
        assert info.annotation is not None
        for key, field in info.annotation.model_fields.items():
            assert f"  {section}.{key} (" in text
            assert field.description, f"{section}.{key} has no docstring"


FREE = {
    *("run", "parallel", "checkpoint", "tracking"),
    *("moe.path", "moe.dispatch", "moe.dispatch_sms", "moe.recompute"),
    *("train.steps", "train.micro_batch", "train.global_batch", "train.device"),
    *("train.deterministic", "train.on_nonfinite", "train.nonfinite_limit"),
    *("train.log_every", "train.valid_every", "train.valid_batches", "train.warmup_steps"),
    *("train.profile", "train.profile_every", "train.trace_step"),
    *("optim.prepare_weights", "data.workers"),
}
"""Sections and keys; whoever marks another one says here that no result depends on it."""

SAID = {
    *("optim.lr", "optim.schedule", "optim.warmup_steps", "optim.decay_fraction"),
    *("optim.min_lr_ratio", "optim.weight_decay", "optim.clip_grad"),
}
"""Keys of which the start of a resumed run says that they have changed."""


def test_the_keys_that_may_change_on_resume():
    for section, info in Config.model_fields.items():
        assert info.annotation is not None
        for key in info.annotation.model_fields:
            name = f"{section}.{key}"
            assert is_free(section, key) == bool((FREE | SAID) & {section, name}), name
            assert is_said(section, key) == (name in SAID), name
            assert ("may change on resume" in line_about(name)) == is_free(section, key)


def line_about(name: str) -> str:
    (line,) = (line for line in describe_keys().splitlines() if line.startswith(f"  {name} ("))
    return line
