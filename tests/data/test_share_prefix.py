"""What all conversations begin with, written once a pack: nothing is lost, and each has its own places."""

import json

import numpy as np
import pytest
from pydantic import ValidationError

from jaxtune.config import DataSection
from jaxtune.data.dataset import WORTH_SHARING, Dataset
from jaxtune.data.documents import Documents
from jaxtune.data.examples import Chosen, join
from jaxtune.segments import PADDING, SHARED
from tests.data.templates import say, word_tokenizer

START = 10


def examples(count=30, longest=20, start=START, seed=0):
    """Examples of different tokens after `start` that are the same; what predicts the first of them is among those."""
    draw, parts, number = np.random.default_rng(seed), [], start
    for length in draw.integers(3, longest + 1, count):
        tokens = np.concatenate([np.arange(start), np.arange(number, number + length)]).astype(np.int32)
        mask = draw.random(len(tokens)) < 0.5
        mask[: start + 1] = False
        mask[-1] = True
        parts.append((tokens, mask))
        number += length
    return join(parts)


def dataset(given=None, **settings) -> Dataset:
    return Dataset(given or examples(), **{"time": 48, "batch_size": 4, "share_prefix": True, **settings})


def apart(made: Dataset, start: int) -> list[list[tuple[int, ...]]]:
    """Every document, its shared start put back: (token, target, supervised, position) of its tokens."""
    found = []
    for batch in made.batches():
        arrays = [array.reshape(-1, array.shape[-1]) for array in batch.arrays().values()]
        for *row, segments in zip(*arrays):
            assert not (segments == SHARED)[start:].any()
            before = [array[:start] for array in row]
            for number in range(1, segments.max(initial=0) + 1):
                own = [array[segments == number] for array in row]
                whole = [np.concatenate(both) for both in zip(before, own)] if start else own
                found.append([*zip(*(array.tolist() for array in whole))])
    return sorted(found)


