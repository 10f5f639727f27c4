"""LLaMA-Factory's data folders: an entry of dataset_info.json is read as it reads it, or refused in plain words."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from jaxtune.config import DataSection, EvalSection, TrainSection, make_config
from jaxtune.data.formats import read_rows
from jaxtune.data.loader import build_data
from jaxtune.errors import ConfigError, DataError
from tests.data.templates import say, word_tokenizer

ALPACA = {"instruction": "q", "input": "", "output": "a"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """folder(entry, rows) -> the rows that the data set `x`, and the only one, is read to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()

    def folder(entry: dict, *rows: dict):
        write(entry, *rows)
        (source,) = DataSection(dataset="x").parts
        return read_rows(source, "data.dataset x")

    def write(entry: dict, *rows: dict):
        Path("data/dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.json", **entry}}))
        Path("data/x.json").write_text(json.dumps(list(rows)))

    return folder


def conversations(result) -> list:
    return [row.messages for row in result.rows]


def refused(folder, entry: dict, *rows: dict) -> str:
    with pytest.raises(DataError) as caught:
        folder(entry, *rows)
    return str(caught.value)


def turns(*said: tuple[str, str], role="from", content="value") -> list[dict]:
    return [{role: who, content: text} for who, text in said]


def test_an_entry_of_a_file_alone_is_alpaca(folder):
    assert conversations(folder({}, ALPACA, {**ALPACA, "input": "i"})) == [say("q", "a"), say("q\ni", "a")]


def test_columns_have_the_names_of_the_entry(folder):
    columns = {"prompt": "ask", "query": "more", "response": "reply", "system": "rules", "history": "before"}
    row = {"ask": "q", "more": "i", "reply": "a", "rules": "s", "before": [["1", "2"]]}
    assert conversations(folder({"columns": columns}, row)) == [say("1", "2", "q\ni", "a", system="s")]


def test_a_column_that_an_entry_does_not_name_is_not_read(folder):
    row = {**ALPACA, "input": "i", "system": "s", "history": [["1", "2"]]}
    assert conversations(folder({}, row)) == [say("q\ni", "a")]  # system and history have no default name
    assert conversations(folder({"columns": {"prompt": "instruction", "response": "output"}}, row)) == [say("q", "a")]


def test_a_column_with_an_empty_name_is_absent(folder):
    entry = {"columns": {"prompt": "instruction", "response": "output", "query": "", "system": ""}}
    assert conversations(folder(entry, {**ALPACA, "input": "i", "system": "s"})) == [say("q", "a")]
    assert 'columns has no "response"' in refused(folder, {"columns": {"prompt": "p", "response": "", "query": "q"}})


def test_rows_without_an_answer_are_left_out_and_counted(folder):
    result = folder({}, ALPACA, {**ALPACA, "output": None}, {"instruction": "q", "input": ""})
    assert conversations(result) == [say("q", "a")]
    assert (result.odd, result.odd_first) == (2, "data/x.json:1 (row 2)")


def test_a_prompt_alone_is_text_to_be_continued(folder):
    result = folder({"columns": {"prompt": "page"}}, {"page": "a b"})
    assert [row.text for row in result.rows] == ["a b"]


SHAREGPT = {"formatting": "sharegpt"}


def test_sharegpt_is_read_with_its_tools(folder):
    called = json.dumps({"name": "f", "arguments": {"x": 1}})
    said = turns(("human", "q"), ("function_call", called), ("observation", "o"), ("gpt", "a"))
    tools = json.dumps([{"name": "f"}])
    entry = {**SHAREGPT, "columns": {"messages": "talk", "tools": "tools", "system": "rules"}}
    (row,) = folder(entry, {"talk": said, "tools": tools, "rules": "s"}).rows
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]


def test_tags_rename_keys_and_speakers(folder):
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "guest", "assistant_tag": "keeper"}
    said = turns(("guest", "q"), ("keeper", "a"), role="who", content="says")
    assert conversations(folder({**SHAREGPT, "tags": tags}, {"conversations": said})) == [say("q", "a")]


def test_a_speaker_that_the_tags_do_not_name_does_not_occur(folder):
    tags = {"user_tag": "human", "assistant_tag": "gpt"}
    rows = [{"conversations": turns(*said)} for said in (
        [("system", "s"), ("human", "q"), ("gpt", "a")],
        [("human", "q"), ("gpt", "a")],
    )]  # fmt: skip
    result = folder({**SHAREGPT, "tags": tags}, *rows)
    assert (conversations(result), result.odd) == ([say("q", "a")], 1)


def test_a_system_turn_goes_over_the_system_column_and_an_empty_one_is_none(folder):
    entry = {**SHAREGPT, "columns": {"messages": "conversations", "system": "system"}}
    rows = [
        {"conversations": turns(*first, ("human", "q"), ("gpt", "a")), "system": column}
        for first, column in (([("system", "turn")], "column"), ([], "column"), ([("system", "")], ""), ([], None))
    ]
    found = conversations(folder(entry, *rows))
    assert found == [say("q", "a", system=text) for text in ("turn", "column", None, None)]


