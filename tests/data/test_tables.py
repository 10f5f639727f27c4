"""Tables: CSV as RFC 4180 has it, Parquet and Arrow with the values that JSON would give, and what damages them."""

import csv
import io
import json
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from jaxtune.data import tables
from jaxtune.data.sources import read_records
from tests.data.conftest import message

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada, née 😀"}]
ROWS = [
    {"messages": TURNS, "n": 1, "tags": ["a", "b"]},
    {"messages": TURNS[:1], "n": None, "tags": []},
    {"messages": [], "n": 3, "tags": None},
]


def values(path: str) -> list[dict]:
    return [value for _, value in read_records(path)]


def parquet_bytes(rows: list[dict] = ROWS, **options) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def arrow_bytes(make, rows: list[dict] = ROWS, **options) -> bytes:
    sink, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with make(sink, table.schema) as writer:
        writer.write_table(table, **options)
    return sink.getvalue()


# --- CSV ---


def test_cells_are_strings_and_carry_the_line_on_which_their_row_begins(write):
    path = write("a.csv", 'q,a\n1,"two\nlines, and ""quotes"""\n\n3,[1]\n')
    assert list(read_records(path)) == [
        ("a.csv:2", {"q": "1", "a": 'two\nlines, and "quotes"'}),
        ("a.csv:5", {"q": "3", "a": "[1]"}),
    ]


def test_tabs_separate_the_cells_of_tsv(write):
    assert values(write("a.tsv", "q\ta\nx, y\tz\n")) == [{"q": "x, y", "a": "z"}]


def test_what_the_csv_module_writes_is_read_back(write):
    rows = [["q", "a"], ["é,\r\n", '"'], ["", " x "], ["\t", "'"]]
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    assert [list(value.values()) for value in values(write("a.csv", text.getvalue()))] == rows[1:]


def test_a_byte_order_mark_is_no_part_of_the_first_column(write):
    assert values(write("a.csv", b"\xef\xbb\xbfq,a\r\n1,2\r\n")) == [{"q": "1", "a": "2"}]


def test_a_cell_may_be_larger_than_the_csv_module_would_have_it(write):
    assert len(values(write("a.csv", f"q,a\n1,{'x' * 500_000}\n"))[0]["a"]) == 500_000


@pytest.mark.parametrize(("row", "cells"), [("1", 1), ("1,2,3", 3)])
def test_a_ragged_row_is_named(write, row, cells):
    path = write("a.csv", f'q,a\n"1\n1",2\n{row}\n')
    assert message(path) == f"a.csv:4: {cells} cells; the header has 2 columns"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('q,a\n1,"two\n3,4\n', "a.csv:2: not valid CSV: unexpected end of data; a quote is never closed"),
        ('q,a\n1,2\n1,"t"wo\n', "a.csv:3: not valid CSV: ',' expected after '\"'"),
        ("q,q\n1,2\n", "a.csv:1: the header has 'q' more than once"),
        (b'q,a\n1,"\n\xff"\n', "a.csv:3: not UTF-8 text (bytes ff 22 0a)"),
        (b"q,a\n1,\0\n", "a.csv:2: a NUL byte"),
        (b"q,\xff\n1,2\n", "a.csv:1: not UTF-8 text"),
        ("q,a\n1,2\n".encode("utf-16"), "a.csv: UTF-16 text"),
        ("q,a\n", "a.csv: empty"),
        ("", "a.csv: empty"),
    ],
)
def test_what_is_wrong_in_a_csv_is_named(write, content, says):
    assert message(write("a.csv", content)).startswith(says)


# --- Parquet and Arrow ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", parquet_bytes()),
        ("a.arrow", arrow_bytes(pa.ipc.new_file)),
        ("a.arrow", arrow_bytes(pa.ipc.new_stream)),
        ("a.feather", arrow_bytes(pa.ipc.new_file)),
        ("a.PARQUET", parquet_bytes(compression="zstd", row_group_size=1)),
    ],
)
def test_nested_values_are_those_of_json(write, name, content):
    found = list(read_records(write(name, content)))
    assert [where for where, _ in found] == [f"{name} (row {number})" for number in (1, 2, 3)]
    assert [value for _, value in found] == ROWS == json.loads(json.dumps(ROWS))
    assert type(found[0][1]["messages"][0]) is dict


