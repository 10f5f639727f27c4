"""Megatron's data sets: read and written as megatron-core does, every damaged field refused, and learnt from whole.

The peer is megatron.core.datasets.indexed_dataset, of the package megatron-core.
"""

import json
import re
import struct
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxtune.config import DataSection, EvalSection, TrainSection
from jaxtune.data import Data, build_data, documents, megatron
from jaxtune.data.megatron import DTYPES, DatasetWriter, open_dataset, smallest_dtype
from jaxtune.data.pieces import split
from jaxtune.errors import ConfigError, DataError
from jaxtune.tokenizer import vocabulary_size
from tests.data.templates import word_tokenizer
from tests.runs import sections, write_config

DOCUMENTS = [[3, 1, 4, 1, 5], [9], [], [2, 6], [5, 3, 5, 8, 9, 7, 9]]
VOCAB = vocabulary_size(word_tokenizer())


@pytest.fixture(scope="session")
def peer():
    """megatron-core's module."""
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def write(prefix: Path, texts=DOCUMENTS, dtype=DTYPES[4]) -> str:
    with DatasetWriter(str(prefix), dtype) as writer:
        for text in texts:
            writer.add_document(text)
        writer.finalize()
    return str(prefix)


def lists(dataset) -> list[list[int]]:
    return [dataset[number].tolist() for number in range(len(dataset))]


# Files of both sides


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
def test_what_megatron_core_wrote_is_read(peer, tmp_path, dtype):
    prefix = str(tmp_path / "a.b")
    builder = peer.IndexedDatasetBuilder(prefix + ".bin", dtype=dtype.type)
    for text in DOCUMENTS:
        builder.add_document(text, [len(text)] if text else [])
    builder.finalize(prefix + ".idx")
    dataset = open_dataset(prefix)
    assert dataset.tokens.dtype == dtype and lists(dataset) == DOCUMENTS


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
def test_what_is_written_is_read_by_megatron_core_and_is_its_own_file_byte_for_byte(peer, tmp_path, dtype):
    ours, theirs = write(tmp_path / "ours", dtype=dtype), str(tmp_path / "theirs")
    builder = peer.IndexedDatasetBuilder(theirs + ".bin", dtype=dtype.type)
    for text in DOCUMENTS:
        builder.add_document(text, [len(text)] if text else [])
    builder.finalize(theirs + ".idx")
    for ending in (".bin", ".idx"):
        assert Path(ours + ending).read_bytes() == Path(theirs + ending).read_bytes()
    dataset = peer.IndexedDataset(ours)
    assert [dataset[i].tolist() for i in range(len(dataset))] == [text for text in DOCUMENTS if text]
    assert dataset.document_indices.tolist() == [0, 1, 2, 2, 3, 4]


def test_a_document_of_several_sentences_is_one_document(peer, tmp_path):
    prefix = str(tmp_path / "a")
    builder = peer.IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    builder.add_document([1, 2, 3, 4, 5], [2, 3])
    builder.add_document([6], [1])
    builder.finalize(prefix + ".idx")
    dataset = open_dataset(prefix)
    assert lists(dataset) == [[1, 2, 3, 4, 5], [6]] and dataset.lengths.tolist() == [2, 3, 1]
    with DatasetWriter(str(tmp_path / "b"), DTYPES[8]) as writer:
        writer.add_document([1, 2, 3, 4, 5], [2, 3])
        writer.add_document([6])
        writer.finalize()
    assert (tmp_path / "b.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()


def test_data_sets_put_together_are_as_megatron_core_puts_them_together(peer, tmp_path):
    parts = [write(tmp_path / name, texts) for name, texts in (("a", DOCUMENTS), ("b", []), ("c", [[7, 7], []]))]
    with DatasetWriter(str(tmp_path / "ours")) as writer:
        for part in parts:
            writer.add_dataset(open_dataset(part))
        writer.finalize()
    theirs = peer.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"))
    for part in (parts[0], parts[2]):  # an empty .bin is one that it cannot map
        theirs.add_index(part)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    assert lists(open_dataset(str(tmp_path / "ours"))) == [*DOCUMENTS, [7, 7], []]
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 151936])
def test_the_type_of_the_tokens_is_the_one_that_megatron_core_takes(peer, vocab_size):
    assert smallest_dtype(vocab_size) == np.dtype(peer.DType.optimal_dtype(vocab_size))


# Reading


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_prefix_and_either_file_name_the_data_set(tmp_path, ending):
    assert lists(open_dataset(write(tmp_path / "a.v1") + ending)) == DOCUMENTS


def test_tokens_are_views_of_a_map_that_cannot_be_written(tmp_path):
    dataset = open_dataset(write(tmp_path / "a"))
    assert np.shares_memory(dataset[0], dataset.tokens) and not dataset.tokens.flags.writeable
    assert not dataset.tokens.flags.owndata