ODD = [
    [("gpt", "a"), ("human", "q")],
    [("human", "q")],
    [("human", "q"), ("human", "r"), ("gpt", "a"), ("gpt", "b")],
    [("human", "q"), ("gpt", "a"), ("human", "r")],
    [("human", "q"), ("gpt", "a"), ("system", "s"), ("gpt", "b")],
    [("human", "q"), ("bing", "a")],
    [("system", "s")],
    [],
    [
        ("human", "q"),
        ("function_call", '{"name": "f", "arguments": {}}'),
        ("observation", "1"),
        ("observation", "2"),
        ("gpt", "a"),
    ],
]


@pytest.mark.parametrize("said", ODD, ids=range(len(ODD)))
def test_rows_whose_turns_do_not_alternate_are_left_out(folder, said):
    result = folder(SHAREGPT, {"conversations": turns(*said)}, {"conversations": turns(("human", "q"), ("gpt", "a"))})
    assert (conversations(result), result.odd, result.odd_first) == ([say("q", "a")], 1, "data/x.json:1 (row 1)")


OPENAI = {
    "formatting": "openai",
    "columns": {"messages": "messages", "tools": "tools"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "function",
        "system_tag": "system",
    },
}


def test_openais_replies_of_tools_may_follow_one_another_and_are_no_end(folder):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    replies = [{"role": "tool", "content": text} for text in "12"]
    said = [*say("q"), call, *replies, {"role": "assistant", "content": "a"}]
    whole, cut = folder(OPENAI, {"messages": said}, {"messages": said[:4]}).rows
    assert [message["role"] for message in whole.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert cut.messages == whole.messages[:2]


def test_rows_that_are_left_out_are_reported(folder):
    folder(SHAREGPT, *({"conversations": turns(("human", "a"), ("gpt", "b"), *more)} for more in ([], [("gpt", "c")])))
    data = build_data(DataSection(dataset="x"), EvalSection(), TrainSection(steps=1), word_tokenizer())
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    data.report(console)
    text = " ".join(console.export_text().split())
    assert "Left out, as LLaMA-Factory does: 1 rows without an answer" in text
    assert "the first is data/x.json:1 (row 2)" in text


def test_several_data_sets_come_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/dataset_info.json").write_text(
        json.dumps({name: {"file_name": f"{name}.json"} for name in ("a", "b", "c")})
    )
    for name in "abc":
        (tmp_path / f"d/{name}.json").write_text(json.dumps([{**ALPACA, "output": name}]))
    for dataset in ("c, a", ["c", "a"]):
        sources = DataSection(dataset=dataset, dataset_dir="d").parts
        assert [source.name for source in sources] == ["c", "a"]
        found = [row.messages[-1]["content"] for source in sources for row in read_rows(source).rows]
        assert found == ["c", "a"]


def test_a_system_prompt_can_be_given_to_all(folder):
    folder({"columns": {"prompt": "instruction", "response": "output"}}, ALPACA)
    (source,) = DataSection(dataset="x", system="s").parts
    assert conversations(read_rows(source)) == [say("q", "a", system="s")]


def test_a_directory_stands_for_its_files(folder):
    folder({}, ALPACA)
    (directory := Path("data/more")).mkdir()
    for name in ("2.json", "1.json", ".hidden"):
        (directory / name).write_text(json.dumps([{**ALPACA, "output": name}]))
    assert [said[-1]["content"] for said in conversations(folder({"file_name": "more"}, ALPACA))] == [
        "1.json",
        "2.json",
    ]


MEDIA = {"prompt": "instruction", "response": "output", "images": "pictures", "videos": "films", "audios": "sounds"}


@pytest.mark.parametrize("nothing", [{}, {"pictures": None, "films": [], "sounds": ""}, {"films": [None, ""]}])
def test_columns_of_pictures_that_hold_none_are_no_trouble(folder, nothing):
    result = folder({"columns": MEDIA}, {**ALPACA, **nothing})
    assert conversations(result) == [say("q", "a")] and not {*result.unused} & {"pictures", "films", "sounds"}


@pytest.mark.parametrize("some", [{"pictures": ["a.png"]}, {"films": "b.mp4"}, {"sounds": [{"bytes": "c"}]}])
def test_a_row_with_a_picture_a_film_or_a_sound_is_refused_by_its_place(folder, some):
    (column,) = some
    text = refused(folder, {"columns": MEDIA}, ALPACA, {**ALPACA, **some})
    assert text.startswith(f'data/x.json:1 (row 2): column "{column}" holds ') and "only text can be learnt" in text


def test_a_text_to_be_continued_may_name_pictures_too(folder):
    assert [row.text for row in folder({"columns": {"prompt": "t", "images": "i"}}, {"t": "a text"}).rows] == ["a text"]


def test_num_samples_are_drawn_and_come_again_when_there_are_too_few(folder):
    rows = [{**ALPACA, "output": str(number)} for number in range(10)]
    few, again, many = (
        [said[-1]["content"] for said in conversations(folder({"num_samples": count}, *rows))] for count in (4, 4, 25)
    )
    assert few == again and len(set(few)) == 4 and few != sorted(few)
    assert len(many) == 25 and set(many[:10]) == set(many[10:20]) == set(map(str, range(10)))
    assert many[:10] != many[10:20]


