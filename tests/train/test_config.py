"""The config: what is accepted, and one clear line for what is not."""

import re
from pathlib import Path

import pytest

from models.config import PATH_NAMES
from train.__main__ import main
from train.config import Config, ConfigError, check_world, describe_keys, is_free, is_said, load

DEMO = "configs/demo_cpu.yaml"


def test_override_is_typed():
    config = load(
        DEMO, ["train.steps=7", "optim.lr=3e-4", "moe.path=fp8_compact", "data.path=null"]
    )
    assert (config.train.steps, config.optim.lr, config.moe.path) == (7, 3e-4, "fp8_compact")
    assert config.data.path is None


def with_key(tmp_path: Path, section: str, key: str, text: str) -> Path:
    """The demo's config file with one more key, or another value for one that it has."""
    lines = [line for line in Path(DEMO).read_text().splitlines() if f"  {key}: " not in line]
    if f"{section}:" not in lines:
        lines.append(f"{section}:")
    lines.insert(lines.index(f"{section}:") + 1, f"  {key}: {text}")
    path = tmp_path / "changed.yaml"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        # A key whose type is text takes the text.
        ("run.name", "12345", "12345"),
        ("run.name", "010", "010"),
        ("run.name", "2024-01-05", "2024-01-05"),
        ("run.name", "no", "no"),
        ("run.name", "1e5", "1e5"),
        ("run.name", '"12345"', "12345"),
        ("run.name", "null", "null"),
        ("run.group", "null", None),
        ("run.group", "1:30", "1:30"),
        ("run.tags", "[1, no, 2024-01-05]", ("1", "no", "2024-01-05")),
        ("tracking.project", "1.10", "1.10"),
        ("data.eod_token", "</s>", "</s>"),
        # A key whose type is a number takes what everybody means by it.
        ("train.steps", "1e5", 100_000),
        ("train.steps", "2.0E2", 200),
        ("train.steps", "010", 10),
        ("train.steps", "1_000", 1000),
        ("train.steps", '"300"', 300),
        ("train.seed", str(2**62 - 1), 2**62 - 1),
        ("optim.lr", "5e-4", 5e-4),
        ("optim.lr", "1", 1.0),
        ("optim.lr", "'1e-3'", 1e-3),
        ("moe.capacity", "1.5", 1.5),
        ("moe.capacity", "2", 2.0),
        ("moe.capacity", "auto", "auto"),
        ("moe.capacity", "default", "default"),
        ("moe.capacity", "null", None),
        ("train.profile", "yes", True),
        ("train.profile", "False", False),
    ],
)
def test_a_value_has_the_type_of_its_key(tmp_path, key, text, value):
    section, name = key.split(".")
    for config in (
        load(DEMO, [f"{key}={text}"]),
        load(with_key(tmp_path, section, name, text)),
    ):
        found = getattr(getattr(config, section), name)
        assert (found, type(found)) == (value, type(value))


def test_saved_config_is_read_back(tmp_path):
    config = load(DEMO, ["run.tags=[a, b]", "moe.top_k=1", "run.group=007", "data.path=~x: [*"])
    config.save(tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


def test_name_and_group_follow_from_the_file_and_the_path():
    config = load(DEMO, ["moe.path=fp8_direct"])
    assert (config.run.name, config.run.group) == ("demo_cpu-fp8_direct", "demo_cpu")


def test_a_path_is_text_whatever_yaml_makes_of_it():
    for path in ("**/*.jsonl", "*", "[a]*.txt", "{a,b}.txt", "a: b", "a #b", "!x", "&y", "%z", "@"):
        assert load(DEMO, [f"data.path={path}"]).data.path == path


@pytest.mark.parametrize("name", ["demo 2.yaml", "été.yaml", ".demo.yaml", "a b (copy).yml"])
def test_any_name_of_a_config_file_gives_a_run_its_name(tmp_path, name):
    path = tmp_path / name
    path.write_text(Path(DEMO).read_text())
    config = load(path)
    assert re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._-]*-bf16", config.run.name)
    assert config.run.group == path.stem


def test_a_section_with_nothing_under_it_has_its_defaults(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(Path(DEMO).read_text() + "\ndata:\n  # path: x\n\ncheckpoint:\n")
    config, plain = load(path), load(DEMO)
    assert (config.data, config.checkpoint) == (plain.data, plain.checkpoint)
    assert load(path, ["data.path=x"]).data.path == "x"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "\noptim:\n  lr: 0.1\n",
            "line {n} gives optim again, which line 26 has already; keep one",
        ),
        ("\ndata:\n  path: a\n  path: b\n", "gives path again"),
        ("\ndata:\n  path:\n", "config key data.path= is empty"),
        ("\ndata:\n  path: ''\n", "config key data.path= is empty"),
    ],
)
def test_what_a_file_says_twice_or_not_at_all_is_one_line(tmp_path, text, says):
    path = tmp_path / "a.yaml"
    demo = Path(DEMO).read_text()
    path.write_text(demo + text)
    says = says.replace("{n}", str(demo.count("\n") + 2))
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_an_anchor_and_a_merge_still_work(tmp_path):
    path = tmp_path / "a.yaml"
    text = Path(DEMO).read_text() + "\ndata: &d\n  workers: 0\ncheckpoint:\n  <<: {every: 5}\n"
    path.write_text(text)
    config = load(path)
    assert (config.data.workers, config.checkpoint.every) == (0, 5)


