"""Files: every way in which JSON can be wrong is told with file and line, and nothing right is refused."""

import json

import pytest

from jaxtune.data.sources import read_records
from jaxtune.errors import DataError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(name, bytes or text) -> the file's bare name, in the current directory."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: bytes | str) -> str:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write


def message(path: str) -> str:
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    return str(caught.value)


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
    assert "a.json:1: not valid JSON" in message(write("a.json", '[{"x": 1},]'))
    assert "a.json:2: not valid JSON: Extra data" in message(write("a.json", '[{"x": 1}]\n[]'))


@pytest.mark.parametrize("torn", ['{"x": 1}\n{"x": "ab', '{"x": 1}\n{"x"', '{"x": 1}\n{"x": 1'])
def test_torn_last_line_is_said_to_be_torn(write, torn):
    text = message(write("a.jsonl", torn))
    assert text.startswith("a.jsonl:2:") and "cut off while it was written" in text


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
    assert "a JSON array over several lines is a .json file" in message(write("a.jsonl", '[\n{"x": 1}\n]'))
    assert "expected an array of objects, found '\"'" in message(write("a.json", '"x"'))


@pytest.mark.parametrize(("item", "name"), [("1", "a number"), ("[]", "a list"), ("null", "null"), ('"s"', "a string")])
def test_rows_must_be_objects(write, item, name):
    assert message(write("a.jsonl", item)) == f"a.jsonl:1: expected an object with columns, found {name}"
    assert f"a.json:2 (row 2): expected an object with columns, found {name}" in message(
        write("a.json", f"[{{}},\n{item}]")
    )


def test_unknown_ending_missing_file_and_directory(write, tmp_path):
    assert "allowed: .json" in message("a.csv")
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