def test_a_data_set_on_the_hub_goes_before_a_file(folder):
    folder({}, ALPACA)
    entry = {"hf_hub_url": "owner/name", "split": "test", "subset": "en", "file_name": "x.json"}
    Path("data/dataset_info.json").write_text(json.dumps({"x": entry}))
    (source,) = DataSection(dataset="x").parts
    assert (source.path, source.split, source.subset, source.name) == ("owner/name", "test", "en", "x")


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"ms_hub_url": "a/b"}, "ms_hub_url 'a/b': rows come from files; download it, and name it by file_name"),
        ({"hf_hub_url": "../b"}, "hf_hub_url '../b' is not the id of a data set on the hub (owner/name)"),
        ({"hf_hub_url": "a/b", "folder": "c"}, "folder: a directory of a data set on the hub; name it by subset"),
        ({"hf_hub_url": "a/b", "subset": 1}, "subset is a number; expected a name"),
        ({"script_url": "a"}, "script_url 'a'"),
        ({"cloud_file_name": "s3://a"}, "cloud_file_name 's3://a'"),
        ({"ranking": True}, "ranking: true: preferences cannot be learnt from here"),
        ({"columns": {"prompt": "p", "chosen": "c"}}, "columns.chosen: preferences cannot be learnt from here"),
        ({"columns": {"messages": "m", "kto_tag": "k"}, **SHAREGPT}, "columns.kto_tag: preferences"),
        ({"columns": {"messages": "m", "pictures": "i"}}, 'columns has "pictures". Allowed: prompt, query, '),
        ({"columns": {"prompt": "p", "query": "q"}}, 'columns has no "response", without which there is nothing'),
        ({"columns": {"system": "s"}, **SHAREGPT}, 'columns has no "messages"'),
        ({"columns": {"prompt": 1}}, "columns.prompt is a number; expected a name"),
        ({"columns": []}, "columns is a list; expected an object"),
        ({"tags": {"user": "u"}, **SHAREGPT}, 'tags has "user"'),
        ({"formatting": "chatml"}, "formatting is 'chatml'; allowed: alpaca, sharegpt, openai"),
        ({"split": "test"}, "split 'test': a file has one split, train"),
        ({"num_samples": 0}, "num_samples is 0; expected a number of rows"),
        ({"num_samples": True}, "num_samples is True"),
        ({"file": "x.json"}, 'unknown key "file"'),
        ({"file_name": None}, "no file_name"),
        ({"file_name": "y.json"}, "file_name y.json: there is no data/y.json"),
        ({"file_name": "../x.json"}, "file_name '../x.json' leads out of data; it is a path inside it"),
        ({"file_name": "a/../../x.json"}, "leads out of data"),
        ({"file_name": "a\\..\\..\\x.json"}, "leads out of data"),
        ({"file_name": "/etc/passwd"}, "file_name '/etc/passwd' leads out of data"),
        ({"file_name": "C:\\x.json"}, "leads out of data"),
    ],
)
def test_what_cannot_be_read_is_refused(folder, entry, complaint):
    text = refused(folder, entry, ALPACA)
    assert text.startswith("data/dataset_info.json: x: ") and complaint in text


def test_an_empty_directory_is_refused(folder):
    folder({}, ALPACA)
    Path("data/none").mkdir()
    assert "file_name none: no file in data/none" in refused(folder, {"file_name": "none"})


def test_a_missing_column_points_to_the_entry(folder):
    entry = {"columns": {"prompt": "p", "response": "output"}}
    assert refused(folder, entry, ALPACA).startswith("data.dataset x: no row has the column")


def test_a_name_that_is_not_there_is_refused_with_those_that_are(folder):
    folder({}, ALPACA)
    with pytest.raises(DataError, match=r"data\.dataset: data/dataset_info\.json has no 'y'.* It has x"):
        _ = DataSection(dataset="y").parts


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_list_that_cannot_be_read_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "dataset_info.json").write_text(text)
    with pytest.raises(DataError, match=r"dataset_info\.json: (cannot be read|not valid JSON|expected a JSON object)"):
        _ = DataSection(dataset="x", dataset_dir=str(tmp_path)).parts


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"dataset": "x", "path": "a.json"}, "path is for a single source; with dataset, each has its own"),
        ({"dataset": "x", "format": "text"}, "format is for a single source; with dataset"),
        ({"dataset": "x", "tags": {"role": "r"}}, "tags is for a single source; with dataset, each has its own"),
        ({"dataset": "x", "columns": {"messages": "m"}}, "columns is for a single source; with dataset"),
        ({"dataset": "x", "sources": [{"path": "a"}]}, "dataset and sources are both set; keep one"),
        ({"path": "a.json", "dataset_dir": "d"}, "dataset_dir would do nothing without dataset"),
        ({}, "path is missing: name a file, several, sources with a path each, or a dataset"),
    ],
)
def test_files_are_named_in_one_way(data, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make_config({"model": {"path": "m"}, "data": data})