def test_a_map_is_an_object(write):
    table, sink = pa.table({"m": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))}), io.BytesIO()
    parquet.write_table(table, sink)
    assert values(write("a.parquet", sink.getvalue())) == [{"m": {"k": 1}}]


def test_rows_are_counted_through_row_groups_and_batches(write):
    rows = [{"n": number} for number in range(1000)]
    path = write("a.parquet", parquet_bytes(rows, row_group_size=300))
    assert [where for where, _ in read_records(path)][-1] == "a.parquet (row 1000)"
    assert values(path) == rows == values(write("a.arrow", arrow_bytes(pa.ipc.new_stream, rows, max_chunksize=70)))


def test_a_table_is_read_as_it_is_needed(write, monkeypatch):
    """Two hundred thousand rows, of which one is asked for."""
    rows = [{"n": number} for number in range(200_000)]
    path = write("a.parquet", parquet_bytes(rows, row_group_size=1000))
    made, whole = [], tables._rows

    def watched(batches, path):
        return whole((made.append(batch.num_rows) or batch for batch in batches), path)

    monkeypatch.setattr(tables, "_rows", watched)
    assert next(read_records(path))[1] == {"n": 0}
    assert sum(made) <= 1000


@pytest.mark.parametrize("content", [b"", b"PAR1", parquet_bytes()[:-9], parquet_bytes()[:200], b"nope" * 50])
def test_a_damaged_parquet_file_is_named(write, content):
    assert message(write("a.parquet", content)).startswith("a.parquet: damaged, cut off, or not what its name says: ")


@pytest.mark.parametrize("make", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("cut", [0, 3, 60, 0.5, -9])
def test_a_cut_off_arrow_file_is_named(write, make, cut):
    whole = arrow_bytes(make)
    text = message(write("a.arrow", whole[: int(cut * len(whole)) if isinstance(cut, float) else cut]))
    assert text.startswith("a.arrow: damaged"), text


def test_bytes_of_a_table_that_are_no_text_are_an_error(write):
    content = arrow_bytes(pa.ipc.new_stream, [{"text": "abcdefgh"}]).replace(b"abcdefgh", b"abc\xffefgh")
    assert "a.arrow: damaged" in message(write("a.arrow", content))


def test_a_checksum_that_does_not_fit_is_an_error(write):
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    content = parquet_bytes([{"t": "abcdefgh"}], write_page_checksum=True, **plain)
    assert "a.parquet: damaged" in message(write("a.parquet", content.replace(b"abcdefgh", b"abcdefgx", 1)))


def test_an_old_feather_file_is_told_apart(write):
    assert "Feather of version 1" in message(write("a.feather", b"FEA1" + bytes(40)))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_tables_column_that_is_there_twice_is_named(write, name):
    table, sink = pa.table([pa.array([letter]) for letter in "abc"], names=["q", "a", "a"]), io.BytesIO()
    if name == "a.parquet":
        parquet.write_table(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
    assert message(write(name, sink.getvalue())) == (
        f"{name}: the table has 'a' more than once; each column needs a name"
    )


def test_a_table_without_rows_is_empty(write):
    sink = io.BytesIO()
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), sink)
    assert message(write("a.parquet", sink.getvalue())) == "a.parquet: empty: there is no row in it"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst"])
def test_without_pyarrow_the_message_says_what_to_install(write, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    text = message(write(name, b"x"))
    assert text.startswith(f"{name}: this kind of file needs pyarrow")
    assert text.endswith("pip install pyarrow")


def test_a_missing_table_is_named():
    for name in ("none.parquet", "none.arrow", "none.csv", "none.jsonl.zst", "none.jsonl.gz"):
        assert message(name) == f"{name}: cannot be read: No such file or directory"
