"""A run is continued only where it is known to be the same, by the checkpoint that is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.ranks import Training, run_train
from tests.support.tiny import TINY, argv, checkpoints
from train.checkpoint import checksums
from train.checkpoint.files import checkpoint_of
from train.checkpoint.same_run import check_checkpoint, check_same_run
from train.config import Config, ConfigError, is_free, is_said, load

ALONE = "parallel.expert_parallel=1"


def config_of(*overrides: str) -> Config:
    return load(TINY[0], [*TINY[1:], *overrides])


def write_checkpoint(
    folder: Path, config: dict[str, Any], step: int = 2, data: dict[str, Any] | None = None
) -> Path:
    """A whole checkpoint of one rank, as far as anybody looks before it is loaded."""
    path = checkpoint_of(folder / "checkpoints", step)
    path.mkdir(parents=True)
    (path / ".metadata").write_bytes(b"")
    about = {"step": step, "world_size": 1, "global_batch": 8} | ({"data": data} if data else {})
    (path / "training.json").write_text(json.dumps(about))
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    sign(path)
    return path


def sign(path: Path) -> None:
    """Make what is in a checkpoint's folder whole."""
    names = {one.name for one in path.iterdir()} - {checksums.NAME}
    checksums.write(path, {name: checksums.hash_file(path / name) for name in names})


def edit_config(path: Path, section: str, key: str, value: object) -> None:
    """As if the run had been started so; the checkpoint stays whole."""
    config = yaml.safe_load((path / "config.yaml").read_text())
    config[section][key] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    sign(path)


def other(value: object) -> object:
    if isinstance(value, bool) or value is None:
        return 7 if value is None else not value
    return value * 2 + 1 if isinstance(value, int | float) else f"another {value}"


KEYS = [(section, key) for section, keys in config_of().model_dump().items() for key in keys]
NEVER_FREE = {
    "model": None,
    "optim": {"weight_decay", "beta1", "beta2", "eps", "clip_grad"},
    "train": {"seed", "dtype"},
    "data": {"valid_fraction", "valid_documents", "shuffle_buffer", "document_mask", "text_column"},
    "moe": {
        *("num_experts", "top_k", "ffn_hidden_size", "capacity", "aux_loss_coeff", "expert_bias")
    },
}
"""All keys of these sections, or the listed ones: a change makes it another run, whatever the marks
say."""


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_each_key_is_refused_unless_it_is_marked(tmp_path, section, key):
    config = config_of()
    before = config.model_dump(mode="json")
    was = before[section][key]
    before[section][key] = other(was)
    path = write_checkpoint(tmp_path, before)
    if is_free(section, key) or (section, key) in (("train", "global_batch"),):
        check_checkpoint(path, config, 1)
        check_same_run(tmp_path, config)
        return
    says = rf"{section}\.{key}: .* there, "
    with pytest.raises(ConfigError, match=says):
        check_checkpoint(path, config, 1)
    with pytest.raises(ConfigError, match=says):
        check_same_run(tmp_path, config)


def test_what_makes_another_training_is_not_marked():
    free = {
        f"{section}.{key}"
        for section, key in KEYS
        if is_free(section, key) and not is_said(section, key)  # those are said: test_config.py
    }
    never = {
        f"{section}.{key}"
        for section, keys in NEVER_FREE.items()
        for key in keys or {key for part, key in KEYS if part == section}
    }
    assert not free & never


@pytest.mark.parametrize("where", ["optim", "train", "attention"])
def test_a_key_of_another_version_cannot_be_told(tmp_path, where):
    """Not even where all others are equal: its meaning is unknown here."""
    config = config_of()
    before = config.model_dump(mode="json")
    before.setdefault(where, {})["sparkle"] = 3
    path = write_checkpoint(tmp_path, before)
    with pytest.raises(ConfigError, match=rf"{where}\.sparkle=3.*the version of this code"):
        check_checkpoint(path, config, 1)
    # What is known to differ is said first.
    with pytest.raises(ConfigError, match=r"train\.seed: 0 there, 5 now"):
        check_same_run(tmp_path, config_of("train.seed=5"))


