"""Several sources: exact shares at every place, epochs of their own, and nothing new where there are no weights."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from jaxtune.config import DataSection, EvalSection, LogSection, TrainSection, make_config
from jaxtune.data import Dataset, build_data, packing
from jaxtune.data.mixing import Interleaving, Sources
from jaxtune.errors import ConfigError, DataError
from jaxtune.metrics import Recorder
from tests.data.templates import word_tokenizer
from tests.data.test_loader import examples

RANDOM = np.random.default_rng(0)
MANY = [round(float(weight), 3) + 0.001 for weight in RANDOM.random(30) ** 4]
WEIGHTS = [[1, 1], [0.7, 0.2, 0.1], [5, 1], [1, 1e-4], [0.123456789, 0.3333333, 2], [1, 2, 3, 4, 5, 6, 7], MANY]
WEIGHTS.append([0.9987654321098765, 0.0012345678901234567])  # they repeat after more places than an int64 counts


def counts_after_each_place(weights, places: int) -> np.ndarray:
    """int [places, sources]"""
    found = Interleaving(weights).places(0, places)
    return np.cumsum(found[:, None] == np.arange(len(weights)), axis=0)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_after_any_number_of_places_each_source_is_within_one_of_its_share(weights):
    counts = counts_after_each_place(weights, 3000)
    shares = np.array(weights) / sum(weights)
    assert np.abs(counts - np.arange(1, 3001)[:, None] * shares).max() < 1


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_places_can_be_asked_for_in_any_order(weights):
    whole = Interleaving(weights).places(0, 2000)
    fresh = Interleaving(weights)
    for start, stop in ((1500, 2000), (3, 4), (0, 700), (700, 1500)):
        assert fresh.places(start, stop).tolist() == whole[start:stop].tolist()
        assert fresh.before(start).tolist() == np.bincount(whole[:start], minlength=len(weights)).tolist()


def test_simple_weights_repeat_after_few_places():
    mix = Interleaving([0.7, 0.2, 0.1])
    assert mix.places(10**15, 10**15 + 20).tolist() == mix.places(0, 20).tolist()
    assert mix.before(10**15 + 10).tolist() == [7 * 10**14 + 7, 2 * 10**14 + 2, 10**14 + 1]


def mixed(counts=(30, 10), weights=(1, 1), **settings) -> Dataset:
    """Examples whose lengths are all alike; those of the first source come first."""
    sources = Sources(tuple("abc"[: len(counts)]), counts, weights)
    given = examples(sum(counts), longest=2)
    return Dataset(given, sources=sources, **{"time": 32, "batch_size": 4, "packing": False, **settings})


def order(data: Dataset, epochs: int = 1) -> list[int]:
    """The examples of the stream, as they follow one another."""
    return [int(i) for row in range(epochs * data.rows) for i in data._row(row)[1]]


def test_an_epoch_has_as_many_examples_as_all_sources_together():
    assert len(order(mixed())) == 40 and mixed().steps == 10


@pytest.mark.parametrize("packing", [True, False])
def test_each_source_goes_through_epochs_of_its_own(packing):
    found = order(mixed(packing=packing, time=6), epochs=3)
    first, second = [i for i in found if i < 30], [i for i in found if i >= 30]
    assert len(first) == len(second) == 60
    if packing:  # three examples a row; rows are shuffled
        first, second = sorted(first), sorted(second)
        assert first == sorted([*range(30)] * 2) and second == sorted([*range(30, 40)] * 6)
        return
    own = [second[at : at + 10] for at in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(30, 40)) for epoch in own)
    assert len({tuple(epoch) for epoch in own}) == 6, "each in an order of its own"
    assert sorted(first[:30]) == sorted(first[30:]) == list(range(30)) and first[:30] != first[30:]


def test_the_order_depends_on_seed_source_and_epoch_alone():
    assert order(mixed()) == order(mixed())
    assert order(mixed(seed=1)) != order(mixed())
    alike = order(mixed((10, 10)))
    assert [i for i in alike if i < 10] != [i - 10 for i in alike if i >= 10]


def test_unshuffled_sources_are_interleaved_in_their_own_order():
    assert order(mixed((4, 2), (2, 1), shuffle=False), 2) == [0, 1, 4, 2, 3, 5] * 2
    assert order(mixed((4, 2), (1, 1), shuffle=False), 2) == [0, 4, 1, 5, 2, 4, 3, 5, 0, 4, 1, 5]


def test_packs_keep_the_shares_from_window_to_window(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 20)
    data = mixed((400, 40), (3, 1), packing=True, time=10)
    rows = [data._row(row)[1] for row in range(data.rows)]
    drawn = np.cumsum([len(row) for row in rows])
    of_second = np.cumsum([np.count_nonzero(row >= 400) for row in rows])
    assert np.abs(of_second - drawn / 4).max() < 6, "at most what one window of 20 can hold back"


def test_without_weights_the_stream_is_that_of_one_source():
    given = examples(40)
    plain = Dataset(given, time=32, batch_size=4)
    several = Dataset(given, time=32, batch_size=4, sources=Sources(("a", "b"), (30, 10)))
    assert several.fingerprint == plain.fingerprint
    assert [b.sha256() for b in several.batches()] == [b.sha256() for b in plain.batches()]


def test_weights_are_part_of_the_fingerprint():
    given = examples(40)
    make = lambda *of: Dataset(given, time=32, batch_size=4, sources=Sources(("a", "b"), *of))  # noqa: E731
    prints = [make((30, 10)), make((30, 10), (1, 1)), make((30, 10), (1, 2)), make((20, 20), (1, 1))]
    assert len({data.fingerprint for data in prints}) == 4


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_counts_its_examples_of_each_source(packing):
    data = mixed((30, 10), None, packing=packing)
    total = {"a": 0, "b": 0}
    for batch in data.batches():
        assert sum(batch.sources.values()) == sum(batch.segments.max(axis=-1).ravel())
        total = {name: total[name] + count for name, count in batch.sources.items()}
    assert total == {"a": 30, "b": 10}
    assert Dataset(examples(3), time=32, batch_size=1).batch(1).sources == {}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """a.jsonl of 30 rows, b.jsonl of 10."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 30), ("b", 10)):
        rows = [{"instruction": name, "output": "c d e f g h"[: 1 + 2 * (n % 6)]} for n in range(count)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def build(*weights: float | None, eval: dict | None = None, names=(None, None), **train):
    sources = [{"path": f"{file}.jsonl", "weight": w, "name": n} for file, w, n in zip("ab", weights, names)]
    made = (
        DataSection.model_validate({"sources": sources, "max_length": 64, "packing": False}),
        EvalSection(**eval or {}),
    )
    return build_data(*made, TrainSection(**{"epochs": 1, **train}), word_tokenizer())


def test_files_are_mixed_as_their_weights_say(files):
    data = build(1.0, 1.0, epochs=3)
    total = {"a.jsonl": 0, "b.jsonl": 0}
    for batch in data.train.batches():
        total = {name: total[name] + count for name, count in batch.sources.items()}
    assert total == {"a.jsonl": 60, "b.jsonl": 60}


def test_held_out_rows_are_taken_from_both_before_they_are_mixed(files):
    data = build(1.0, 3.0, eval={"fraction": 0.25})
    plain = build(None, None, eval={"fraction": 0.25})
    assert len(data.eval.examples) == 10
    assert [b.sha256() for b in data.eval.batches()] == [b.sha256() for b in plain.eval.batches()]
    held = [sum(bool((data.eval.examples.read(i)[0] == word).any()) for i in range(10)) for word in _words("a", "b")]
    assert data.train.sources.counts == (30 - held[0], 10 - held[1])


def _words(*words: str) -> list[int]:
    return word_tokenizer().convert_tokens_to_ids(list(words))


def test_a_source_of_which_nothing_is_left_cannot_have_a_weight(files):
    Path("b.jsonl").write_text('{"instruction": "b", "output": "c"}\n')
    for seed in range(50):
        if build(None, None, eval={"fraction": 0.9}, seed=seed).train.sources.counts[1] == 0:
            break
    with pytest.raises(DataError, match=r"nothing is left of b\.jsonl, which has a weight"):
        build(1.0, 1.0, eval={"fraction": 0.9}, seed=seed)


def test_the_report_has_a_row_for_each_source(files):
    from rich.console import Console

    where = Console(file=io.StringIO(), width=200)
    build(1.0, 1.0, epochs=3, names=("[long]", None)).report(where)
    lines = [line.split() for line in where.file.getvalue().splitlines()]
    assert ["source", "examples", "share", "epochs"] in lines
    assert ["[long]", "30", "50.0%", "2"] in lines and ["b.jsonl", "10", "50.0%", "6"] in lines
    where = Console(file=io.StringIO(), width=200)
    build(None, None, epochs=3).report(where)
    assert ["a.jsonl", "30", "75.0%", "3"] in [line.split() for line in where.file.getvalue().splitlines()]


def test_sources_of_one_path_are_told_apart(tmp_path, files):
    section = DataSection.model_validate({"sources": [{"path": "a.jsonl"}] * 2, "max_length": 64})
    data = build_data(section, EvalSection(), TrainSection(epochs=1), word_tokenizer())
    assert data.train.sources.names == ("a.jsonl", "a.jsonl (2)")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"weight": 1}, {}], r"some have a weight and some have none \(b\); give all of them one"),
        ([{"weight": 1}], "would do nothing with one source"),
        ([{"weight": 0}, {"weight": 1}], r"sources\.0\.weight: should be greater than 0"),
        ([{"name": "x"}, {"name": "x"}], "a name stands twice"),
    ],
)
def test_weights_that_say_nothing_clear_are_refused(sources, message):
    given = [{"path": name, **source} for name, source in zip("ab", sources)]
    with pytest.raises(ConfigError, match=message):
        make_config({"model": {"path": "m"}, "data": {"sources": given}})


def test_the_record_tells_how_many_examples_of_each_source_there_were(tmp_path):
    def step(recorder, number: int, counts: dict[str, int]) -> None:
        numbers = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens": 5, "supervised_tokens": 2, "batch_sha256": "x"}
        recorder.step(number, **numbers, source_examples=counts)

    log = LogSection(every=2)
    with Recorder(tmp_path, log, 4) as recorder:
        for number in (1, 2, 3):
            step(recorder, number, {"a": 3, "b": number})
    with Recorder(tmp_path, log, 4, done=3) as recorder:
        step(recorder, 4, {"a": 0, "b": 1})
        assert [row["source_examples"] for row in recorder.rows] == [{"a": 6, "b": 3}, {"a": 9, "b": 7}]
