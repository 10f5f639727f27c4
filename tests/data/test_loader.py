"""Batches: a pure function of the step, the same tokens packed and unpacked, every example as often as asked."""

import json
import random
import re
from collections import Counter

import numpy as np
import pytest

from jaxtune.config import DataSection, EvalSection, TrainSection
from jaxtune.data import Batch, Data, Dataset, build_data
from jaxtune.data.dataset import KEPT
from jaxtune.data.examples import join
from jaxtune.errors import ConfigError, DataError
from tests.data.templates import MARKED, tokenizer, word_tokenizer
from tests.peer import CHATML

RANDOM = np.random.default_rng(0)


def examples(count: int = 40, longest: int = 20):
    """Examples of different tokens, so that each can be told from the others."""
    parts, number = [], 0
    for length in RANDOM.integers(2, longest + 1, count):
        mask = RANDOM.random(length) < 0.5
        mask[0] = False
        parts.append((np.arange(number, number + length, dtype=np.int32), mask))
        number += length
    return join(parts)


def dataset(given=None, **settings) -> Dataset:
    return Dataset(given or examples(), **{"time": 32, "batch_size": 4, **settings})


def rows_of(batches) -> list[tuple[np.ndarray, ...]]:
    """(tokens, targets, mask, positions, segments) of every row, micro-batches laid end to end."""
    rows = []
    for batch in batches:
        arrays = [array.reshape(-1, array.shape[-1]) for array in batch.arrays().values()]
        rows += zip(*arrays)
    return rows


def documents(batches) -> Counter:
    """Every document of the batches as bytes of (tokens, targets, mask, positions), and how often it occurs."""
    found: Counter = Counter()
    for *arrays, segments in rows_of(batches):
        for segment in range(1, segments.max(initial=0) + 1):
            found[b"|".join(array[segments == segment].tobytes() for array in arrays)] += 1
    return found


def first_tokens(batches) -> list[int]:
    """What identifies the documents, in order."""
    return [
        int(token)
        for tokens, _, _, positions, segments in rows_of(batches)
        for token in tokens[(positions == 0) & (segments > 0)]
    ]


def test_a_row_is_laid_out_as_the_model_reads_it():
    given = join(
        [
            (np.array([5, 6, 7], np.int32), np.array([0, 0, 1], bool)),
            (np.array([8, 9], np.int32), np.array([0, 1], bool)),
        ]
    )
    batch = dataset(given, time=8, batch_size=2, shuffle=False).batch(1)
    expected = {
        "tokens": [5, 6, 7, 8, 9, 0, 0, 0],
        "targets": [0, 7, 0, 9, 0, 0, 0, 0],
        "mask": [0, 1, 0, 1, 0, 0, 0, 0],
        "positions": [0, 1, 2, 0, 1, 0, 0, 0],
        "segments": [1, 1, 1, 2, 2, 0, 0, 0],
    }
    for name, array in batch.arrays().items():
        assert array.shape == (1, 2, 8)
        assert array[0, 0].tolist() == expected[name], name
        assert not array[0, 1].any(), "the batch is filled up with an empty row"
    assert {array.dtype.name for array in batch.arrays().values()} == {"int32", "bool"}
    assert (batch.num_tokens, batch.num_supervised) == (5, 2)


def test_a_target_is_the_next_token_of_the_same_document():
    for batch in dataset().batches():
        for tokens, targets, mask, _, segments in rows_of([batch]):
            at = np.flatnonzero(mask)
            assert (targets[at] == tokens[at + 1]).all()
            assert (segments[at] == segments[at + 1]).all() and (segments[at] > 0).all()
            assert not targets[~mask].any()


def test_all_that_is_supervised_is_a_target_once_an_epoch():
    given = examples()
    targets = Counter(int(t) for batch in dataset(given).batches() for t in batch.targets[batch.mask])
    assert targets == Counter(given.tokens[given.supervised].tolist())


