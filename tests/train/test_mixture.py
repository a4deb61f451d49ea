"""Several sources with weights: each has its share, in an order that seed and step decide."""

import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from scripts.prepare_data import main as prepare_data
from scripts.train_tokenizer import train_bpe
from tests.support.ranks import Training
from tests.support.tiny import TWO_LAYERS, differences, repeated
from tests.train.test_data import (  # noqa: F401
    CONFIG,
    configure,
    one_line,
    own_cache,
    rows,
    steps,
    write_jsonl,
)
from tests.train.test_data_files import start
from train.config import ConfigError, load
from train.data import batches as data
from train.data import order, sources
from train.data.fingerprint import differences as changes
from train.data.order import BLOCK, Mixed, Spread, shares
from train.data.tokens import Joined

NAMES = "abc"
WEIGHTS = [6, 3, 1]


@pytest.fixture
def mixture(tmp_path) -> str:
    """A key for three sources, whose documents are as long as a sequence and name their source; the
    second one is prepared, the third small."""
    for name, count in zip(NAMES, (200, 300, 20), strict=True):
        texts = [f"source {name} no {i:04}" for i in range(count)]
        assert {len(text) for text in texts} == {16}
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    keys = [f"data.path={tmp_path / 'b.jsonl'}", "data.valid_fraction=0.2", "--workers", "1"]
    assert prepare_data([str(CONFIG), "--out", str(tmp_path / "b"), *keys]) == 0
    return key_of(tmp_path / "a.jsonl", tmp_path / "b", tmp_path / "c.jsonl")


def key_of(*paths: Path) -> str:
    pairs = zip(paths, WEIGHTS, strict=False)
    return "data.mixture={" + ", ".join(f"{path}: {weight}" for path, weight in pairs) + "}"


def named(found: list[tuple[int, ...]]) -> Counter:
    """How many sequences are of which source."""
    return Counter(bytes(row).decode()[7] for row in found)


# Shares


@pytest.mark.parametrize("weights", [[1], [1, 1], [6, 3, 1], [1, 1, 1], [0.1, 0.7, 1e-4], [7] * 50])
def test_shares_of_a_block_are_whole_and_near_the_weights(weights):
    found = shares(weights)
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    assert sum(found) == BLOCK
    assert all(abs(a - b) < 1 for a, b in zip(found, exact, strict=True))


def test_each_block_has_exact_shares_and_each_epoch_of_a_source_is_whole(monkeypatch):
    """By brute force: source by source, sample by sample."""
    monkeypatch.setattr(order, "BLOCK", 4000)
    sizes, weights = [7, 300, 1900], [3.0, 2.0, 1.0]
    mixed = Mixed(sizes, weights, seed=3)
    places = [mixed(g) for g in range(8000)]
    firsts = [0, 7, 307]
    for block in (places[:4000], places[4000:]):
        of = Counter(int(np.searchsorted(firsts, place, side="right")) - 1 for place in block)
        assert [of[source] for source in range(3)] == shares(weights)
    for first, size, share in zip(firsts, sizes, shares(weights), strict=True):
        taken = [place - first for place in places if 0 <= place - first < size]
        assert len(taken) == 2 * share
        # In a block they are shuffled, so an epoch's are not in one piece; but of the whole blocks
        # every place was taken equally often, give or take the last epoch.
        times = Counter(taken)
        assert set(range(size)) >= set(times)
        assert max(times.values()) - min(times.values()) <= 1
        assert len(times) == min(size, 2 * share)


def test_each_source_is_shuffled_for_itself_by_the_seed():
    orders = [
        [source(g) for g in range(50)]
        for seed in (1, 2)
        for source in Mixed([50, 50], [1, 1], seed).sources
    ]
    assert all(sorted(one) == [*range(50)] for one in orders)
    assert len({tuple(one) for one in orders}) == 4


def test_validation_begins_with_every_source_in_its_share():
    sizes, weights = [3, 40, 50], [6.0, 3.0, 1.0]
    spread = Spread(sizes, weights)
    for count in (20, 100, 1000, BLOCK, BLOCK + 1000):
        places = [spread(g) for g in range(count)]
        of = Counter(int(np.searchsorted([0, 3, 43], place, side="right")) - 1 for place in places)
        for source, weight in enumerate(weights):
            assert of[source] == pytest.approx(count * weight / 10, abs=2)
    first = [place for place in places if 3 <= place < 43]
    assert first[:80] == [*range(3, 43), *range(3, 43)]  # in their own order, again and again
    around = [spread(g) for g in range(BLOCK - 50, BLOCK + 50)]
    around = [place for place in around if 3 <= place < 43]
    steps = {(b - a) % 40 for a, b in pairwise(around)}
    assert steps == {1}  # over the end of a block too