@pytest.mark.parametrize("packing", [True, "in_order"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_with_its_start_put_back_every_document_is_what_it_is_without_sharing(packing, shuffle):
    shared = dataset(packing=packing, shuffle=shuffle)
    assert shared.shared == START
    alone = dataset(packing=False, shuffle=shuffle)
    assert alone.shared == 0
    assert apart(shared, START) == apart(alone, 0)


def test_a_row_is_laid_out_as_the_model_reads_it():
    first, second = [*range(1, 9), 20, 21, 22], [*range(1, 9), 30, 31]
    given = join([(np.array(tokens, np.int32), np.arange(len(tokens)) >= 9) for tokens in (first, second)])
    batch = dataset(given, time=16, batch_size=2, shuffle=False).batch(1)
    expected = {
        "tokens": [*range(1, 9), 20, 21, 22, 30, 31, 0, 0, 0],
        "targets": [*[0] * 8, 21, 22, 0, 31, 0, 0, 0, 0],
        "mask": [*[0] * 8, 1, 1, 0, 1, 0, 0, 0, 0],
        "positions": [*range(8), 8, 9, 10, 8, 9, 0, 0, 0],
        "segments": [*[SHARED] * 8, 1, 1, 1, 2, 2, *[PADDING] * 3],
    }
    for name, array in batch.arrays().items():
        assert array[0, 0].tolist() == expected[name], name
        assert not array[0, 1].any(), "an empty row has no start"
    assert (batch.num_tokens, batch.spared, batch.num_supervised) == (13, 8, 3)


def test_fewer_packs_hold_as_much():
    given = examples(200)
    shared, repeated = dataset(given), dataset(given, share_prefix=False)
    assert shared.rows < 0.8 * repeated.rows
    assert sum(batch.num_supervised for batch in shared.batches()) == given.num_supervised
    assert sum(batch.num_tokens + batch.spared for batch in shared.batches()) == given.num_tokens
    assert shared.fingerprint != repeated.fingerprint


def test_virtual_tokens_are_part_of_the_start():
    virtual = range(1000, 1003)
    shared = dataset(virtual=virtual)
    assert shared.shared == START + 3
    assert apart(shared, START + 3) == apart(dataset(virtual=virtual, packing=False), 0)
    batch = shared.batch(1)
    assert batch.virtual == 3 * 4 == np.isin(batch.tokens, virtual).sum()
    documents = sum(len(np.unique(row[row > 0])) for row in batch.segments[0])
    assert batch.spared == START * (documents - 4)


def test_the_start_ends_where_examples_part_or_something_is_learnt_or_one_is_used_up():
    def start(*parts):
        return join([(np.array(tokens, np.int32), np.array(mask, bool)) for tokens, mask in parts]).common_start

    assert start(([1, 2, 3, 4], [0, 0, 0, 1]), ([1, 2, 5, 4], [0, 0, 0, 1])) == 2
    assert start(([1, 2, 3, 4, 5], [0, 0, 0, 1, 1]), ([1, 2, 3, 4, 5], [0, 0, 0, 0, 1])) == 2  # 3 predicts a target
    assert start(([1, 2, 3, 4], [0, 0, 0, 1]), ([1, 2], [0, 0])) == 1  # nothing of the second would be left
    assert start(([1, 2, 3], [0, 1, 1]), ([1, 2, 3], [0, 0, 1])) == 0
    assert start(([1, 2, 3], [0, 0, 1]), ([4, 2, 3], [0, 0, 1])) == 0
    assert join([]).common_start == 0
    assert Chosen([examples(5), examples(6)], np.arange(11)).common_start == START


def test_a_column_of_examples_is_what_reading_each_of_them_gives():
    documents = Documents(
        (np.arange(20, dtype=np.uint16), np.arange(50, 90)), np.array([3, 15, 20]), np.array([8, 5, 9])
    )
    both = Chosen([examples(5), documents, examples(6)], np.arange(14)[::-1])
    assert both.common_start == documents.common_start == 0
    for kind in (examples(5), documents, both):
        for place in range(3):
            indices = np.arange(len(kind))[::-1]
            read = [kind.read(index) for index in indices]
            tokens, supervised = kind.at(place, indices)
            assert tokens.tolist() == [tokens[place] for tokens, _ in read]
            assert supervised.tolist() == [mask[place] for _, mask in read]


def test_a_short_start_is_not_shared():
    short = dataset(examples(start=WORTH_SHARING - 1))
    assert (
        short.shared == 0
        and short.fingerprint == dataset(examples(start=WORTH_SHARING - 1), share_prefix=False).fingerprint
    )


@pytest.mark.parametrize("setting", ["packing", "streaming"])
def test_what_it_cannot_go_with_is_said(setting):
    with pytest.raises(ValidationError, match=f"share_prefix.*{setting}"):
        DataSection(path="a.jsonl", share_prefix=True, **{setting: setting != "packing"})


@pytest.fixture
def conversations(tmp_path):
    system = " ".join("abcdefghij")
    turns = [say(f"{a} {b}", "k l", system=system) for a in "klmnopqrst" for b in "klmnopqrst"] * 10
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    return {"path": str(tmp_path / "a.jsonl"), "format": "messages", "max_length": 64}


def reported(section) -> str:
    import io

    from rich.console import Console

    from jaxtune.config import EvalSection, TrainSection
    from jaxtune.data import build_data

    console = Console(file=io.StringIO(), width=200)
    build_data(DataSection(**section), EvalSection(), TrainSection(epochs=1), word_tokenizer()).report(console)
    return console.file.getvalue()


def test_the_report_tells_of_a_start_that_could_be_shared_and_of_one_that_is(conversations):
    assert "begin with the same 15 tokens, " in reported(conversations)
    text = reported({**conversations, "share_prefix": True})
    assert "shared by all, once a pack" in text and "Note" not in text
    padding = float(text.split("padding")[1].split("%")[0])
    assert 0 <= padding < 15


def test_the_report_says_when_nothing_is_shared(conversations, tmp_path):
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps({"messages": say("k", "l", system="z")}) + "\n")
    assert "nothing is shared" in reported({**conversations, "share_prefix": True})


def test_the_preview_shows_the_start_as_a_part_of_its_own(conversations):
    from jaxtune.config import EvalSection, TrainSection
    from jaxtune.data import build_data
    from jaxtune.data.preview import look

    tokenizer = word_tokenizer()
    section = DataSection(**conversations, share_prefix=True)
    data = build_data(section, EvalSection(), TrainSection(epochs=1, batch_size=1), tokenizer)
    (row,) = look(data.train.batch(1), tokenizer, range(0))
    start, first, second, *_ = row.documents
    assert [document.title("conversation", None) for document in (start, first, second)] == [
        "shared start",
        "conversation 1",
        "conversation 2",
    ]
    assert start.tokens[0].position == start.start == 0 and start.supervised == 0
    assert first.tokens[0].position == second.tokens[0].position == first.start == len(start.tokens)
