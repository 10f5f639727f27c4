"""Columns: the four formats become the same conversations, and a wrong column is named with what was found."""

import json

import pytest

from jaxtune.config import DataSection as Section
from jaxtune.config import make_config
from jaxtune.data.formats import read_rows
from jaxtune.data_section import Columns, SourceSection
from jaxtune.errors import ConfigError, DataError
from tests.data.templates import say


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(rows, format=..., ...) -> Rows, from a .jsonl file called a.jsonl."""
    monkeypatch.chdir(tmp_path)

    def read(*rows: dict, **settings):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_rows(Section(path="a.jsonl", **settings))

    return read


def conversations(result) -> list:
    return [row.messages for row in result.rows]


def refused(read, *rows, **settings) -> str:
    with pytest.raises(DataError) as caught:
        read(*rows, **settings)
    return str(caught.value)


def alpaca(**columns) -> dict:
    return {"instruction": "q", "input": "", "output": "a", **columns}


def test_alpaca_is_a_question_and_an_answer(read):
    assert conversations(read(alpaca())) == [say("q", "a")]


def test_alpaca_joins_instruction_and_input_with_a_line_break(read):
    assert conversations(read(alpaca(input="i"))) == [say("q\ni", "a")]
    assert conversations(read(alpaca(instruction="", input="i"))) == [say("i", "a")]


@pytest.mark.parametrize("row", [{"instruction": "q", "output": "a"}, alpaca(input=None, system=None, history=None)])
def test_alpaca_does_without_optional_columns(read, row):
    assert conversations(read(row)) == [say("q", "a")]


def test_alpaca_puts_history_and_system_first(read):
    row = alpaca(history=[["q1", "a1"], ["q2", "a2"]], system="s")
    assert conversations(read(row)) == [say("q1", "a1", "q2", "a2", "q", "a", system="s")]


def test_sharegpt_roles_have_two_names_each(read):
    turns = [("system", "s"), ("human", "1"), ("gpt", "2"), ("user", "3"), ("assistant", "4")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    assert conversations(read(row, format="sharegpt")) == [say("1", "2", "3", "4", system="s")]


def test_sharegpt_takes_its_system_prompt_from_a_column_too(read):
    row = {"conversations": [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}], "system": "s"}
    assert conversations(read(row, format="sharegpt")) == [say("1", "2", system="s")]


def test_sharegpt_refuses_two_system_prompts(read):
    row = {"conversations": [{"from": "system", "value": "1"}, {"from": "gpt", "value": "2"}], "system": "s"}
    assert "a.jsonl:1: a system prompt in column" in refused(read, row, format="sharegpt")


SHAREGPT_TURNS = [{"from": "human", "value": "1"}, {"from": "gpt", "value": "2"}]


@pytest.mark.parametrize(
    ("row", "format", "advice"),
    [
        ({"messages": say("1", "2")}, "alpaca", "data.format: messages would fit these columns"),
        ({"id": 3, "conversations": SHAREGPT_TURNS}, "alpaca", "data.format: sharegpt would fit these columns"),
        (
            {"messages": SHAREGPT_TURNS},
            "alpaca",
            "data.format: sharegpt with data.columns.conversations: messages would fit these columns",
        ),
        (
            {"conversations": say("1", "2")},
            "text",
            "data.format: messages with data.columns.messages: conversations would fit these columns",
        ),
        ({"text": "1"}, "messages", "data.format: text would fit these columns"),
        (alpaca(), "sharegpt", "data.format: alpaca would fit these columns"),
        (
            {"prompt": say("1", "2", "3"), "completion": say("4")},
            "alpaca",
            "prompt, completion hold turns each: write the whole conversation into one column",
        ),
        (
            {"chosen": SHAREGPT_TURNS, "rejected": SHAREGPT_TURNS},
            "messages",
            "chosen, rejected hold turns each: write the whole conversation into one column",
        ),
        ({"messages": "1"}, "alpaca", "set data.columns.instruction"),
        ({"talk": say("1", "2")}, "messages", "set data.columns.messages"),
        ({"instruction": "1", "ouput": "2"}, "alpaca", 'did you mean "ouput"? Rename it, or set data.columns.output'),
    ],
)
def test_a_column_that_is_not_there_gets_the_advice_that_fits_those_that_are(read, row, format, advice):
    text = refused(read, row, format=format)
    assert text.endswith(f"; found {', '.join(row)}; {advice}")


def test_turns_of_the_other_format_are_told(read):
    text = refused(read, {"messages": SHAREGPT_TURNS}, format="messages")
    assert text == (
        'a.jsonl:1: messages[0] has no "role"; found from, value; data.format: sharegpt with '
        "data.columns.conversations: messages reads such turns"
    )
    text = refused(read, {"conversations": say("1", "2")}, format="sharegpt")
    assert text.endswith("; data.format: messages with data.columns.messages: conversations reads such turns")
    assert "reads such turns" not in refused(read, {"messages": [{"content": "1"}]}, format="messages")


def test_messages_are_taken_as_they_are(read):
    messages = say("1", "2", "3", "4", system="s")
    assert conversations(read({"messages": messages}, format="messages")) == [messages]


def test_text_is_taken_as_it_is(read):
    assert [row.text for row in read({"text": " a\n"}, format="text").rows] == [" a\n"]


def test_columns_can_have_other_names(read):
    columns = Columns(instruction="ask", input=None, output="reply")
    assert conversations(read({"ask": "q", "input": "no", "reply": "a"}, columns=columns)) == [say("q", "a")]
    row = {"chat": say("q", "a")}
    assert conversations(read(row, format="messages", columns=Columns(messages="chat"))) == [say("q", "a")]


def test_the_given_system_prompt_goes_where_there_is_none(read):
    rows = alpaca(), alpaca(system="own"), alpaca(system="")
    found = conversations(read(*rows, system="given"))
    assert [messages[0]["content"] for messages in found] == ["given", "own", "given"]


def test_several_files_are_read_in_order(tmp_path):
    paths = [str(tmp_path / name) for name in ("b.json", "a.jsonl")]
    (tmp_path / "b.json").write_text(json.dumps([alpaca(output="1"), alpaca(output="2")]))
    (tmp_path / "a.jsonl").write_text(json.dumps(alpaca(output="3")))
    found = conversations(read_rows(Section(path=paths)))
    assert [messages[-1]["content"] for messages in found] == ["1", "2", "3"]
    with pytest.raises(DataError, match=r"eval\.path: an empty list"):
        read_rows(SourceSection(path=[]), "eval.path")


def test_missing_column_is_named_with_what_was_found(read):
    text = refused(read, alpaca(), {"instruction": "q", "input": "", "answer": "a"})
    assert text == 'a.jsonl:2: no column "output"; found instruction, input, answer; set data.columns.output'


def test_missing_column_of_an_array_is_named_by_line_and_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps([alpaca(), {"instruction": "q"}], indent=2))
    with pytest.raises(DataError, match=r'^a\.json:7 \(row 2\): no column "output"; found instruction; set'):
        read_rows(Section(path="a.json"))


@pytest.mark.parametrize("value", [None, 3, True, ["a"], {"a": 1}])
def test_column_of_a_wrong_type_is_named(read, value):
    assert 'a.jsonl:1: column "output" is ' in refused(read, alpaca(output=value))
    assert "expected a string" in refused(read, alpaca(output=value))


@pytest.mark.parametrize("history", ["x", [["a"]], [["a", "b", "c"]], [{"q": "a"}], [["a", 1]]])
def test_history_of_a_wrong_shape_is_refused(read, history):
    assert 'a.jsonl:1: column "history"' in refused(read, alpaca(history=history))


@pytest.mark.parametrize("role", ["bot", "", None, 1, ["user"]])
def test_unknown_roles_are_refused_by_name(read, role):
    text = refused(read, {"conversations": [{"from": role, "value": "x"}]}, format="sharegpt")
    assert text.startswith(f"a.jsonl:1: conversations[0]: unknown role {role!r}; allowed: human, user, gpt, assistant")
    text = refused(read, {"messages": [{"role": role, "content": "x"}]}, format="messages")
    allowed = "user, assistant, system, tool, function"
    assert text == f"a.jsonl:1: messages[0]: unknown role {role!r}; allowed: {allowed}; data.tags renames them"


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        ("x", 'column "messages" is a string; expected a list of messages'),
        ([], 'column "messages" is an empty list'),
        (["x"], "messages[0] is a string; expected an object with role, content"),
        ([{"role": "user"}], 'messages[0] has no "content"; found role'),
        ([{}], 'messages[0] has no "role"; found nothing'),
        ([{"role": "user", "content": None}], "messages[0].content is null; expected a string"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text is null; expected a string"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]: a part of type a string; only text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages[0].content[0]: a part of type 'image'; only"),
    ],
)
def test_turns_of_a_wrong_shape_are_refused(read, turns, complaint):
    assert f"a.jsonl:1: {complaint}" in refused(read, {"messages": turns}, format="messages")


def test_half_a_surrogate_pair_is_no_text(read):
    assert 'a.jsonl:1: column "output" holds \\ud83d, half' in refused(read, alpaca(output="a\ud83d"))
    assert conversations(read(alpaca(output="\U0001f600")))[0][-1]["content"] == "\U0001f600"


def test_columns_that_nobody_reads_are_counted(read):
    result = read(alpaca(context="c"), alpaca(context="d", id=3), alpaca())
    assert dict(result.unused) == {"context": 2, "id": 1}
    turn = {"role": "user", "content": "x", "name": "Ada", "tool_calls": None, "weight": 1}
    assert dict(read({"messages": [turn]}, format="messages").unused) == {"messages[].name": 1, "messages[].weight": 1}


def test_empty_answers_are_counted(read):
    rows = read(alpaca(), alpaca(output=" \n"), alpaca(output="", history=[["q", ""]]))
    assert (rows.empty_answers, rows.empty_first) == (2, "a.jsonl:2")


def test_an_optional_column_that_the_user_named_must_be_there(read):
    text = refused(read, alpaca(), columns=Columns(input="context"))
    assert text.startswith('data.path: no row has the column "context" of data.columns.input; found ')


def test_settings_that_would_do_nothing_are_refused():
    wrong = {"format": "text", "system": "s"}, {"format": "text", "train_on_prompt": True}
    wrong += {"columns": {"messages": "m"}}, {"format": "messages", "columns": {"output": "o"}}
    for data in wrong:
        with pytest.raises(ConfigError, match=r"would do nothing|is not read by format"):
            make_config({"model": {"path": "m"}, "data": {"path": "a.json", **data}})