# Of a run


def test_a_mixture_takes_of_each_source_what_its_weight_says(mixture):
    corpus = data.load(configure(mixture))
    count = 4000
    of = named(rows(islice(corpus.train_batches(0, 1), count // 2)))
    for name, weight in zip(NAMES, WEIGHTS, strict=True):
        assert of[name] == pytest.approx(count * weight / 10, abs=4 * (count * 0.25) ** 0.5)


def test_a_source_of_a_mixture_keeps_to_its_side(mixture):
    corpus = data.load(configure(mixture, "train.valid_batches=1000"))
    train = set(rows(islice(corpus.train_batches(0, 1), 3000)))
    valid = rows(corpus.valid_batches(0, 1))
    assert not train & set(valid)
    alone = [data.load(configure(f"data.path={path}")) for path in load_paths(mixture)]
    whole = [{tuple(row[:-1]) for row in one.train[:]["tokens"].tolist()} for one in alone]
    assert train == set().union(*whole)  # the small ones again and again
    of = named(valid)
    for name, weight in zip(NAMES, WEIGHTS, strict=True):
        assert of[name] == pytest.approx(len(valid) * weight / 10, abs=2)


def load_paths(mixture: str) -> list[str]:
    return [*yaml.safe_load(mixture.partition("=")[2])]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (1, 1), (2, 1), (2, 2), (4, 1)])
def test_a_step_of_a_mixture_takes_the_same_samples_on_any_number_of_ranks(
    mixture, world_size, micro_batch
):
    reference = configure(mixture)
    config = configure(mixture, f"train.micro_batch={micro_batch}")
    expected = steps(reference, data.load(reference), 0, 200)
    assert steps(config, data.load(config), 0, 200, world_size) == expected
    later = steps(config, data.load(config), 150, 50, world_size)
    assert later == expected[150:]


def test_the_seed_decides_the_order_of_a_mixture_and_nothing_else(mixture):
    def run(seed: int) -> tuple[list, list]:
        corpus = data.load(configure(mixture, f"train.seed={seed}"))
        return rows(islice(corpus.train_batches(0, 1), 50)), rows(corpus.valid_batches(0, 1))

    assert run(1) == run(1)
    assert run(1)[0] != run(2)[0]
    assert run(1)[1] == run(2)[1]


def test_worker_processes_change_nothing_of_a_mixture(mixture):
    expected = None
    for workers in (0, 2):
        corpus = data.load(configure(mixture, f"data.workers={workers}"))
        assert isinstance(corpus.train, Joined)
        stream = rows(islice(corpus.train_batches(1, 2, start_step=3), 30))
        expected = expected or stream
        assert stream == expected


def test_validation_of_a_mixture_is_the_same_set_on_any_number_of_ranks(mixture):
    corpus = data.load(configure(mixture))
    expected = rows(corpus.valid_batches(0, 1))
    shared = rows(corpus.valid_batches(0, 2)) + rows(corpus.valid_batches(1, 2))
    assert Counter(shared) == Counter(expected)


def test_the_start_says_the_shares(mixture, tmp_path):
    line = data.load(configure(mixture)).describe()
    assert line.startswith(f"60.00% of {tmp_path / 'a.jsonl'}: 1 json file(s), 200 document(s); ")
    assert f"30.00% of {tmp_path / 'b.jsonl'}: 1 json file(s), 300 document(s), prepared in" in line
    assert "10.00% of " in line


def test_a_tokenizer_is_trained_on_all_sources(tmp_path):
    for name, count in zip(NAMES, (20, 30, 2), strict=True):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"source {name} no {i:04}" for i in range(count)])
    config = configure(key_of(*(tmp_path / f"{name}.jsonl" for name in NAMES)))
    texts = [*sources.training_texts(config)]
    assert {text[7] for text in texts[:3]} == set(NAMES)
    alone = [configure(f"data.path={tmp_path / f'{name}.jsonl'}") for name in NAMES]
    assert Counter(texts) == Counter(text for one in alone for text in sources.training_texts(one))


