"""Files: every way in which JSON can be wrong is told with file and line, nothing right is refused, and what a path
names is found.
"""

import bz2
import gzip
import io
import json
import lzma
import random

import pyarrow as pa
import pytest

from jaxtune.console import console
from jaxtune.data.locate import with_files
from jaxtune.data.sources import read_records
from jaxtune.data_section import SourceSection
from jaxtune.errors import DataError
from tests.data.conftest import message


def test_lines_carry_their_line_and_blank_ones_are_skipped(write):
    path = write("a.jsonl", '{"x": 1}\n\n  \n{"x": 2}\n')
    assert list(read_records(path)) == [("a.jsonl:1", {"x": 1}), ("a.jsonl:4", {"x": 2})]


def test_array_items_carry_the_line_on_which_they_begin(write):
    path = write("a.json", '\n[\n  {"x": "[,]\\n"},\n  {\n    "x": 2\n  }, {"x": 3}\n]\n')
    found = list(read_records(path))
    assert found == [
        ("a.json:3 (row 1)", {"x": "[,]\n"}),
        ("a.json:4 (row 2)", {"x": 2}),
        ("a.json:6 (row 3)", {"x": 3}),
    ]


@pytest.mark.parametrize("indent", [None, 0, 4])
def test_array_is_read_as_json_reads_it(write, indent):
    rows = [{"a": "é\u2028☃", "b": [1, {"c": None}]}, {}, {"a": "]},{["}]
    path = write("a.JSON", json.dumps(rows, indent=indent, ensure_ascii=False))
    assert [value for _, value in read_records(path)] == rows


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_byte_order_mark_and_windows_line_ends_are_no_trouble(write, name):
    text = '{"x": "é"}' if name == "a.jsonl" else '[\r\n{"x": "é"}\r\n]'
    path = write(name, b"\xef\xbb\xbf" + (text + "\r\n").encode())
    assert [value for _, value in read_records(path)] == [{"x": "é"}]


def test_line_separators_of_unicode_do_not_end_a_line(write):
    path = write("a.jsonl", '{"x": "a\u2028b\u0085c\x7f"}\n{"x": "d"}')
    assert [where for where, _ in read_records(path)] == ["a.jsonl:1", "a.jsonl:2"]


def test_bad_line_is_named(write):
    text = message(write("a.jsonl", '{"x": 1}\n{"x": oops}\n{"x": 2}\n'))
    assert text.startswith("a.jsonl:2: not valid JSON: Expecting value (column 7)")


def test_bad_place_in_an_array_is_named(write):
    assert message(write("a.json", '[\n{"x": 1},\n{"x" 2}\n]')).startswith("a.json:3: not valid JSON: Expecting ':'")
    assert "a.json:2: not valid JSON: Expecting ',' or ']'" in message(write("a.json", '[{"x": 1}\n {"x": 2}]'))
    assert "(column 11); JSON has no comma before a ]: take it out" in message(write("a.json", '[{"x": 1},]'))
    assert "a.json:2: not valid JSON" in (told := message(write("a.json", '[{"x": 1,\n}]'))) and "before a }" in told
    assert "before a }: take it out" in message(write("a.jsonl", '{"x": 1, }\n'))
    assert "take it out" not in message(write("a.json", '[{"x": 1, oops}]'))
    assert "a.json:2: not valid JSON: Extra data" in message(write("a.json", '[{"x": 1}]\n[]'))


@pytest.mark.parametrize("torn", ['{"x": 1}\n{"x": "ab', '{"x": 1}\n{"x"', '{"x": 1}\n{"x": 1', '{"x": 1}\n{"x": tr'])
def test_torn_last_line_is_said_to_be_torn(write, torn):
    text = message(write("a.jsonl", torn))
    assert text.startswith("a.jsonl:2:") and "cut off while it was written" in text


@pytest.mark.parametrize("last", ['{"x": 1} {"x": 2}', "{'x': 1}", '{"x": 1, }'])
def test_a_wrong_last_line_without_a_line_end_is_not_said_to_be_torn(write, last):
    text = message(write("a.jsonl", f'{{"x": 1}}\n{last}'))
    assert text.startswith("a.jsonl:2: not valid JSON") and "cut off" not in text


@pytest.mark.parametrize("end", range(1, 24))
def test_array_cut_off_anywhere_is_an_error(write, end):
    whole = '[{"x": "a"}, {"x": "b"}]'
    assert "not valid JSON" in message(write("a.json", whole[:end]))


def test_every_cut_in_a_string_or_between_items_is_said_to_be_one(write):
    for cut in ('[{"x": "a', '[{"x": "a"},', '[{"x": "a"}', "[", '[{"x":'):
        assert "cut off while it was written" in message(write("a.json", cut))