def test_an_empty_data_set_has_no_documents(tmp_path):
    assert len(open_dataset(write(tmp_path / "a", []))) == 0


def refusal(prefix: str) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(prefix)
    return str(caught.value)


# DOCUMENTS is 4 sequences and 6 bounds: lengths from byte 34, pointers from 50, documents from 82 up to 130.
DAMAGES = {
    "magic": (".idx", 0, b"X", "byte 0: b'XMIDIDX"),
    "end of the magic": (".idx", 8, b"\x01", "byte 0: b'MMIDIDX"),
    "version": (".idx", 9, struct.pack("<Q", 2), "byte 9: version 2; allowed: 1"),
    "byte order": (".idx", 9, struct.pack(">Q", 1), "byte 9: version 72057594037927936"),
    "type 0": (".idx", 17, b"\x00", "byte 17: type of tokens 0; allowed: 1 uint8, 2 int8"),
    "type 9": (".idx", 17, b"\x09", "byte 17: type of tokens 9"),
    "wider type": (
        ".idx",
        17,
        b"\x05",
        "byte 58: sequence 1 begins at byte 20 of a.bin, which has 60 bytes; expected 40",
    ),
    "number of sequences": (".idx", 18, struct.pack("<Q", 5), "byte 130: the file ends, but 5 sequences"),
    "huge number of sequences": (".idx", 18, b"\xff" * 8, "byte 130: the file ends"),
    "fewer sequences": (".idx", 18, struct.pack("<Q", 2), "byte 106: 24 bytes too many"),
    "number of documents": (".idx", 26, struct.pack("<Q", 7), "byte 130: the file ends"),
    "no documents": (".idx", 26, bytes(8), "byte 26: no bounds of documents"),
    "longer sequence": (".idx", 34, struct.pack("<i", 6), "byte 58: sequence 1 begins at byte 20"),
    "shorter sequence": (".idx", 42, struct.pack("<i", 1), "byte 74: sequence 3 begins at byte 32"),
    "negative length": (".idx", 38, struct.pack("<i", -1), "byte 38: sequence 1 has -1 tokens"),
    "longer last sequence": (".idx", 46, struct.pack("<i", 8), "byte 46: sequence 3 ends at byte 64 of a.bin"),
    "shorter last sequence": (".idx", 46, struct.pack("<i", 6), "a.bin: byte 56: 4 bytes of no sequence in a.idx"),
    "longest last sequence": (".idx", 46, struct.pack("<i", 2**31 - 1), "byte 46: sequence 3 ends at byte 8589934620"),
    "first pointer": (".idx", 50, struct.pack("<q", 4), "byte 50: sequence 0 begins at byte 4"),
    "pointer inside a token": (".idx", 58, struct.pack("<q", 21), "byte 58: sequence 1 begins at byte 21"),
    "overlap": (".idx", 66, struct.pack("<q", 0), "byte 66: sequence 2 begins at byte 0 of a.bin"),
    "pointer past the end": (".idx", 74, struct.pack("<q", 60), "byte 74: sequence 3 begins at byte 60"),
    "pointer far past the end": (".idx", 74, struct.pack("<q", 2**62), "byte 74: sequence 3 begins at byte 4611686"),
    "negative pointer": (".idx", 58, struct.pack("<q", -20), "byte 58: sequence 1 begins at byte -20"),
    "first document": (".idx", 82, struct.pack("<q", 1), "byte 82: the first document begins with sequence 1"),
    "falling documents": (".idx", 98, struct.pack("<q", 0), "byte 98: document 2 begins with sequence 0, the one"),
    "negative document": (".idx", 90, struct.pack("<q", -1), "byte 90: document 1 begins with sequence -1"),
    "document out of range": (".idx", 114, struct.pack("<q", 5), "byte 122: document 5 begins with sequence 4"),
    "last document": (".idx", 122, struct.pack("<q", 5), "byte 122: the documents end with sequence 5 of 4"),
    "sequences of no document": (".idx", 122, struct.pack("<q", 3), "byte 122: the documents end with sequence 3 of 4"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_field_is_refused_with_file_and_byte(tmp_path, damage):
    ending, at, value, expected = DAMAGES[damage]
    prefix = write(tmp_path / "a")
    path = Path(prefix + ending)
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    path.write_bytes(raw)
    assert len(raw) == 130 and re.search(r"a\.(idx|bin): byte \d+: ", refusal(prefix)) and expected in refusal(prefix)


def test_the_first_bit_of_no_byte_of_an_index_can_flip_and_go_unnoticed(tmp_path):
    prefix = write(tmp_path / "a")
    path = Path(prefix + ".idx")
    raw, unnoticed = path.read_bytes(), []
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x80]) + raw[at + 1 :])
        try:
            open_dataset(prefix)
            unnoticed.append(at)
        except DataError:
            pass
    assert unnoticed == []