def test_keys_of_other_versions_that_do_not_matter(tmp_path):
    """A newer one of logging or saving; and those that an older version did not have."""
    config = config_of()
    before = config.model_dump(mode="json")
    before["tracking"]["sparkle"] = 3
    before["checkpoint"]["sparkle"] = 3
    del before["optim"]["eps"], before["model"]["rope_base"], before["checkpoint"]["at_end"]
    del before["tracking"]["mode"]
    path = write_checkpoint(tmp_path, before)
    check_checkpoint(path, config, 1)
    with pytest.raises(ConfigError, match=r"optim\.eps: 1e-08 there, 0\.001 now"):
        check_checkpoint(path, config_of("optim.eps=0.001"), 1)


@pytest.mark.parametrize("text", ["- a list", "train: 3", "{", ""])
def test_a_config_that_is_none_cannot_be_told(tmp_path, text):
    path = write_checkpoint(tmp_path, {})
    (path / "config.yaml").write_text(text)
    sign(path)
    with pytest.raises(ConfigError):
        check_checkpoint(path, config_of(), 1)


def test_another_batch_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, config_of().model_dump(mode="json"))
    check_checkpoint(path, config_of("train.micro_batch=4"), 2)
    with pytest.raises(ConfigError, match=r"train\.global_batch: 8 there, 16 now"):
        check_checkpoint(path, config_of("train.global_batch=16"), 2)


def test_the_data_is_known_by_its_fingerprint(tmp_path):
    config = config_of()
    data = {"documents": 40, "text": "ab", "tokenizer": "cd"}
    path = write_checkpoint(tmp_path, config.model_dump(mode="json"), data=data)
    moved = config_of("data.path=elsewhere")
    check_checkpoint(path, moved, 1, data)
    check_same_run(tmp_path, moved)  # the data is read later
    with pytest.raises(ConfigError, match="documents: 40 there, 41 now"):
        check_checkpoint(path, config, 1, data | {"documents": 41})
    with pytest.raises(ConfigError, match=r"the tokenizer .*changed"):
        check_checkpoint(path, config, 1, data | {"tokenizer": "ef"})
    with pytest.raises(ConfigError, match=r"data\.document_mask: False there, True now"):
        check_checkpoint(path, config_of("data.document_mask=true"), 1, data)
    # Without one, on either side, the keys have to do.
    with pytest.raises(ConfigError, match=r"data\.path: models there, elsewhere now"):
        check_checkpoint(path, moved, 1)
    shutil.rmtree(path)
    path = write_checkpoint(tmp_path, config.model_dump(mode="json"))
    with pytest.raises(ConfigError, match=r"data\.path: models there, elsewhere now"):
        check_checkpoint(path, moved, 1, data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run with the checkpoints of steps 2 and 4, of 2 ranks."""
    folder = tmp_path_factory.mktemp("saved")
    assert run_train(2, argv(folder, "a", "train.steps=4", "checkpoint.every=2")) == [0, 0]
    return folder / "a"


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_not_loaded_is_not_compared(tmp_path, saved):
    """The newest is of another run and damaged; the one before it is of this run, and is loaded."""
    run_dir = shutil.copytree(saved, tmp_path / "a")
    newest = checkpoint_of(run_dir / "checkpoints", 4)
    edit_config(newest, "train", "seed", 5)
    spoil(newest / "__1_0.distcp")
    with Training(2, argv(tmp_path, "a", "train.steps=5"), tmp_path / "log") as training:
        assert training.exit_codes() == [0, 0]
    assert "start     step 2 of 5" in training.log.read_text()


def test_what_is_loaded_is_compared(tmp_path, saved):
    """The newest is of this run and damaged; the one before it, which is whole, is of another."""
    run_dir = shutil.copytree(saved, tmp_path / "a")
    spoil(checkpoint_of(run_dir / "checkpoints", 4) / "__1_0.distcp")
    edit_config(checkpoint_of(run_dir / "checkpoints", 2), "train", "seed", 5)
    with Training(2, argv(tmp_path, "a", "train.steps=5"), tmp_path / "log") as training:
        assert training.exit_codes() == [2, 2]
    log = training.log.read_text()
    assert "train.seed: 5 there, 0 now" in log
    assert "Traceback" not in log
    assert checkpoints(run_dir) == [2, 4], "nothing is renamed by a run that does not start"