def test_text_that_is_not_utf8_is_named_by_line_and_bytes(write):
    assert "a.jsonl:2: not UTF-8 text (bytes ff 22 7d)" in message(write("a.jsonl", b'{"x": 1}\n{"x": "\xff"}'))
    assert "a.json:2: not UTF-8 text" in message(write("a.json", b'[{"x": 1},\n{"x": "\xe5\xa8"}]'))
    assert "UTF-16" in message(write("a.json", '[{"x": 1}]'.encode("utf-16")))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_nul_bytes_are_named_by_line(write, name):
    assert message(write(name, b'{"x": 1}\n{"x": "\0"}')).startswith(("a.jsonl:2: a NUL byte", "a.json:2: a NUL byte"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xef\xbb\xbf"])
def test_empty_file_is_an_error(write, name, content):
    assert message(write(name, content)) == f"{name}: empty: there is no row in it"


def test_empty_array_is_an_error(write):
    assert "empty" in message(write("a.json", "[ ]"))


def test_wrong_shape_of_file_says_which_name_it_should_have(write):
    assert "one object a line is a .jsonl file" in message(write("a.json", '{"x": 1}\n{"x": 2}'))
    for text in ('[\n{"x": 1}\n]', '[{"x": 1}]'):
        assert "a JSON array of rows, on one line or several, is a .json file" in message(write("a.jsonl", text))
    for turn, column in (
        ({"role": "user", "content": "q"}, "messages"),
        ({"from": "human", "value": "q"}, "conversations"),
    ):
        hint = f'found a list; a list of turns is a column of a row: {{"{column}": [...]}}'
        assert hint in message(write("a.jsonl", json.dumps([turn])))
    assert """found one object; if the list in its "data" is the rows, keep that alone""" in message(
        write("a.json", '{"version": 1,\n"data": [{"x": 1}]}\n')
    )
    assert message(write("a.json", '{"x": 1}')).endswith("expected an array of objects, [{...}, ...], found one object")
    assert "found '\"'" in message(write("a.json", '"x"'))


@pytest.mark.parametrize(("item", "name"), [("1", "a number"), ("[]", "a list"), ("null", "null"), ('"s"', "a string")])
def test_rows_must_be_objects(write, item, name):
    assert message(write("a.jsonl", item)) == f"a.jsonl:1: expected an object with columns, found {name}"
    assert f"a.json:2 (row 2): expected an object with columns, found {name}" in message(
        write("a.json", f"[{{}},\n{item}]")
    )


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_columns_that_are_separated_otherwise_are_told(write, sign):
    text = message(write("a.csv", sign.join(["instruction", "output"]) + "\n" + sign.join(["q", "a, b"]) + "\n"))
    assert text.startswith("a.csv:1: the header is one cell, 'instruction") and "separated by commas in a .csv" in text
    assert "by tabs in a .tsv" in message(write("a.tsv", "instruction,output\nq,a\n"))


def test_unknown_ending_missing_file_and_directory(write, tmp_path):
    for name in ("a.doc", "a", "a.gz", "a.doc.gz", "a.parquet.gz", "a.jsonl.zip"):
        assert "unknown kind of file; allowed: .json" in message(name)
    assert message("none.json") == "none.json: cannot be read: No such file or directory"
    (tmp_path / "d.json").mkdir()
    assert "cannot be read" in message("d.json")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_breaks_parsers_is_an_error_like_any_other(write, name):
    for value in ("[" * 100_000, "9" * 5000):
        assert "not valid JSON" in message(write(name, f'[{{"x": {value}' if name == "a.json" else f'{{"x": {value}'))


def test_a_very_long_line_is_read(write):
    long = "x" * (8 << 20)
    ((_, value),) = read_records(write("a.jsonl", json.dumps({"x": long})))
    assert value["x"] == long


# --- text, and what is compressed ---


def test_each_line_of_a_text_file_is_a_row(write):
    path = write("a.txt", b"\xef\xbb\xbfone \r\n\n \t\n  two\x0bthree\nfour")
    assert list(read_records(path)) == [
        ("a.txt:1", {"text": "one "}),
        ("a.txt:4", {"text": "  two\x0bthree"}),
        ("a.txt:5", {"text": "four"}),
    ]


def zst(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}
LINES = "".join(json.dumps({"x": random.Random(n).random()}) + "\n" for n in range(2000)).encode()


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_text_is_that_text(write, ending):
    assert list(read_records(write(f"a.jsonl{ending}", COMPRESS[ending](LINES)))) == [
        (f"a.jsonl{ending}:{number}", json.loads(line)) for number, line in enumerate(LINES.splitlines(), 1)
    ]
    for name, content in {"b.json": '[{"x": "é"}]', "b.csv": "x\né\n"}.items():
        path = write(name + ending.upper(), COMPRESS[ending](content.encode()))
        assert [value for _, value in read_records(path)] == [{"x": "é"}]


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_parts_one_after_another_are_one_text(write, ending):
    content = b"".join(COMPRESS[ending](part) for part in (LINES[:99], LINES[99:]))
    assert len(list(read_records(write(f"a.jsonl{ending}", content)))) == 2000


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("part", [0.5, 0.95, -1])
def test_a_compressed_file_that_is_cut_off_is_never_taken_for_a_short_one(write, ending, part):
    whole = COMPRESS[ending](LINES)
    text = message(write(f"a.jsonl{ending}", whole[: part if part == -1 else int(part * len(whole))]))
    assert text.startswith(f"a.jsonl{ending}: damaged or cut off")


def test_a_cut_off_file_is_told_with_the_last_good_row(write):
    text = message(write("a.jsonl.gz", gzip.compress(LINES)[:-1]))
    assert text.startswith("a.jsonl.gz: damaged or cut off (the last good row is a.jsonl.gz:2000): ")


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("content", [b"not compressed at all\n", LINES])
def test_a_file_that_is_not_compressed_as_its_name_says_is_an_error(write, ending, content):
    assert message(write(f"a.jsonl{ending}", content)).startswith(f"a.jsonl{ending}: damaged or cut off")


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])  # .zst has a checksum only where its writer wanted one
def test_a_flipped_bit_in_a_compressed_file_is_an_error(write, ending):
    whole = bytearray(COMPRESS[ending](LINES))
    whole[len(whole) // 2] ^= 16
    text = message(write(f"a.jsonl{ending}", bytes(whole)))
    assert text.startswith((f"a.jsonl{ending}: damaged or cut off", f"a.jsonl{ending}:"))


def test_lines_are_read_as_they_are_needed(write):
    path = write("a.jsonl.gz", gzip.compress(LINES)[:-200])  # the end of the file is not looked at
    assert next(read_records(path)) == ("a.jsonl.gz:1", json.loads(LINES.splitlines()[0]))


def test_a_line_without_end_is_refused_before_memory_is(write, monkeypatch):
    monkeypatch.setattr("jaxtune.data.records.MAX_LINE", 1 << 20)
    path = write("a.jsonl.gz", gzip.compress(b'{"x": 1}\n' + b"0" * (3 << 20)))
    assert message(path) == "a.jsonl.gz:2: a line of more than 1 MiB; is it text at all?"


# --- what a path names ---


@pytest.fixture
def found(tmp_path, monkeypatch):
    """found(path, ...) -> the files of a source with these paths, below a directory with files of many kinds."""
    monkeypatch.chdir(tmp_path)
    names = ("b.jsonl", "a.csv.gz", "a.json", "README.md", ".hidden.jsonl", "dataset_info.json", "cache-1f.arrow")
    for name in (*names, "deep/c.jsonl", "deep/er/d.parquet", ".git/e.jsonl", "deep/notes.md", "none/x.md"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("")

    return lambda *paths: with_files(SourceSection(path=list(paths))).paths


def warnings(monkeypatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(console, "_file", text)  # its property would leave this test's stdout behind
    return text


def test_a_directory_is_its_data_files_sorted_and_others_are_named(found, monkeypatch):
    said = warnings(monkeypatch)
    assert found("data") == ["data/a.csv.gz", "data/a.json", "data/b.jsonl"]
    assert said.getvalue() == "Warning: data.path data: not read, being of another kind: README.md\n"


def test_a_pattern_is_the_files_that_it_matches_sorted(found, monkeypatch):
    said = warnings(monkeypatch)
    assert found("data/*.json*") == ["data/a.json", "data/b.jsonl"]
    assert found("data/[ab].json", "data/deep") == ["data/a.json", "data/deep/c.jsonl"]
    assert said.getvalue().count("Warning") == 1  # of deep/notes.md
    assert found("data/**/*.jsonl") == ["data/b.jsonl", "data/deep/c.jsonl"]
    assert found("data/**/*.parquet") == ["data/deep/er/d.parquet"]


def test_paths_stay_in_the_order_in_which_they_are_given(found):
    assert found("data/b.jsonl", "data/a.json") == ["data/b.jsonl", "data/a.json"]
    assert found("missing.jsonl") == ["missing.jsonl"]  # reading it says so


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("data/*.tsv", "data.path data/*.tsv: no data file; found nothing; allowed: .json"),
        ("data/none", "data.path data/none: no data file; found x.md; allowed: .json"),
        ("data/d*", "data.path data/d*: no data file; found deep/; allowed: .json"),
    ],
)
def test_a_path_that_names_no_data_says_what_is_there(found, path, says):
    with pytest.raises(DataError) as caught:
        found(path)
    assert str(caught.value).startswith(says)


def test_a_name_that_is_too_long_is_told_and_with_commas_in_it_how_to_name_several(found):
    for path, hint in (("n" * 300, ""), ("a.json," * 50, "; write several as a list: [a.json, b.json]")):
        with pytest.raises(DataError) as caught:
            found(path)
        assert str(caught.value) == f"data.path {path}: cannot be read: File name too long{hint}"


def test_a_name_that_looks_like_a_pattern_may_be_a_files_own(found, tmp_path):
    (tmp_path / "a[1].jsonl").write_text("")
    assert found("a[1].jsonl") == ["a[1].jsonl"]


def test_home_is_found(found, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/data/a.json", "~/data/deep") == [f"{tmp_path}/data/a.json", f"{tmp_path}/data/deep/c.jsonl"]
