"""Pre-tokenised documents: learnt whole or in pieces, from maps of their files, and refused where they do not fit."""

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxtune.config import DataSection, EvalSection, TrainSection
from jaxtune.data import Data, build_data, documents
from jaxtune.data.megatron import DTYPES
from jaxtune.data.pieces import split
from jaxtune.errors import ConfigError, DataError
from jaxtune.tokenizer import vocabulary_size
from tests.data.documents import DOCUMENTS, write
from tests.data.templates import word_tokenizer
from tests.runs import sections, write_config

VOCAB = vocabulary_size(word_tokenizer())

# Pieces


@pytest.mark.parametrize("room", [2, 3, 4, 7, 100])
def test_every_token_but_the_first_is_learnt_once_in_pieces_that_fit(room):
    lengths = np.arange(2, 30)
    pieces = split(lengths, room)
    assert pieces.lengths.min() >= 2 and pieces.lengths.max() <= room
    learnt = Counter(
        (int(document), int(offset) + at) for document, offset, length in zip(*pieces) for at in range(1, int(length))
    )
    assert learnt == Counter((document, at) for document, length in enumerate(lengths) for at in range(1, length))


def test_pieces_are_as_long_as_they_can_be():
    assert [part.tolist() for part in split(np.array([4, 9, 5, 10]), 4)] == [
        [0, 1, 1, 1, 2, 2, 3, 3, 3],
        [0, 0, 3, 6, 0, 3, 0, 3, 6],
        [4, 4, 4, 3, 4, 2, 4, 4, 4],
    ]


# Learning


def build(path, eval=None, train=None, tokenizer=None, vocab_size=0, **section) -> Data:
    section = DataSection(path=path, format="megatron", **{"max_length": 8, **section})
    settings = TrainSection(**{"batch_size": 2, "epochs": 1, **(train or {})})
    return build_data(
        section, EvalSection(**(eval or {})), settings, tokenizer or word_tokenizer(), vocab_size=vocab_size
    )


def segments(data) -> list[list[int]]:
    """The documents of one pass as they stand in the rows, where they begin at 0 and all but the first is learnt."""
    found = []
    for batch in data.batches():
        for tokens, targets, mask, positions, numbers in zip(
            *(array.reshape(-1, array.shape[-1]) for array in batch.arrays().values())
        ):
            for number in range(1, numbers.max(initial=0) + 1):
                here = numbers == number
                assert positions[here].tolist() == list(range(here.sum()))
                assert targets[here][:-1].tolist() == tokens[here][1:].tolist()
                assert mask[here].tolist() == [True] * (here.sum() - 1) + [False]
                found.append(tokens[here].tolist())
    return found


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.kind in "iu"], ids=str)
@pytest.mark.parametrize("packing", [True, False])
def test_documents_are_learnt_throughout_whatever_the_type_of_their_tokens(tmp_path, dtype, packing):
    data = build(write(tmp_path / "a", dtype=dtype), packing=packing)
    assert sorted(segments(data.train)) == sorted(text for text in DOCUMENTS if len(text) > 1)
    assert next(data.train.batches()).tokens.dtype == np.int32
    assert data.sources[0].lengths.rows == 5 and data.sources[0].lengths.dropped_silent == 2


def test_several_data_sets_of_different_types_are_one(tmp_path):
    paths = [write(tmp_path / "a", dtype=DTYPES[5]), write(tmp_path / "none", [])]
    paths.append(write(tmp_path / "b", [[11, 12, 13], [14, 15]], DTYPES[8]) + ".idx")
    data = build(paths, shuffle=False, packing=False)
    assert segments(data.train) == [[3, 1, 4, 1, 5], [2, 6], [5, 3, 5, 8, 9, 7, 9], [11, 12, 13], [14, 15]]
    assert data.train.examples.num_supervised == 4 + 1 + 6 + 2 + 1


def test_examples_are_views_of_the_files(tmp_path):
    examples = build([write(tmp_path / "a"), write(tmp_path / "b")], too_long="split", max_length=4).train.examples
    assert len(examples.files) == 2
    for index in range(len(examples)):
        tokens, _ = examples.read(index)
        assert any(np.shares_memory(tokens, file) for file in examples.files)


def test_tokens_are_looked_at_and_hashed_without_a_copy_of_them_in_memory(tmp_path):
    path = write(tmp_path / "a", [np.arange(2_000_000) % VOCAB] * 2, DTYPES[8])
    tracemalloc.start()
    data = build(path, max_length=1024, too_long="split")
    assert data.train.fingerprint and data.train.batch(1).num_tokens == 2048
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < Path(path + ".bin").stat().st_size / 4


