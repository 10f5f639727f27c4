"""Examples that lie in several places, or of which only some count, read as if they had been copied together."""

import numpy as np
import pytest

from jaxtune.data import Dataset
from jaxtune.data import examples as module
from jaxtune.data.examples import Chosen, Examples, concatenate, join
from tests.data.test_loader import examples


@pytest.fixture
def parts() -> list[Examples]:
    """Three, one of them with smaller tokens on disk, one of them empty."""
    first, second = examples(20), examples(7)
    small = Examples((second.tokens % 1000).astype(np.uint16), second.supervised, second.starts)
    return [first, join([]), small]


def copied(parts: list[Examples], indices) -> Examples:
    every = [part.read(index) for part in parts for index in range(len(part))]
    return join([every[index] for index in indices])


CHOICES = {
    "all": range(27),
    "some": [0, 1, 2, 5, 18, 19, 20, 21, 26],
    "shuffled": np.random.default_rng(0).permutation(27),
    "again": [3, 3, 4, 22, 3],
    "none": [],
}


@pytest.mark.parametrize("indices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_a_choice_is_read_as_its_copy_is(parts, indices, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    chosen, copy = Chosen(parts, np.array(indices, np.int64)), copied(parts, indices)
    assert len(chosen) == len(copy) and chosen.lengths.tolist() == copy.lengths.tolist()
    for index in range(len(copy)):
        for found, expected in zip(chosen.read(index), copy.read(index), strict=True):
            np.testing.assert_array_equal(found, expected)
    for number, name in enumerate(("tokens", "supervised")):
        runs = [run[number] for run in chosen.runs()]
        assert all(0 < len(run) <= block for run in runs)
        np.testing.assert_array_equal(np.concatenate([[], *runs]), getattr(copy, name))
        np.testing.assert_array_equal(getattr(chosen, name), getattr(copy, name))
    assert (chosen.num_tokens, chosen.num_supervised) == (len(copy.tokens), copy.supervised.sum())


def test_batches_and_fingerprint_are_those_of_a_copy(parts):
    whole = concatenate(parts)
    assert isinstance(whole, Chosen)
    datasets = [Dataset(given, time=32, batch_size=4) for given in (whole, copied(parts, range(27)))]
    assert len({data.fingerprint for data in datasets}) == 1
    assert len({tuple(batch.sha256() for batch in data.batches()) for data in datasets}) == 1


def test_one_part_stays_as_it_is(parts):
    assert concatenate(parts[:1]) is parts[0]


def test_the_largest_token_is_found_in_any_part(parts):
    assert concatenate(parts).largest_token == int(parts[0].tokens.max())
    assert concatenate(parts[1:]).largest_token == int(parts[2].tokens.max())
