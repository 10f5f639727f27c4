"""Tools: what a row offers and calls becomes what chat templates read, in whichever way it is written down."""

import json
from datetime import date
from decimal import Decimal

import pyarrow as pa
import pytest
from pyarrow import parquet

from jaxtune.config import DataSection as Section
from jaxtune.data.formats import read_rows
from jaxtune.data_section import Columns, Tags
from jaxtune.errors import DataError

TIDES = {"name": "tides", "description": "High water at a port.", "parameters": {"type": "object"}}
CALL = {"name": "tides", "arguments": {"port": "Brest"}}


def function(function: dict, **more) -> dict:
    return {**more, "type": "function", "function": function}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(row, ...) -> the row as it was read, of format messages unless said otherwise."""
    monkeypatch.chdir(tmp_path)

    def read(row: dict, format: str = "messages", **settings):
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
        return read_rows(Section(path="a.jsonl", format=format, **settings)).rows[0]

    return read


@pytest.fixture
def read_table(tmp_path, monkeypatch):
    """read_table(rows, ...) -> the rows as they were read out of a table, likewise."""
    monkeypatch.chdir(tmp_path)

    def read_table(rows: list[dict], suffix: str = ".parquet", format: str = "messages"):
        table = pa.Table.from_pylist(rows)
        if suffix == ".parquet":
            parquet.write_table(table, "a.parquet")
        else:
            with pa.ipc.new_file("a.arrow", table.schema) as writer:
                writer.write_table(table)
        return read_rows(Section(path=f"a{suffix}", format=format)).rows

    return read_table


def refused(read, row: dict, **settings) -> str:
    with pytest.raises(DataError) as caught:
        read(row, **settings)
    return str(caught.value)


def talk(**assistant) -> dict:
    """A conversation in which the assistant's one turn has these keys."""
    return {"messages": [{"role": "user", "content": "When?"}, {"role": "assistant", **assistant}]}


@pytest.mark.parametrize(
    "tools",
    [
        *([TIDES], json.dumps([TIDES]), [function(TIDES)], json.dumps([function(TIDES)]), json.dumps(TIDES), TIDES),
        *([{"function": TIDES}], [{"type": None, "function": TIDES}], [{"type": "function", **TIDES}]),
    ],
)
def test_tools_are_functions_in_openais_form(read, tools):
    assert read({**talk(content="Soon."), "tools": tools}).tools == [function(TIDES)]


@pytest.mark.parametrize("tools", [None, "", " ", [], "[]"])
def test_no_tools_are_none(read, tools):
    assert read({**talk(content="Soon."), "tools": tools}).tools is None
    assert read(talk(content="Soon.")).tools is None


def test_every_format_of_conversations_reads_tools(read):
    alpaca = {"instruction": "q", "output": "a", "functions": [TIDES]}
    assert read(alpaca, "alpaca", columns=Columns(tools="functions")).tools == [function(TIDES)]
    sharegpt = {"conversations": [{"from": "human", "value": "q"}], "tools": json.dumps([TIDES])}
    assert read(sharegpt, "sharegpt").tools == [function(TIDES)]
    assert read({"text": "a", "tools": [TIDES]}, "text").tools is None


WRONG_TOOLS = ["{", 3, ["tides"], '"tides"', [{"type": "code_interpreter"}], [{"function": {"parameters": {}}}], [{}]]
WRONG_TOOLS += [[{"type": "function"}], [{"type": "function", "function": "x"}], [function({"parameters": {}})]]


@pytest.mark.parametrize("tools", WRONG_TOOLS, ids=str)
def test_tools_of_a_wrong_shape_are_refused(read, tools):
    assert refused(read, {**talk(content="a"), "tools": tools}).startswith('a.jsonl:1: column "tools": ')


@pytest.mark.parametrize("arguments", [{"port": "Brest"}, '{"port": "Brest"}'])
def test_a_call_has_an_object_of_arguments(read, arguments):
    """OpenAI writes them as JSON text, which templates would quote."""
    called = function({"name": "tides", "arguments": arguments}, id="call_1")
    for content in ({"content": None}, {}):
        row = read(talk(tool_calls=[called], **content))
        assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": [function(CALL, id="call_1")]}


def test_what_is_said_beside_a_call_is_kept(read):
    assert read(talk(content="I look.", tool_calls=[CALL])).messages[1]["content"] == "I look."


