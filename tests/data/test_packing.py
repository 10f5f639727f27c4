"""Packing: every example once, none split, few holes, and an order that seed and epoch alone decide."""

import hashlib
import time
import tracemalloc
from itertools import chain

import numpy as np
import pytest

from jaxtune.data import Dataset, packing
from jaxtune.data.examples import join
from jaxtune.data.mixing import Sources
from jaxtune.data.packing import plan_epoch, shuffled

RANDOM = np.random.default_rng(0)
LENGTHS = {
    "short": RANDOM.integers(1, 100, 1000),
    "one": np.array([7]),
    "full": np.full(20, 128),
    "halves": np.full(21, 64),
    "ones": np.ones(300, int),
    "mixed": np.clip(RANDOM.lognormal(3.5, 0.8, 3000).astype(int) + 1, 1, 128),
}


def plan(lengths, *, space=128, seed=0, epoch=0, packing=True, shuffle=True):
    return plan_epoch(lengths, space, seed=seed, epoch=epoch, packing=packing, shuffle=shuffle)


def rows(epoch) -> list[list[int]]:
    return [epoch.row(index).tolist() for index in range(len(epoch))]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("packed", [True, "in_order", False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_stands_in_one_row_that_has_room_for_it(lengths, packed, shuffle):
    found = rows(plan(lengths, packing=packed, shuffle=shuffle))
    assert sorted(chain(*found)) == list(range(len(lengths)))
    assert all(row and lengths[row].sum() <= 128 for row in found)
    assert packed or all(len(row) == 1 for row in found)


@pytest.mark.parametrize("name", ["short", "mixed"])
def test_packs_are_nearly_full(name):
    lengths = LENGTHS[name]
    least = -(-lengths.sum() // 128)
    assert len(plan(lengths)) <= 1.02 * least + 1


def test_what_fits_exactly_is_packed_exactly():
    assert len(plan(LENGTHS["halves"])) == 11
    assert len(plan(LENGTHS["ones"])) == 3
    assert len(plan(np.array([100, 28] * 40))) == 40


def test_each_example_goes_where_it_leaves_the_least_room():
    assert rows(plan(np.array([100, 90, 20]), shuffle=False)) == [[0, 2], [1]]
    assert rows(plan(np.array([90, 100, 30, 20]), shuffle=False)) == [[0, 2], [1, 3]]


def test_the_plan_depends_on_seed_and_epoch_alone():
    lengths = LENGTHS["short"]
    assert rows(plan(lengths, seed=1, epoch=2)) == rows(plan(lengths.copy(), seed=1, epoch=2))
    orders = {tuple(plan(lengths, seed=seed, epoch=epoch).order) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_unshuffled_rows_are_opened_in_order():
    lengths = LENGTHS["short"]
    assert rows(plan(lengths, packing=False, shuffle=False)) == [[i] for i in range(len(lengths))]
    firsts = [row[0] for row in rows(plan(lengths, shuffle=False, seed=5, epoch=3))]
    assert firsts == sorted(firsts)


def written_out(window, lengths, space: int, longest_first: bool) -> list[list[int]]:
    """Best fit as its definition has it, one example at a time; of rooms alike, the one that was made last."""
    rows, left = [], []
    for example in sorted(window, key=lambda example: -lengths[example]) if longest_first else window:
        fits = [at for at, (room, _) in enumerate(left) if room >= lengths[example]]
        if fits:
            room, row = left.pop(min(fits, key=lambda at: (left[at][0], -at)))
        else:
            room, row = space, []
            rows.append(row)
        row.append(int(example))
        left.append((room - lengths[example], row))
    return rows


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_what_is_put_together_at_once_is_what_one_after_another_would_be(seed, shuffle, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 60)
    random = np.random.default_rng(seed)
    space = int(random.integers(5, 80))
    lengths = random.integers(1, (space if seed % 2 else min(space, 9)) + 1, 200)
    order = shuffled(200, "examples", seed, 3) if shuffle else np.arange(200)
    expected = [row for part in np.array_split(order, 3) for row in written_out(part, lengths, space, shuffle)]
    if shuffle:
        expected = [expected[at] for at in shuffled(len(expected), "rows", seed, 3)]
    assert rows(plan(lengths, space=space, seed=seed, epoch=3, shuffle=shuffle)) == expected


def test_plans_never_change():
    digest = hashlib.sha256()
    for name in sorted(LENGTHS):
        lengths = np.arange(1, 1000) * 7919 % 127 + 1 if name == "mixed" else np.arange(1, 200) % 11 + 1
        found = plan(lengths, seed=3, epoch=2)
        digest.update(found.order.astype("<i8").tobytes() + found.starts.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "55540d84fc613e8d"


def test_in_order_a_row_is_closed_when_the_next_example_does_not_fit():
    lengths = np.array([100, 90, 20, 28, 100, 28, 128, 1])
    found = rows(plan(lengths, packing="in_order", shuffle=False))
    assert found == [[0], [1, 2], [3, 4], [5], [6], [7]]


def test_in_order_rows_follow_the_shuffle():
    lengths = LENGTHS["short"]
    found = plan(lengths, packing="in_order", seed=4, epoch=1)
    assert found.order.tolist() == shuffled(len(lengths), "examples", 4, 1).tolist()
    assert len(found) > len(plan(lengths))


def test_a_million_examples_take_few_bytes_each():
    tracemalloc.start()
    plan(RANDOM.integers(1, 300, 100_000), space=1024)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000 * 60


def test_long_examples_do_not_come_first():
    lengths = LENGTHS["mixed"]
    longest = [lengths[row].max() for row in rows(plan(lengths))]
    early, late = np.array_split(np.array(longest), 2)
    assert abs(early.mean() - late.mean()) < 0.1 * np.mean(longest)


def test_windows_keep_examples_together_that_the_shuffle_put_together(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 100)
    lengths = LENGTHS["short"]
    window_of = np.empty(len(lengths), int)
    window_of[shuffled(len(lengths), "examples", 0, 0)] = np.arange(len(lengths)) // 100
    assert all(len(set(window_of[row])) == 1 for row in rows(plan(lengths)))


def test_a_hundred_thousand_examples_take_a_moment():
    lengths = RANDOM.integers(1, 300, 100_000)
    start = time.process_time()
    plan(lengths, space=1024)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_shuffled_is_a_permutation(count):
    assert sorted(shuffled(count, 1)) == list(range(count))


def test_shuffled_never_changes():
    assert shuffled(8, "examples", 0, 0).tolist() == [2, 4, 5, 0, 6, 3, 1, 7]


def test_shuffled_sorts_by_splitmix64():
    """Written out with Python's own integers."""
    word = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & word
        x = (x ^ x >> 27) * 0x94D049BB133111EB & word
        return x ^ x >> 31

    start = int.from_bytes(hashlib.sha256(b"('rows', 3)").digest()[:8], "little")
    keys = [mix(start + (i + 1) * 0x9E3779B97F4A7C15 & word) for i in range(500)]
    assert shuffled(500, "rows", 3).tolist() == sorted(range(500), key=keys.__getitem__)


def test_shuffled_is_fair():
    where = np.array([shuffled(10, key).tolist().index(0) for key in range(2000)])
    counts = np.bincount(where, minlength=10)
    assert counts.min() > 140 and counts.max() < 260  # 200 each expected, with a deviation of 13


def test_shuffled_reads_its_whole_key():
    keys = [(1, 2), (2, 1), (12,), ("1", 2), ("a", 1), ("b", 1)]
    assert len({tuple(shuffled(50, *key)) for key in keys}) == len(keys)


def of_lengths(*lengths):
    return join([(np.arange(n, dtype=np.int32), np.arange(n) >= max(1, n - 4)) for n in lengths])


@pytest.mark.parametrize(
    ("lengths", "settings", "expected"),
    [
        ((32, 32, 32), {}, True),
        ((32, 5, 28), {}, True),  # the two shortest are 33 together
        ((32, 5, 27), {}, False),
        ((30, 5, 27), {"virtual": range(99, 100)}, True),  # one more each
        ((5, 5, 5), {"packing": False}, True),
        ((5,), {}, True),
        ((20, 20), {"share_prefix": True}, False),  # of which 16 stand there once
        ((16, 32), {"sources": Sources(("a",), (2,), (1.0,))}, False),  # which may come twice in an epoch
    ],
)
def test_it_is_known_whether_a_row_may_hold_two_examples(lengths, settings, expected):
    made = Dataset(of_lengths(*lengths), time=32, batch_size=4, steps=20, **settings)
    assert made.one_each == expected
    most = max(batch.segments.max() for batch in made.batches())
    assert (most == 1) == expected or "sources" in settings