# Resumed


def test_the_fingerprint_is_of_each_source_and_its_weight(mixture, tmp_path):
    before = data.load(configure(mixture)).fingerprint()
    assert json.loads(json.dumps(before)) == before
    heavier = data.load(configure(mixture.replace(": 6", ": 8"))).fingerprint()
    lines = changes(before, heavier)
    assert lines[0].startswith("source 1: weight: 0.6 there, 0.66")
    other = write_jsonl(tmp_path / "other.jsonl", [f"source c no {i + 9:04}" for i in range(20)])
    changed = data.load(configure(mixture.replace(str(tmp_path / "c.jsonl"), str(other))))
    lines = changes(before, changed.fingerprint())
    assert "source 3: the text of the documents changed" in lines
    assert all(line.startswith("source 3: ") for line in lines)
    doubled = mixture.replace(": 6", ": 12").replace(": 3", ": 6").replace(": 1}", ": 2}")
    assert changes(before, data.load(configure(doubled)).fingerprint()) == []


@pytest.mark.slow
def test_a_run_on_a_mixture_is_resumed_bit_for_bit(tmp_path):
    keys = [
        f"run.dir={tmp_path}",
        "data.mixture={models/moe: 2, train/data: 1}",
        "optim.schedule=constant",
        "data.valid_fraction=0.2",
    ]

    def run(name: str, ranks: int, steps: int, *more: str) -> None:
        these = [f"run.name={name}", f"train.steps={steps}", *keys, *more]
        with Training(ranks, [*TWO_LAYERS, *these], tmp_path / f"{name}-{steps}.log") as training:
            assert set(training.exit_codes()) == {0}, training.log.read_text()

    run("straight", 2, 6)
    run("resumed", 2, 3)
    run("resumed", 2, 6)
    assert not differences(repeated(tmp_path / "straight"), repeated(tmp_path / "resumed"))
    config = load(tmp_path / "resumed" / "config.yaml")
    assert config.data.mixture == {"models/moe": 2, "train/data": 1}
    with pytest.raises(AssertionError, match="source 1: weight"):
        run("resumed", 2, 8, "data.mixture={models/moe: 3, train/data: 1}")


# Bad input


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{a: 0}", "a has the weight 0 of 0; give it"),
        ("{a: 1, b: -1}", "b has the weight -1 of 0; give it"),
        ("{a: 1, b: 1e-9}", "b has the weight 1e-09 of 1; give it a share of 0.01% or more"),
        ("{a: many}", "data.mixture.a='many': input should be a valid number"),
        ("{a: .inf}", "data.mixture.a"),
        ("{a: .nan}", "data.mixture.a"),
        ("{a: }", "data.mixture.a"),
        ("{a: 1, a: 2}", "gives a again"),
        ("[a, b]", "data.mixture=['a', 'b']"),
        ("a", "data.mixture='a'"),
        ("{a: {b: 1}}", "data.mixture.a"),
    ],
)
def test_bad_weights_are_one_line(value, words):
    with pytest.raises(ConfigError) as error:
        configure(f"data.mixture={value}")
    assert words in one_line(error)


@pytest.mark.parametrize("other", ["data.path=models", "data.name=a/b"])
def test_one_of_path_name_and_mixture(other):
    with pytest.raises(ConfigError, match="are both set; keep one"):
        configure("data.mixture={a: 1}", other)


def test_a_source_that_cannot_be_read_is_named(mixture, tmp_path):
    train_bpe(iter(["some text"]), 300).save(str(tmp_path / "t.json"))
    (tmp_path / "c.jsonl").write_text('{"body": "a"}\n')
    for keys, words in (
        (
            [mixture],
            f"data.mixture: data.path={tmp_path / 'c.jsonl'} cannot be read as json: data.text",
        ),
        ([key_of(tmp_path / "gone")], f"data.mixture: data.path={tmp_path / 'gone'}: no such file"),
        (
            [mixture, f"data.tokenizer={tmp_path / 't.json'}"],
            f"data.mixture: data.tokenizer={tmp_path / 't.json'} is not what",
        ),
    ):
        config = configure(*keys)
        with pytest.raises(ConfigError) as error:
            start(config)
        assert words in one_line(error)