@pytest.mark.parametrize("epochs", [1, 2])
def test_packed_and_unpacked_hold_the_same_documents(epochs):
    given = examples()
    packed, unpacked = (documents(dataset(given, packing=p, epochs=epochs).batches()) for p in (True, False))
    assert packed == unpacked
    assert set(packed.values()) == {epochs} and len(packed) == len(given)


def test_the_batch_of_a_step_is_the_same_in_any_order_of_access():
    data = dataset(epochs=3)
    steps = list(range(1, data.steps + 1))
    hashes = {step: batch.sha256() for step, batch in zip(steps, data.batches())}
    random.Random(0).shuffle(steps)
    fresh = dataset(data.examples, epochs=3)
    assert {step: fresh.batch(step).sha256() for step in steps} == hashes


def test_plans_that_were_given_up_are_made_again():
    data = dataset(epochs=9)
    hashes = [batch.sha256() for batch in data.batches()]
    assert len(data._epochs) == KEPT
    for step in range(data.steps, 0, -7):
        assert data.batch(step).sha256() == hashes[step - 1]


def test_in_order_packs_are_a_stream_of_their_own():
    given = examples()
    best, in_order = dataset(given), dataset(given, packing="in_order")
    assert documents(best.batches()) == documents(in_order.batches())
    assert best.fingerprint != in_order.fingerprint and in_order.rows > best.rows


def test_rows_that_are_not_asked_for_are_left_empty():
    data = dataset(micro_batches=2, epochs=1)
    for whole, part in zip(data.batches(), data.batches(rows={1, 2}), strict=True):
        for name, array in whole.arrays().items():
            expected = np.zeros_like(array).reshape(-1, array.shape[-1])
            expected[[1, 2]] = array.reshape(expected.shape)[[1, 2]]
            np.testing.assert_array_equal(part.arrays()[name].reshape(expected.shape), expected)


def test_batches_can_begin_at_any_step():
    data = dataset(epochs=2)
    for first in (1, 2, data.steps, data.steps + 1):
        found = [batch.sha256() for batch in data.batches(first)]
        assert found == [data.batch(step).sha256() for step in range(first, data.steps + 1)]


def test_more_steps_or_epochs_only_make_the_stream_longer():
    given = examples()
    long = [batch.sha256() for batch in dataset(given, epochs=5).batches()]
    assert [batch.sha256() for batch in dataset(given, steps=9).batches()] == long[:9]
    assert [batch.sha256() for batch in dataset(given, epochs=2).batches()][:-1] == long[
        : dataset(given, epochs=2).steps - 1
    ]