@pytest.mark.parametrize("size", range(130))
def test_an_index_that_was_cut_off_is_refused_at_every_length(tmp_path, size):
    prefix = write(tmp_path / "a")
    path = Path(prefix + ".idx")
    path.write_bytes(path.read_bytes()[:size])
    assert f"byte {size if size >= 9 else 0}: " in refusal(prefix)


def test_an_index_with_more_at_its_end_is_refused(tmp_path):
    prefix = write(tmp_path / "a")
    path = Path(prefix + ".idx")
    path.write_bytes(path.read_bytes() + b"\0")
    assert "byte 130: 1 bytes too many: 4 sequences and 6 bounds of documents need 130 bytes" in refusal(prefix)


def test_multimodal_data_is_refused(peer, tmp_path):
    prefix = str(tmp_path / "a")
    builder = peer.IndexedDatasetBuilder(prefix + ".bin", multimodal=True)
    builder.add_document([1, 2, 3], [2, 1], [0, 1])
    builder.finalize(prefix + ".idx")
    assert "byte 74: modes of sequences: the data is multimodal" in refusal(prefix)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (59, "a.idx: byte 46: sequence 3 ends at byte 60 of a.bin, which has 59 bytes"),
        (21, "a.idx: byte 38: sequence 1 ends at byte 24 of a.bin, which has 21 bytes"),
        (0, "a.idx: byte 34: sequence 0 ends at byte 20 of a.bin, which has 0 bytes"),
        (62, "a.bin: byte 60: 2 bytes of no sequence in a.idx"),
    ],
)
def test_a_bin_of_another_size_is_refused(tmp_path, size, expected):
    prefix = write(tmp_path / "a")
    Path(prefix + ".bin").write_bytes((Path(prefix + ".bin").read_bytes() + bytes(9))[:size])
    assert expected in refusal(prefix)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_missing_file_is_named(tmp_path, missing):
    prefix = write(tmp_path / "a")
    Path(prefix + missing).unlink()
    assert f"a{missing}: cannot be read: No such file" in refusal(prefix) and "a.idx and a.bin" in refusal(prefix)


# Writing


def test_nothing_has_its_name_before_all_is_written_and_the_index_gets_it_last(tmp_path, monkeypatch):
    replaced = []
    real = megatron.os.replace
    monkeypatch.setattr(megatron.os, "replace", lambda old, new: (replaced.append(str(new)), real(old, new)))
    with DatasetWriter(str(tmp_path / "a")) as writer:
        writer.add_document([1, 2])
        assert [path.name for path in tmp_path.iterdir()] == ["a.bin.tmp"]
        writer.finalize()
    assert [Path(path).name for path in replaced] == ["a.bin", "a.idx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_a_writer_that_does_not_finish_leaves_no_file_and_does_not_touch_an_older_one(tmp_path):
    prefix = write(tmp_path / "a")
    with DatasetWriter(prefix) as writer:
        writer.add_document([1, 2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert lists(open_dataset(prefix)) == DOCUMENTS


def test_an_older_index_is_gone_before_the_new_tokens_are_there(tmp_path, monkeypatch):
    """What is killed between the two would otherwise leave the old documents over the new tokens."""
    prefix = write(tmp_path / "a")

    def die(old, new):
        raise KeyboardInterrupt

    monkeypatch.setattr(megatron.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", [[8] * 15])
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"] and "a.idx: cannot be read" in refusal(prefix)


@pytest.mark.parametrize(("code", "token"), [(1, 256), (1, -1), (8, 65536), (2, 128), (4, 2**31), (7, 2**24 + 1)])
def test_a_token_that_does_not_fit_is_refused(tmp_path, code, token):
    with DatasetWriter(str(tmp_path / "a"), DTYPES[code]) as writer:
        for tokens in ([1, token], np.array([1, token])):
            with pytest.raises(DataError, match=f"token {token} does not fit {DTYPES[code].name}"):
                writer.add_document(tokens)


def test_lengths_that_are_not_those_of_the_tokens_are_refused(tmp_path):
    with DatasetWriter(str(tmp_path / "a")) as writer:
        for lengths in ([1], [2, 2], [4, -1]):
            with pytest.raises(ValueError, match="do not make a document of 3"):
                writer.add_document([1, 2, 3], lengths)


def test_data_sets_of_another_type_are_not_put_together(tmp_path):
    other = open_dataset(write(tmp_path / "b", dtype=DTYPES[8]))
    with DatasetWriter(str(tmp_path / "a")) as writer, pytest.raises(DataError, match="type uint16; expected int32"):
        writer.add_dataset(other)


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
        tokens, _ = examples.example(index)
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
    with pytest.raises(DataError, match=r"data\.path: an empty list; give the prefix"):
        build([])


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
