"""Megatron's data sets: read and written as megatron-core does, and every damaged field refused.

The peer is megatron.core.datasets.indexed_dataset, of the package megatron-core.
"""

import re
import struct
from pathlib import Path

import numpy as np
import pytest

from jaxtune.data import megatron
from jaxtune.data.megatron import DTYPES, DatasetWriter, open_dataset, smallest_dtype
from jaxtune.errors import DataError
from tests.data.documents import DOCUMENTS, write


@pytest.fixture(scope="session")
def peer():
    """megatron-core's module."""
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


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


def test_a_data_set_that_another_writes_is_refused_and_left_alone(tmp_path):
    prefix = str(tmp_path / "a")
    first = DatasetWriter(prefix)
    first.add_document([1, 2])
    with pytest.raises(DataError, match=r"a\.bin: another process writes it; wait for it or stop it"):
        write(tmp_path / "a", [[9]])
    first.add_document([3])
    first.finalize()
    assert lists(open_dataset(prefix)) == [[1, 2], [3]]
    with DatasetWriter(prefix) as later:
        first.__exit__()  # by now the temporary file is the other's
        later.add_document([4])
        later.finalize()
    assert lists(open_dataset(prefix)) == [[4]]


@pytest.mark.parametrize("tokens", [0, 100_000])
def test_a_writer_that_finds_no_room_leaves_no_file(tmp_path, monkeypatch, tokens):
    """At once, or when what it holds back is flushed. /dev/full takes nothing."""

    def open_full(path, mode):
        Path(path).touch()
        return open("/dev/full", mode)

    monkeypatch.setattr(megatron, "open", open_full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a", [[1, 2], tokens * [3]])
    assert list(tmp_path.iterdir()) == []


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