LONG = [list(range(7, 17)), [1, 2]]


@pytest.mark.parametrize(
    ("too_long", "expected"),
    [
        ("drop", [[1, 2]]),
        ("truncate", [[1, 2], [7, 8, 9, 10]]),
        ("split", [[1, 2], [7, 8, 9, 10], [10, 11, 12, 13], [13, 14, 15, 16]]),
    ],
)
def test_a_document_longer_than_a_row_is_dropped_cut_or_split(tmp_path, too_long, expected):
    data = build(write(tmp_path / "a", LONG), max_length=4, too_long=too_long)
    counts = data.sources[0].lengths
    assert sorted(segments(data.train)) == expected
    fates = {"drop": counts.dropped_long, "truncate": counts.truncated, "split": counts.split}
    assert fates == {name: int(name == too_long) for name in fates}


def test_a_document_that_is_too_long_can_be_an_error(tmp_path):
    paths = [write(tmp_path / "a", DOCUMENTS), write(tmp_path / "b", LONG)]
    with pytest.raises(DataError) as caught:
        build(paths, too_long="error", max_length=6)
    assert "2 of 7 rows are longer than data.max_length 6" in str(caught.value)
    assert "a: document 4: 7 tokens, the longest" in str(caught.value) and "b: document 0: 10" in str(caught.value)
    assert "truncate, split or drop" in str(caught.value)


def test_virtual_tokens_take_of_the_room_of_every_piece(tmp_path):
    section = DataSection(path=write(tmp_path / "a", LONG), format="megatron", max_length=5, too_long="split")
    data = build_data(section, EvalSection(), TrainSection(batch_size=1, epochs=1), word_tokenizer(), range(90, 92))
    assert sorted(data.train.examples.lengths.tolist()) == [2, 2, 3, 3, 3, 3]
    for batch in data.train.batches():
        assert batch.tokens[0, 0, :2].tolist() == [90, 91]