def test_micro_batches_split_the_same_batch():
    given = examples()
    whole, *splits = (dataset(given, micro_batches=m) for m in (1, 2, 4))
    for step in range(1, whole.steps + 1):
        for split in splits:
            batch = split.batch(step)
            assert batch.tokens.shape == (split.shape[0], 4 // split.shape[0], 32)
            assert batch.sha256() == whole.batch(step).sha256()
            np.testing.assert_array_equal(batch.segments.reshape(4, 32), whole.batch(step).segments[0])


def test_steps_win_over_epochs_and_go_round_again():
    data = dataset(examples(5), packing=False, steps=10, epochs=1, batch_size=2)
    counts = documents(data.batches())
    assert data.steps == 10 and len(counts) == 5 and set(counts.values()) == {4}


@pytest.mark.parametrize(
    ("epochs", "message"),
    [(1e-300, "train.epochs 1e-300: no row, and so no step, of the 40"), (1e300, "train.epochs 1e[+]300: some 1e")],
)
def test_epochs_that_come_to_no_step_or_to_too_many_are_refused_before_they_are_counted(epochs, message):
    with pytest.raises(ConfigError, match=message):
        dataset(packing=False, epochs=epochs)


def test_each_epoch_has_an_order_of_its_own():
    firsts = first_tokens(dataset(examples(12), packing=False, epochs=3).batches())
    epochs = [firsts[i : i + 12] for i in (0, 12, 24)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1


def test_part_of_an_epoch_is_that_part_of_its_rows():
    given = examples(10)
    half = dataset(given, packing=False, epochs=0.5, batch_size=2)
    assert half.steps == 3 and len(first_tokens(half.batches())) == 5
    assert len(first_tokens(dataset(given, packing=False, epochs=2.3).batches())) == 23
    assert len(first_tokens(dataset(given, packing=False, epochs=0.001).batches())) == 1


def test_the_last_batch_is_filled_up_and_nothing_is_dropped():
    data = dataset(examples(10), packing=False)
    assert data.steps == 3
    last = data.batch(3)
    assert last.segments.any(axis=-1).tolist() == [[True, True, False, False]]


def test_unshuffled_examples_come_in_their_order():
    given = examples(10)
    firsts = first_tokens(dataset(given, packing=False, shuffle=False, epochs=2).batches())
    assert firsts == given.tokens[given.starts[:-1]].tolist() * 2


def test_seeds_give_other_orders():
    given = examples()
    assert len({dataset(given, seed=seed).batch(1).sha256() for seed in range(5)}) == 5


def test_the_fingerprint_tells_everything_that_changes_the_stream():
    given = examples()
    same = dataset(given).fingerprint
    assert (
        dataset(
            join([(given.tokens[a:b], given.supervised[a:b]) for a, b in zip(given.starts, given.starts[1:])])
        ).fingerprint
        == same
    )
    assert dataset(given, epochs=7).fingerprint == dataset(given, micro_batches=2).fingerprint == same
    assert dataset(given, steps=3).fingerprint == same
    tokens, mask = given.tokens.copy(), given.supervised.copy()
    tokens[3] += 1
    mask[3] ^= True
    others = [
        dataset(given, seed=1),
        dataset(given, packing=False),
        dataset(given, shuffle=False),
        dataset(given, time=64),
        dataset(given, batch_size=8),
        dataset(type(given)(tokens, given.supervised, given.starts)),
        dataset(type(given)(given.tokens, mask, given.starts)),
        dataset(given.take(np.arange(len(given))[::-1])),
    ]
    assert len({same, *(other.fingerprint for other in others)}) == 1 + len(others)


def test_hashes_never_change():
    parts = [(np.arange(n, dtype=np.int32), np.arange(n) > 1) for n in (3, 9, 4, 20, 7)]
    data = dataset(join(parts))
    assert data.fingerprint[:16] == "57a99438370d64e2"
    assert data.batch(1).sha256()[:16] == "beeb14c2a181a78b"


def test_the_hash_of_a_batch_covers_all_of_it():
    batch = dataset().batch(1)
    hashes = {batch.sha256()}
    for name, array in batch.arrays().items():
        changed = array.copy()
        changed[0, 0, 0] = 1 - changed[0, 0, 0]
        hashes.add(Batch(**{**batch.arrays(), name: changed}).sha256())
    assert len(hashes) == 6


def test_steps_outside_the_run_are_refused():
    data = dataset()
    for step in (0, -1, data.steps + 1):
        with pytest.raises(IndexError):
            data.batch(step)


def test_an_iterator_can_be_left_early():
    data = dataset(steps=1000)
    assert next(data.batches()).sha256() == data.batch(1).sha256()


@pytest.fixture
def write(tmp_path):
    """write(name, answers) -> the path of an alpaca file; the answers are words of the word tokenizer."""

    def write(name: str, answers: list[str]) -> str:
        rows = [{"instruction": "a", "output": answer} for answer in answers]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


def build(path, *, tok=None, eval: dict | None = None, train: dict | None = None, **section) -> Data:
    section = {"max_length": 64, **section}
    made = DataSection(path=path, **section), EvalSection(**eval or {}), TrainSection(**train or {})
    return build_data(*made, tok or word_tokenizer())


LETTERS = [f"{a} {b}" for a in "abcdefghij" for b in "klmno"]


def answers(data: Dataset) -> list[str]:
    """What is learnt in one pass, sorted."""
    tok, texts = word_tokenizer(), []
    for *_, targets, mask, _, segments in ((t, *rest) for t, *rest in rows_of(data.batches())):
        for segment in range(1, segments.max(initial=0) + 1):
            texts.append(tok.decode(targets[mask & (segments == segment)]).removesuffix("<|im_end|>").strip())
    return sorted(texts)


@pytest.mark.parametrize("packing", [True, False])
def test_files_become_batches(write, packing):
    data = build(write("a.jsonl", LETTERS), packing=packing, train={"epochs": 1})
    assert answers(data.train) == sorted(LETTERS) and data.eval is None


@pytest.mark.parametrize(("fraction", "held"), [(0.1, 5), (0.001, 1), (0.99, 49), (0.5, 25)])
def test_a_fraction_is_held_out_whole_and_never_all(write, fraction, held):
    data = build(write("a.jsonl", LETTERS), eval={"fraction": fraction}, train={"epochs": 1})
    assert len(answers(data.eval)) == held
    assert sorted(answers(data.train) + answers(data.eval)) == sorted(LETTERS)


def test_what_is_held_out_depends_on_the_seed_alone(write):
    def held(seed: int, **section):
        return tuple(answers(build(path, eval={"fraction": 0.2}, train={"seed": seed}, **section).eval))

    path = write("a.jsonl", LETTERS)
    assert held(0) == held(0, packing=False) == held(0, shuffle=False)
    assert len({held(seed) for seed in range(4)}) == 4


@pytest.mark.parametrize(
    ("samples", "train", "held"),
    [
        (None, "349c071799b9df9b", "18c4eab2093d3c40"),
        (30, "ea5ae3721f69076a", "34605b5db1868501"),
        (50, "dd2fb6b1dd8a9d27", "e20845d866459bf1"),
    ],
)
def test_what_is_held_out_never_changes(write, samples, train, held):
    data = build(write("a.jsonl", LETTERS), eval={"fraction": 0.1}, num_samples=samples)
    assert (data.train.fingerprint[:16], data.eval.fingerprint[:16]) == (train, held)


def test_copies_of_a_row_stand_on_one_side(write):
    """With num_samples past all rows, they come again; rows that are alike in a file are rows of their own."""
    path = write("a.jsonl", LETTERS[:20])
    data = build(path, num_samples=50, eval={"fraction": 0.25}, train={"epochs": 1})
    trained, held = Counter(answers(data.train)), Counter(answers(data.eval))
    assert not trained.keys() & held.keys() and len(held) == 5
    assert sorted((trained + held).values()) == [2] * 10 + [3] * 10

    sources = [{"path": path, "num_samples": 40}, {"path": write("b.jsonl", LETTERS[20:])}]
    mixed = build([], sources=sources, eval={"fraction": 0.2}, train={"epochs": 1})
    trained, held = Counter(answers(mixed.train)), Counter(answers(mixed.eval))
    assert not trained.keys() & held.keys() and len(held) == 10 < held.total()

    twice = build(write("c.jsonl", LETTERS[:20] * 2), eval={"fraction": 0.25}, train={"epochs": 1})
    assert len(answers(twice.eval)) == 10


@pytest.mark.parametrize("settings", [{}, {"num_samples": 9}])
def test_one_row_cannot_be_split(write, settings):
    with pytest.raises(DataError, match="only 1 row is left to learn from; at least 2 are needed"):
        build(write("a.jsonl", ["b"]), eval={"fraction": 0.5}, **settings)


def test_a_file_is_held_out(write):
    data = build(write("a.jsonl", LETTERS[:10]), eval={"path": write("b.jsonl", LETTERS[10:13])}, train={"epochs": 1})
    assert answers(data.train) == LETTERS[:10] and answers(data.eval) == LETTERS[10:13]


def test_a_bad_held_out_file_is_named(write, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"instruction": "a"}\n')
    with pytest.raises(DataError, match=r'b\.jsonl:1: no column "output"'):
        build(write("a.jsonl", LETTERS), eval={"path": str(tmp_path / "b.jsonl")})


def test_evaluation_is_one_unshuffled_pass_in_the_shape_of_training(write):
    train = {"batch_size": 4, "micro_batches": 2, "epochs": 3}
    data = build(write("a.jsonl", LETTERS), eval={"path": write("b.jsonl", LETTERS[:9])}, train=train, packing=False)
    batches = list(data.eval.batches())
    assert [batch.tokens.shape for batch in batches] == [data.train.batch(1).tokens.shape] * 3 == [(2, 2, 64)] * 3
    assert first_letters(batches) == [answer.replace(" ", "")[:1] for answer in LETTERS[:9]]


def first_letters(batches) -> list[str]:
    tok = word_tokenizer()
    rows = [(targets[mask], segments) for _, targets, mask, _, segments in rows_of(batches)]
    return [tok.decode(targets[:1]) for targets, segments in rows if segments.any()]


@pytest.mark.parametrize(
    ("longest", "max_length", "packing", "time"),
    [(10, 999, False, 64), (65, 999, False, 128), (65, 100, False, 100), (10, 100, True, 100), (64, 99, False, 64)],
)
def test_rows_are_as_long_as_they_must_be(write, longest, max_length, packing, time):
    path = write("a.jsonl", ["b", "b " * (longest - 7)])  # the question and the template are 7 tokens
    data = build(path, packing=packing, max_length=max_length)
    assert data.train.examples.lengths.max() == longest
    parted = build(path, packing=packing, max_length=max_length, eval={"fraction": 0.5})
    assert data.train.shape[-1] == parted.train.shape[-1] == parted.eval.shape[-1] == time


def test_another_held_out_file_leaves_the_training_data_as_they_are(write):
    paths = [write(f"{words}.jsonl", ["c " * words]) for words in (1, 200)]
    train = write("a.jsonl", ["b " * 70])
    short, long = (build(train, eval={"path": path}, packing=False, max_length=500) for path in paths)
    assert [part.shape[-1] for part in (short.train, short.eval, long.train, long.eval)] == [128, 128, 128, 256]
    assert short.train.fingerprint == long.train.fingerprint


def test_a_template_file_wins_over_the_tokenizers(write, tmp_path):
    (tmp_path / "t.jinja").write_text(CHATML.replace("<|im_end|>", " z <|im_end|>"))
    data = build(write("a.jsonl", ["b"]), template=str(tmp_path / "t.jinja"))
    assert answers(data.train)[0] == "b z"


def test_texts_need_no_template(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "It is late."}\n')
    data = build(str(tmp_path / "a.jsonl"), tok=tokenizer(None), format="text", train={"epochs": 1})
    batch = data.train.batch(1)
    expected = [*tokenizer().encode("It is late."), tokenizer().eos_token_id]
    assert batch.tokens[batch.segments > 0].tolist() == expected
    assert batch.targets[batch.mask].tolist() == expected[1:]


def test_a_batch_that_does_not_split_is_refused(write):
    with pytest.raises(ConfigError, match=r"batch_size 8 does not split into train\.micro_batches 3"):
        build(write("a.jsonl", ["b"]), train={"batch_size": 8, "micro_batches": 3})


def test_marks_that_leave_out_the_end_are_told(write, tmp_path):
    short = MARKED.replace(" + '<|im_end|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|im_end|>' }}")
    assert short != MARKED
    for source, notes in ((MARKED, 0), (short, 1)):
        (tmp_path / "t.jinja").write_text(source)
        data = build(write("a.jsonl", ["b"]), tok=tokenizer(), template=str(tmp_path / "t.jinja"))
        assert len(data.notes) == notes and all("leave out the <|im_end|>" in note for note in data.notes)


def test_a_template_with_a_clock_is_told(write, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    data = build(write("a.jsonl", ["b"]), template=str(tmp_path / "t.jinja"))
    assert "always 26 July 2024" in data.notes[0]


class TestVirtualTokens:
    """Ids past the vocabulary that a tuning method puts before every example."""

    IDS = range(1000, 1003)

    def test_they_stand_before_every_example_and_are_never_learnt(self):
        given = join([(np.array([10, 11, 12], np.int32), np.array([False, True, True]))] * 2)
        batch = dataset(given, time=14, batch_size=1, virtual=self.IDS).batch(1)
        document = [1000, 1001, 1002, 10, 11, 12]
        assert batch.tokens[0, 0].tolist() == [*document, *document, 0, 0]
        assert batch.targets[0, 0].tolist() == [*[0, 0, 0, 11, 12, 0] * 2, 0, 0]
        assert batch.mask[0, 0].tolist() == [*[False, False, False, True, True, False] * 2, False, False]
        assert batch.positions[0, 0].tolist() == [*range(6), *range(6), 0, 0]
        assert batch.segments[0, 0].tolist() == [1] * 6 + [2] * 6 + [0, 0]

    @pytest.mark.parametrize("packing", [True, False])
    def test_they_take_room_and_are_not_counted(self, packing):
        given = examples()
        data = dataset(given, packing=packing, virtual=self.IDS)
        plain = dataset(given, packing=packing)
        assert (data.rows > plain.rows) == packing
        assert sum(b.num_tokens for b in data.batches()) == sum(b.num_tokens for b in plain.batches())
        assert sum(b.num_supervised for b in data.batches()) == sum(b.num_supervised for b in plain.batches())
        assert documents(data.batches()) == documents(dataset(given, packing=True, virtual=self.IDS).batches())

    def test_their_number_is_part_of_the_fingerprint(self):
        given = examples()
        kinds = [range(0), range(1000, 1003), range(1000, 1004), range(999, 1002)]
        assert len({dataset(given, virtual=ids).fingerprint for ids in kinds}) == len(kinds)

    def build(self, path, virtual, **section):
        sections = DataSection(path=path, **section), EvalSection(), TrainSection()
        return build_data(*sections, word_tokenizer(), virtual)

    def test_conversations_are_cut_to_the_room_that_they_leave(self, write):
        path = write("a.jsonl", [" ".join("abcdefghij" * 3), "b"])
        (cut, short) = sorted(self.build(path, self.IDS, max_length=20).train.examples.lengths, reverse=True)
        assert cut == 17
        assert short < 17
        assert self.build(path, range(0), max_length=20).train.examples.lengths.max() == 20
        data = self.build(path, self.IDS, max_length=200, packing=False)
        assert data.train.shape[-1] == 64
        with pytest.raises(DataError, match="max_length 20 less 3 virtual tokens"):
            self.build(path, self.IDS, max_length=20, too_long="error")

    def test_no_room_beside_them_is_refused(self, write):
        with pytest.raises(ConfigError, match=r"data.max_length 4: tune.num_virtual_tokens 3 .* 2 tokens at least"):
            self.build(write("a.jsonl", ["b"]), self.IDS, max_length=4)

    def test_the_report_counts_them_apart(self, write, capsys):
        from rich.console import Console

        data = self.build(write("a.jsonl", LETTERS), self.IDS, max_length=64)
        data.report(Console(width=200))
        out = capsys.readouterr().out
        assert re.search(r"virtual tokens before each +3\n", out)
        lengths = data.train.examples.lengths
        filled = (lengths.sum() + 3 * len(lengths)) / (data.train.rows * 64)
        assert f"{1 - filled:.1%}" in out
