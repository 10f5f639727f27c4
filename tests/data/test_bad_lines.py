"""data.on_bad_line: skip leaves out the bad rows and those alone, the same ones each time, and no more than a few."""

import gzip
import io
import json
import random

import pytest
from rich.console import Console

from jaxtune.config import DataSection, EvalSection, TrainSection
from jaxtune.data import build_data
from jaxtune.data.formats import read_rows
from jaxtune.errors import DataError
from tests.data.templates import MISTRAL, say, tokenizer, word_tokenizer

# What is wrong with a line, and what is said of it.
BAD = {
    "broken JSON": (b'{"instruction": oops}', "not valid JSON: Expecting value (column 17)"),
    "cut off": (b'{"instruction": "a", "outp', "not valid JSON: Invalid control character"),
    "NUL": (b'{"instruction": "a", "output": "\0"}', "a NUL byte"),
    "no UTF-8": (b'{"instruction": "a", "output": "\xff"}', "not UTF-8 text (bytes ff 22 7d 0a)"),
    "nested without end": (b"[" * 100_000, "not valid JSON"),
    "a list": (b"[1]", "expected an object with columns, found a list"),
    "another column": (b'{"instruction": "a", "answer": "b"}', 'no column "output"; found instruction, answer'),
    "another type": (b'{"instruction": "a", "output": 3}', 'column "output" is a number; expected a string'),
    "half a character": (b'{"instruction": "a", "output": "\\ud800"}', "half of a surrogate pair"),
}