def test_a_file_of_another_encoding(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        path = tmp_path / f"{encoding}.yaml"
        path.write_text(Path(DEMO).read_text(), encoding=encoding)
        assert load(path).optim == load(DEMO).optim
    path.write_bytes(b"run: {name: \xff\xe9}\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load(path)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("moe.pth=bf16", "unknown config key moe.pth='bf16'; did you mean path?"),
        ("mode.path=bf16", "unknown config key mode={'path': 'bf16'}; did you mean model?"),
        ("train.steps=many", "config key train.steps='many': input should be a valid integer"),
        ("train.steps=1.5", "config key train.steps=1.5: "),
        ("train.steps=0", "config key train.steps=0: input should be greater than 0"),
        ("optim.lr=.nan", "config key optim.lr=nan"),
        ("optim.lr=1e300", "config key optim.lr=1e+300"),
        ("train.global_batch=99999999999999999998", "config key train.global_batch=9999"),
        ("train.micro_batch=1e12", "config key train.micro_batch=10"),
        ("data.workers=100000", "config key data.workers=100000"),  # would start them all
        ("moe.num_experts=1e9", "config key moe.num_experts=1000000000"),
        ("moe.path=fp9", f"{', '.join(map(repr, PATH_NAMES[:-1]))} or {PATH_NAMES[-1]!r}"),
        ("model.hidden_size=200", "hidden_size=200 is not a multiple of 128"),
        ("moe.ffn_hidden_size=100", "ffn_hidden_size=100 is not a multiple of 128"),
        ("model.num_kv_heads=3", "num_kv_heads=3 does not divide num_heads=2"),
        ("model.num_heads=3 model.num_kv_heads=2", "num_kv_heads=2 does not divide num_heads=3"),
        ("model.num_heads=3", "num_heads=3 does not divide hidden_size=128"),
        ("moe.capacity=0.5", "capacity: 0.5 is neither default, auto, null nor a number from 1 on"),
        ("moe.capacity=.nan", "moe.capacity: nan is neither default, auto"),
        (f"moe.capacity={10**400}", "moe.capacity: 1"),
        ("moe.bias_update_rate=1e39", "config key moe.bias_update_rate=1e+39"),
        ("moe.capacity=true", "moe.capacity: 'true' is neither default, auto"),
        ("moe.capacity=[1]", "moe.capacity: ['1'] is neither default, auto"),
        ("moe.top_k=9", "top_k=9 is more than num_experts=8"),
        ("moe.num_experts=7", "num_experts=7 is not divisible by parallel.expert_parallel=2"),
        ("run.name=../elsewhere", "config key run.name='../elsewhere'"),
        ("steps=3", "override 'steps=3' must look like section.key=value"),
        ("train.steps", "must look like section.key=value"),
        ("train.steps=[1", "is not a YAML value"),
        ("data.name=some/set data.path=x", "keep one"),
        ("train.steps=1:30", "config key train.steps='1:30': input should be a valid integer"),
        ("train.steps=2024-01-05", "config key train.steps='2024-01-05'"),
        ("train.steps=true", "config key train.steps='true'"),
        ("train.profile=1", "config key train.profile='1': input should be a valid boolean"),
        ("optim.lr=1:30", "config key optim.lr='1:30'"),
        ("optim.lr=.inf", "config key optim.lr=inf"),
        ("data.path=", "config key data.path= is empty (a variable that is not set?)"),
        ("data.name=", "config key data.name= is empty"),
        ("data.path=''", "config key data.path= is empty"),
        ("run.name=", "config key run.name= is empty"),
        ("run.dir=", "config key run.dir= is empty"),
        ("train.steps=", "config key train.steps= is empty"),
        ("train.global_batch=", "config key train.global_batch= is empty"),
    ],
)
def test_bad_input_is_one_line(override, says):
    with pytest.raises(ConfigError) as error:
        load(DEMO, override.split(" "))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_home_is_found_in_paths():
    assert load(DEMO, ["run.dir=~/x", "run.name=a"]).run_dir == Path.home() / "x" / "a"


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


def test_whether_weights_are_prepared_is_one_of_three(tmp_path):
    for text, value in (("auto", "auto"), ("yes", True), ("false", False)):
        assert load(DEMO, [f"optim.prepare_weights={text}"]).optim.prepare_weights == value
    assert load(DEMO).optim.prepare_weights == "auto"
    with pytest.raises(ConfigError, match="'maybe' is neither auto, true nor false") as error:
        load(DEMO, ["optim.prepare_weights=maybe"])
    assert "optim.prepare_weights" in str(error.value)


def test_every_key_is_explained():
    text = describe_keys()
    for section, info in Config.model_fields.items():
        assert info.annotation is not None
        for key, field in info.annotation.model_fields.items():
            assert f"  {section}.{key} (" in text
            assert field.description, f"{section}.{key} has no docstring"


FREE = {
    *("run", "parallel", "checkpoint", "tracking"),
    *("moe.dispatch_sms", "moe.recompute"),
    *("train.steps", "train.micro_batch", "train.global_batch", "train.device"),
    *("train.deterministic", "train.on_nonfinite", "train.nonfinite_limit"),
    *("train.log_every", "train.valid_every", "train.valid_batches", "train.warmup_steps"),
    *("train.profile", "train.profile_every", "train.trace_step"),
    *("optim.prepare_weights", "data.workers"),
}
"""Sections and keys; a newly marked one must be added here, if no result depends on it."""

SAID = {
    *("optim.lr", "optim.schedule", "optim.warmup_steps", "optim.decay_fraction"),
    *("optim.min_lr_ratio", "optim.weight_decay", "optim.clip_grad", "moe.bias_update_rate"),
    *("optim.grad_dtype", "optim.first_moment_dtype", "model.attention_backend"),
    *("moe.path", "moe.dispatch"),
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


def test_without_a_config_only_that_is_missing(capsys):
    """Overrides are optional, as the usage line says."""
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("the following arguments are required: config\n")