def test_texts_are_split_as_tokens_are(tmp_path):
    """The same documents, once as text and once as tokens: the same rows."""
    texts = ["a b c d e f g h i", "j k", "l m n o p"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokens = [[*word_tokenizer().encode(text), word_tokenizer().eos_token_id] for text in texts]
    rows = {"max_length": 4, "too_long": "split", "packing": True}
    settings = EvalSection(), TrainSection(batch_size=2, epochs=1)
    text = DataSection(path=str(tmp_path / "a.jsonl"), format="text", **rows)
    as_text = build_data(text, *settings, word_tokenizer())
    as_tokens = build(write(tmp_path / "a", tokens), **rows)
    assert [batch.sha256() for batch in as_text.train.batches()] == [
        batch.sha256() for batch in as_tokens.train.batches()
    ]
    assert as_text.sources[0].lengths.split == as_tokens.sources[0].lengths.split == 2


def test_a_text_far_longer_than_a_row_is_tokenised_to_its_end(tmp_path):
    words = 64 * 4 * 3
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a " * words + "z"}))
    section = DataSection(path=str(tmp_path / "a.jsonl"), format="text", max_length=4, too_long="split")
    data = build_data(section, EvalSection(), TrainSection(batch_size=8, epochs=1), word_tokenizer())
    assert sum(batch.num_supervised for batch in data.train.batches()) == words + 1


@pytest.mark.parametrize("format", ["alpaca", "sharegpt", "messages"])
def test_conversations_are_not_split(format):
    with pytest.raises(ValueError, match="the second piece of a conversation would be an answer without its question"):
        DataSection(path="a.json", format=format, too_long="split")


@pytest.mark.parametrize("settings", [{"system": "x"}, {"train_on_prompt": True}, {"columns": {"text": "t"}}])
def test_what_tokens_have_no_use_for_is_refused(settings):
    with pytest.raises(ValueError, match="format megatron"):
        DataSection(path="a", format="megatron", **settings)


def test_documents_are_held_out_whole(tmp_path):
    texts = [[n, n + 1, n + 2] for n in range(20)]
    data = build(write(tmp_path / "a", texts), eval={"fraction": 0.2})
    assert len(segments(data.eval)) == 4
    assert sorted(segments(data.train) + segments(data.eval)) == texts


def test_the_held_out_data_may_be_files_of_their_own(tmp_path):
    data = build(write(tmp_path / "a"), eval={"path": write(tmp_path / "b", [[1, 2, 3]])})
    assert segments(data.eval) == [[1, 2, 3]]


# What cannot be learnt from


@pytest.mark.parametrize("token", [VOCAB, -1, 2**40])
def test_a_token_that_the_model_does_not_have_is_refused_where_it_stands(tmp_path, monkeypatch, token):
    monkeypatch.setattr(documents, "_BLOCK", 4)
    path = write(tmp_path / "a", [[1, 2, 3, 4, 5], [6, token, 7]], DTYPES[5])
    with pytest.raises(DataError, match=rf"a\.bin: byte 48: token {token}; the model has tokens 0 to {VOCAB - 1};"):
        build(path)


def test_a_signed_type_is_looked_through_however_many_tokens_the_model_has(tmp_path):
    with pytest.raises(DataError, match="byte 1: token -3"):
        build(write(tmp_path / "a", [[1, -3]], DTYPES[2]), vocab_size=1000)


def test_rows_of_the_embedding_without_a_word_may_be_tokens(tmp_path):
    path = write(tmp_path / "a", [[1, VOCAB]])
    assert segments(build(path, vocab_size=VOCAB + 1).train) == [[1, VOCAB]]


def test_a_type_that_holds_only_tokens_of_the_model_is_not_looked_through(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK", None)
    assert build(write(tmp_path / "a", dtype=DTYPES[1]), vocab_size=256).train.rows == 2
    with pytest.raises(TypeError):
        build(write(tmp_path / "a", dtype=DTYPES[1]), vocab_size=255)


@pytest.mark.parametrize("code", [6, 7])
def test_numbers_that_are_no_tokens_are_refused(tmp_path, code):
    with pytest.raises(DataError, match=r"a\.idx: byte 17: float\d\d numbers, which are no tokens"):
        build(write(tmp_path / "a", dtype=DTYPES[code]))


@pytest.mark.parametrize("texts", [[], [[]], [[5], []]])
def test_data_with_nothing_to_learn_is_refused(tmp_path, texts):
    with pytest.raises(DataError, match="nothing to learn from"):
        build(write(tmp_path / "a", texts))


def test_an_empty_list_of_data_sets_is_refused():
    with pytest.raises(DataError, match=r"eval\.path: an empty list; give the prefix"):
        documents.read_documents([], DataSection(path="-", format="megatron"), 0, VOCAB, "eval.path")


# The fingerprint, by which a run that goes on knows its data


def test_other_tokens_other_bounds_and_another_order_have_another_fingerprint(tmp_path):
    one = write(tmp_path / "one")
    same = write(tmp_path / "same")
    others = [
        write(tmp_path / "token", [*DOCUMENTS[:-1], [5, 3, 5, 8, 9, 7, 8]]),
        write(tmp_path / "bounds", [[3, 1, 4, 1, 5, 9, 2, 6], *DOCUMENTS[4:]]),
        write(tmp_path / "type", dtype=DTYPES[8]),
    ]
    prints = [build(path).train.fingerprint for path in (one, *others)]
    prints += [build(one, max_length=6, too_long=way).train.fingerprint for way in ("drop", "truncate", "split")]
    assert build(same).train.fingerprint == prints[0] and len(set(prints)) == len(prints)


def test_a_model_trains_on_a_data_set_split_across_packs(run_cli, tiny_model, tmp_path):
    texts = [np.random.default_rng(n).integers(3, 384, 20 + 30 * n) for n in range(6)]
    data = {"path": write(tmp_path / "a", texts, DTYPES[8]), "format": "megatron", "too_long": "split"}
    tree = sections(tiny_model("qwen2"), tmp_path / "home", steps=2, data=data, train={"batch_size": 4})
    done = run_cli("--config", write_config(tmp_path / "run.yaml", tree))
    assert done.returncode == 0, done.stderr
    assert "6 rows, none dropped, none truncated, 4 split" in done.stdout
    steps = [json.loads(line) for line in (tmp_path / "home" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2] and all(0 < row["loss"] < 20 for row in steps)


def test_tokens_past_the_models_vocabulary_end_the_run_before_it_begins(tiny_model, tmp_path):
    from jaxtune.config import make_config
    from jaxtune.loop import train

    data = {"path": write(tmp_path / "a", [[1, 2, 384]]), "format": "megatron"}
    with pytest.raises(DataError, match="token 384; the model has tokens 0 to 383"):
        train(make_config(sections(tiny_model("qwen2"), tmp_path / "home", data=data)))


def test_a_number_of_virtual_tokens_that_leaves_no_room_is_refused(tmp_path):
    section = DataSection(path=write(tmp_path / "a"), format="megatron", max_length=4, too_long="split")
    with pytest.raises(ConfigError, match="needs 2 tokens at least"):
        build_data(section, EvalSection(), TrainSection(), word_tokenizer(), range(90, 93))