def test_openais_older_call_is_a_call(read):
    message = read(talk(content=None, function_call=CALL)).messages[1]
    assert message["tool_calls"] == [function(CALL)]


def test_what_a_tool_replies_keeps_its_name_and_its_call(read):
    reply = {"role": "tool", "content": "04:12", "tool_call_id": "call_1", "name": "tides"}
    assert read({"messages": [reply]}).messages == [reply]
    assert read({"messages": [{**reply, "role": "function"}]}).messages == [reply]


def test_a_number_is_an_id_too(read):
    called = read(talk(tool_calls=[function(CALL, id=1)], content="")).messages[1]
    assert called["tool_calls"] == [function(CALL, id="1")]
    reply = {"role": "tool", "content": "04:12", "tool_call_id": 1}
    assert read({"messages": [reply]}).messages == [{**reply, "tool_call_id": "1"}]
    assert "messages[0].tool_call_id is a list" in refused(read, {"messages": [{**reply, "tool_call_id": [1]}]})


def test_what_is_no_number_is_no_argument(read):
    called = {"name": "tides", "arguments": {"height": float("nan")}}
    assert "tool_calls[0] is nothing that JSON has: Out of range float" in refused(read, talk(tool_calls=[called]))


def test_half_of_a_character_in_a_call_or_a_tool_is_refused(read):
    broken = {"name": "tides", "arguments": {"port": "nice \ud83d"}}
    assert r"tool_calls[0] holds \ud83d, half of a surrogate" in refused(read, talk(tool_calls=[broken]))
    tool = {**TIDES, "description": "\ud83d"}
    assert r'column "tools" holds \ud83d, half of a surrogate' in refused(read, {**talk(content="a"), "tools": [tool]})


@pytest.mark.parametrize("found", [date(2024, 1, 2), Decimal("1.5"), b"x"], ids=str)
def test_what_json_has_not_is_refused_in_a_tables_call(read_table, found):
    called = {"name": "tides", "arguments": {"day": found}}
    with pytest.raises(
        DataError, match=r"a\.parquet \(row 1\): messages\[1\]\.tool_calls\[0\] is nothing that JSON has: "
    ):
        read_table([talk(content="", tool_calls=[called])])


@pytest.mark.parametrize("said", [CALL, [CALL], [CALL, CALL]])
def test_a_sharegpt_call_is_json_text(read, said):
    turns = [("human", "q"), ("function_call", json.dumps(said)), ("observation", "04:12"), ("gpt", "At 04:12.")]
    row = read({"conversations": [{"from": who, "value": text} for who, text in turns]}, "sharegpt")
    assert [message["role"] for message in row.messages] == ["user", "assistant", "tool", "assistant"]
    calls = [function(CALL)] * (len(said) if isinstance(said, list) else 1)
    assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": calls}
    assert row.messages[2]["content"] == "04:12"


def test_a_thought_before_a_sharegpt_call_is_said(read):
    turn = {"from": "function_call", "value": f"<think>\nA port.\n</think>\n\n{json.dumps(CALL)}"}
    message = read({"conversations": [turn]}, "sharegpt").messages[0]
    assert message["content"] == "<think>\nA port.\n</think>"
    assert message["tool_calls"] == [function(CALL)]


def test_openais_messages_may_hold_calls_as_text_when_tagged(read):
    row = {"messages": [{"role": "call", "content": json.dumps(CALL)}]}
    assert read(row, tags=Tags(function="call")).messages[0]["tool_calls"] == [function(CALL)]


@pytest.mark.parametrize(
    ("turn", "complaint"),
    [
        ({"tool_calls": {}, "content": None}, "messages[1].content is null"),
        ({"tool_calls": {"a": 1}}, "messages[1].tool_calls is an object; expected a list of calls"),
        ({"tool_calls": [3]}, "messages[1].tool_calls[0]: expected a function with a name and arguments; found 3"),
        ({"tool_calls": [{"name": "a"}]}, "messages[1].tool_calls[0]: expected a function with"),
        ({"tool_calls": [{"name": "a", "arguments": "{"}]}, "messages[1].tool_calls[0]: arguments: not valid JSON"),
        ({"tool_calls": [{"name": "a", "arguments": [1]}]}, "tool_calls[0]: arguments is a list; expected an object"),
        ({"tool_calls": [CALL], "function_call": CALL}, "messages[1] has tool_calls and function_call; keep one"),
    ],
)
def test_calls_of_a_wrong_shape_are_refused(read, turn, complaint):
    assert complaint in refused(read, talk(**turn))