def good(number: int) -> bytes:
    return json.dumps({"instruction": "abcdefgh"[number % 8], "output": "klmnopqr"[number // 8 % 8]}).encode()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(name, bytes) -> the file's bare name, in the current directory."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return name

    return write


def section(path: str | list[str], **settings) -> DataSection:
    return DataSection(path=path, **{"max_length": 64, "on_bad_line": "skip", **settings})


def refusal(path: str | list[str], **settings) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(section(path, **settings))
    return str(caught.value)


@pytest.mark.parametrize(("line", "says"), BAD.values(), ids=BAD)
def test_a_bad_line_is_skipped_and_told_and_an_error_otherwise(write, line, says):
    path = write("a.jsonl", b"\n".join([good(0), good(1), line, good(2)]) + b"\n")
    rows = read_rows(section(path))
    assert [row.where for row in rows.rows] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"]
    assert rows.bad == 1
    assert rows.bad_first[0].startswith("a.jsonl:3: ") and says in rows.bad_first[0]
    with pytest.raises(DataError) as caught:
        read_rows(section(path, on_bad_line="error"))
    assert str(caught.value) == rows.bad_first[0]


def test_an_error_is_the_default():
    assert DataSection(path="a.jsonl").on_bad_line == "error"


def test_a_torn_last_line_is_skipped(write):
    rows = read_rows(section(write("a.jsonl", good(0) + b"\n" + good(1)[:-3])))
    assert len(rows.rows) == 1
    assert "cut off while it was written" in rows.bad_first[0]


def test_what_is_no_fault_is_no_bad_line(write):
    """A byte order mark, line ends of Windows, blank lines, and a line of 8 MB."""
    long = json.dumps({"instruction": "a", "output": "b" * (8 << 20)}).encode()
    rows = read_rows(section(write("a.jsonl", b"\xef\xbb\xbf" + b"\r\n".join([good(0), b" ", long, good(1)]))))
    assert (len(rows.rows), rows.bad) == (3, 0)


def test_bad_rows_of_other_files_are_skipped_too(write):
    array = write("a.json", b'[\n{"instruction": "a", "output": "b"},\n3,\n{"instruction": "a"}]')
    assert [text.partition(": ")[0] for text in read_rows(section(array)).bad_first] == [
        "a.json:3 (row 2)",
        "a.json:4 (row 3)",
    ]
    table = write("a.csv", b'instruction,output\na,b\na\n"\n\xff",c\nd,\0\ne,f\n')
    rows = read_rows(section(table))
    assert [row.where for row in rows.rows] == ["a.csv:2", "a.csv:7"]
    assert [text.partition(": ")[0] for text in rows.bad_first] == ["a.csv:3", "a.csv:5", "a.csv:6"]
    plain = write("a.txt", b"one\n\xff\ntwo\0\nthree\n")
    rows = read_rows(section(plain, format="text"))
    assert [row.text for row in rows.rows] == ["one", "three"]
    assert [text.partition(": ")[0] for text in rows.bad_first] == ["a.txt:2", "a.txt:3"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b'[{"instruction": "a", "output": "b"}, {"instruction" 3}]', "a.json:1: not valid JSON"),
        ("a.csv", b'instruction,output\na,b\nc,"d\n', "a.csv:3: not valid CSV"),
        ("a.csv", b"instruction,instruction\na,b\n", "a.csv:1: the header"),
        ("a.csv", b"instruction,\xff\na,b\n", "a.csv:1: not UTF-8"),
        ("a.jsonl", "".encode("utf-16"), "a.jsonl: UTF-16"),
        ("a.jsonl", b"\n", "a.jsonl: empty"),
        ("a.jsonl.gz", gzip.compress(b"\n".join(map(good, range(9))), mtime=0)[:-6], "a.jsonl.gz: damaged or cut off"),
        ("a.parquet", b"PAR1", "a.parquet: damaged"),
    ],
)
def test_a_file_that_cannot_be_read_to_its_end_is_never_skipped(write, name, content, says):
    assert refusal(write(name, content)).startswith(says)


@pytest.mark.parametrize(
    ("rows", "bad", "passes"), [(10, 5, True), (10, 6, False), (9990, 10, True), (9990, 11, False)]
)
def test_more_than_a_few_bad_rows_are_a_mistake(write, rows, bad, passes):
    path = write("a.jsonl", b"\n".join([*map(good, range(rows)), *[b"{}"] * bad]))
    if passes:
        assert read_rows(section(path)).bad == bad
        return
    text = refusal(path)
    assert text.startswith(f"data.path: too many bad rows, {bad} of {rows + bad:,} rows: a.jsonl:{rows + 1}: no column")
    assert f"a.jsonl:{rows + 3}: " in text and f"a.jsonl:{rows + 4}: " not in text
    assert f"; and {bad - 3} more; data.on_bad_line: skip leaves out 5, or 0.1% of the rows" in text


def test_where_no_row_is_good_it_is_an_error(write):
    assert "too many bad rows, 1 of 1 rows: a.jsonl:1: no column" in refusal(write("a.jsonl", b"{}\n"))


def test_bad_rows_are_counted_over_all_files_of_a_source(write):
    write("a.jsonl", b"\n".join([good(0), *[b"{}"] * 3]))
    write("b.jsonl", b"\n".join([good(0), *[b"{}"] * 3]))
    assert "6 of 8 rows" in refusal(["a.jsonl", "b.jsonl"])


@pytest.mark.parametrize("seed", range(20))
def test_damage_anywhere_leaves_the_data_of_the_good_lines_and_the_same_each_time(write, seed):
    draw = random.Random(seed)
    lines = [good(draw.randrange(64)) for _ in range(draw.randrange(2, 60))]
    hurt = list(lines)
    for line, _ in draw.choices(list(BAD.values()), k=draw.randrange(1, 6)):
        hurt.insert(draw.randrange(len(hurt) + 1), line)
    clean, damaged = write("clean.jsonl", b"\n".join(lines) + b"\n"), write("hurt.jsonl", b"\n".join(hurt) + b"\n")

    def fingerprint(path: str) -> str:
        train = TrainSection(steps=3, batch_size=2)
        return build_data(section(path), EvalSection(), train, word_tokenizer()).train.fingerprint

    assert fingerprint(clean) == fingerprint(damaged) == fingerprint(damaged)


def test_the_report_says_how_many_and_the_first_places(write):
    path = write("a.jsonl", b"\n".join([good(0), *(line for line, _ in list(BAD.values())[:4]), good(1)]))
    console = Console(file=io.StringIO(), width=80)
    build_data(section(path), EvalSection(), TrainSection(), word_tokenizer()).report(console)
    text = console.file.getvalue()
    assert text.startswith("a.jsonl: 2 rows, none dropped, none truncated\n")
    assert "Note: Bad rows that were left out: 4 of 6 rows: a.jsonl:2: not valid JSON" in text
    assert "; a.jsonl:4: a NUL byte; is the file damaged, or not text at all?; and 1 more.\n" in text


def talks(*firsts: str) -> bytes:
    """Rows of messages, each of which the user (u) or the assistant (a) begins."""
    asked, answer = say("q", "Ada.")
    rows = ([asked, answer] if first == "u" else [answer, asked, answer] for first in firsts)
    return b"".join(json.dumps({"messages": row}).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_conversation_that_the_assistant_begins_is_a_bad_row_where_the_template_refuses_it(write, streaming):
    path, tok = write("a.jsonl", talks(*"uuau")), tokenizer(MISTRAL)
    train = TrainSection(steps=3, batch_size=2)

    def build(path: str, **settings):
        made = section(path, format="messages", streaming=streaming, **settings)
        return build_data(made, EvalSection(), train, tok)

    with pytest.raises(DataError) as caught:
        build(path, on_bad_line="error")
    assert str(caught.value).startswith("a.jsonl:3: the conversation begins with the assistant, and the tokenizer's")
    data, clean = build(path), build(write("b.jsonl", talks(*"uuu")))
    assert data.train.batch(1).sha256() == clean.train.batch(1).sha256()
    console = Console(file=io.StringIO(), width=80)
    data.report(console)
    assert "3 rows, none dropped" in console.file.getvalue()
    assert f"Bad rows that were left out: 1 of 4 rows: {caught.value}.\n" in console.file.getvalue()
    with pytest.raises(DataError, match=r"too many bad rows, 6 of 7 rows: c\.jsonl:1: the conversation begins"):
        build(write("c.jsonl", talks(*"aaaaaau")))


def test_each_source_says_what_becomes_of_its_bad_conversations(write):
    write("a.jsonl", talks(*"uua")), write("b.jsonl", talks(*"ua"))
    sources = [
        {"path": "a.jsonl", "format": "messages", "on_bad_line": "skip"},
        {"path": "b.jsonl", "format": "messages"},
    ]
    with pytest.raises(DataError, match=r"^b\.jsonl:2: the conversation begins"):
        build_data(DataSection(sources=sources), EvalSection(), TrainSection(), tokenizer(MISTRAL))