def test_only_the_assistant_calls_tools(read):
    row = {"messages": [{"role": "user", "content": "q", "tool_calls": [CALL]}]}
    assert refused(read, row) == "a.jsonl:1: messages[0] calls a tool, but is not the assistant's"


def test_a_sharegpt_call_that_is_no_json_is_refused(read):
    row = {"conversations": [{"from": "function_call", "value": "tides()"}]}
    assert refused(read, row, format="sharegpt").startswith("a.jsonl:1: conversations[0].value: not valid JSON")


def test_text_in_parts_is_joined(read):
    parts = [{"type": "text", "text": "Low "}, {"type": "text", "text": "water."}]
    assert read(talk(content=parts)).messages[1]["content"] == "Low water."


def test_keys_and_speakers_can_have_other_names(read):
    tags = Tags(role="who", content="says", user="guest", assistant="keeper", system="rules", observation="sea")
    said = [("rules", "s"), ("guest", "q"), ("keeper", "a"), ("sea", "t")]
    row = {"messages": [{"who": who, "says": text} for who, text in said]}
    messages = read(row, tags=tags).messages
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "s"), ("user", "q"), ("assistant", "a"), ("tool", "t")
    ]  # fmt: skip
    row = {"conversations": row["messages"]}
    assert read(row, "sharegpt", tags=tags).messages == messages


def test_a_renamed_speaker_loses_its_old_name(read):
    row = {"messages": [{"role": "user", "content": "q"}]}
    for name in ("guest", ""):
        assert "unknown role 'user'" in refused(read, row, tags=Tags(user=name))


# Calls and tools of different keys, which a table's one type for all rows would mix.
MIXED = [
    {
        "messages": [
            {"role": "user", "content": "When?"},
            {"role": "assistant", "content": None, "tool_calls": [function(call, id="1")]},
        ],
        "tools": [function({"name": call["name"], "parameters": {"type": "object", "properties": {key: kinds}}})],
    }
    for call, key, kinds in (
        (CALL, "port", {"type": "string", "enum": ["Brest", None]}),
        ({"name": "wind", "arguments": {"at": {"lat": 48.4}, "hours": [1, 2]}}, "at", {"type": "object"}),
        ({"name": "wind", "arguments": {"at": {"lon": -4.5}}}, "at", {"type": "object", "required": ["lon"]}),
        ({"name": "time", "arguments": {}}, "zone", {"description": "of the clock"}),
    )
]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_keys_of_other_rows_are_no_part_of_a_tables_calls_and_tools(read_table, suffix):
    rows = read_table(MIXED, suffix)
    assert [row.messages[1]["tool_calls"] for row in rows] == [row["messages"][1]["tool_calls"] for row in MIXED]
    assert [row.tools for row in rows] == [row["tools"] for row in MIXED]


def test_an_older_call_in_a_table_is_that_of_its_row(read_table):
    calls = [CALL, {"name": "wind", "arguments": {"at": "Brest"}}]
    rows = read_table([talk(function_call=call) for call in calls])
    assert [row.messages[1]["tool_calls"] for row in rows] == [[function(call)] for call in calls]


def test_a_null_that_was_written_stays(read, read_table):
    """In JSON, and in JSON text, which tables may hold too."""
    call, tool = {"name": "tides", "arguments": {"port": None}}, {**TIDES, "default": {"port": None}}
    row = read({**talk(tool_calls=[call]), "tools": [tool]})
    assert (row.messages[1]["tool_calls"], row.tools) == ([function(call)], [function(tool)])
    text = {**call, "arguments": json.dumps(call["arguments"])}
    (row,) = read_table([{**talk(tool_calls=[text]), "tools": json.dumps([tool])}])
    assert (row.messages[1]["tool_calls"], row.tools) == ([function(call)], [function(tool)])
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(call)}]
    (row,) = read_table([{"conversations": turns}], format="sharegpt")
    assert row.messages[1]["tool_calls"] == [function(call)]
