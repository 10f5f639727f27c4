"""Which turns are learnt: by role, the last alone, message by message; tools' replies never, unless asked for."""

import json

import numpy as np
import pytest

from jaxtune.config import DataSection, EvalSection, TrainSection, make_config
from jaxtune.data.encode import encode
from jaxtune.data.formats import Row, read_rows
from jaxtune.data.loader import build_data
from jaxtune.data.template import ChatTemplate, open_template
from jaxtune.errors import ConfigError, DataError
from tests.data.templates import LLAMA3, MARKED, QWEN3, TOOLED, say, tokenizer, word_tokenizer
from tests.peer import CHATML

CALLED = [
    *say("a", "b", system="s"),
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d", "tool_calls": [{"function": {"name": "e", "arguments": {"f": "g"}}}]},
    {"role": "tool", "content": "h"},
    {"role": "tool", "content": "i"},
    {"role": "assistant", "content": "j"},
]
TOOLS = [{"type": "function", "function": {"name": "t"}}]


def runs(tok, tokens, mask) -> list[str]:
    """The supervised tokens, decoded run by run."""
    edges = np.flatnonzero(np.diff(mask.astype(int))) + 1
    parts = zip(np.split(tokens, edges), np.split(mask, edges))
    return [tok.decode(run.tolist()) for run, on in parts if on.all()]


def learnt(messages, source=TOOLED, tok=None, tools=None, **settings) -> list[str]:
    tok = tok or word_tokenizer()
    section = DataSection(path="a.json", max_length=512, **settings)
    variables = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    with ChatTemplate(source, variables, "the template") as chat:
        examples, _ = encode([Row("a:1", messages, tools=tools)], section, tok, chat)
    return runs(tok, examples.tokens, examples.supervised)


def test_turns_that_call_tools_are_learnt_and_replies_are_not():
    assert learnt(CALLED, tools=TOOLS) == ["b <|im_end|>", "d e f g <|im_end|>", "j <|im_end|>"]


def test_a_call_may_have_a_special_token_of_its_own():
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for call in m.tool_calls or [] %}{{ '<|endoftext|>' + call.function.name }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "tides"}}]}
    for said in ("", "I look."):
        found = learnt([*say("q"), {**called, "content": said}, *say("r")], source, tokenizer())
        assert found == [f"{said}<|endoftext|>tides<|im_end|>"]


NULL_CALLS = (  # as DeepSeek's: calls are read where nothing is said beside them, and that is null
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is none %}"
    "{% for call in m.tool_calls %}{{ call.function.name + ' ' }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_calls_are_written_by_a_template_that_reads_them_beside_a_null():
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name}} for name in ("s", "a")]}
    messages = [*say("a"), called, {"role": "tool", "content": "h"}, *say("a", "", "b", "c")[1:]]
    assert learnt(messages, NULL_CALLS, tokenizer()) == ["s a <|im_end|>", "<|im_end|>", "c<|im_end|>"]
    with pytest.raises(DataError) as caught:
        learnt([*messages[:1], {**called, "content": "d"}], NULL_CALLS, tokenizer())
    assert str(caught.value) == (
        "a:1: the template does not take this conversation: it leaves out the call of 's' in message 1 (counted from "
        "0); set data.template to one that writes it"
    )


def test_the_template_sees_tools_and_not_whether_a_message_is_learnt():
    source = "{{ messages | tojson }}{{ tools | tojson }}"
    messages = [{"role": "user", "content": "a", "train": False}]
    with ChatTemplate(source, {}, "the template") as chat:
        (answer,) = chat.render([Row("a:1", messages, tools=TOOLS)], None)
    assert answer["text"] == json.dumps([{"role": "user", "content": "a"}]) + json.dumps(TOOLS)


def test_the_last_turn_alone_can_be_learnt():
    assert learnt(CALLED, train_on="last") == ["j <|im_end|>"]
    assert learnt(CALLED[:4] + CALLED[4:7], train_on="last") == ["d e f g <|im_end|>"]
    assert learnt(say("a", "b", "c", "d"), CHATML, train_on="last") == ["d <|im_end|>"]
    assert learnt(say("q", "Ada.", "r", "Bo."), MARKED, tokenizer(), train_on="last") == ["Bo.<|im_end|>"]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["user"], ["a <|im_end|>", "c <|im_end|>"]),
        (["system"], ["s <|im_end|>"]),
        (["tool"], ["h <|im_end|>", "i <|im_end|>"]),
        (["assistant", "user"], ["a <|im_end|>", "b <|im_end|>", "c <|im_end|>", "d e f g <|im_end|>", "j <|im_end|>"]),
    ],
)
def test_roles_choose_what_is_learnt(roles, expected):
    assert learnt(CALLED, tools=TOOLS, train_roles=roles) == expected


def test_the_last_of_several_roles_is_one_turn():
    assert learnt(say("a", "b", "c"), train_roles=["assistant", "user"], train_on="last") == ["c <|im_end|>"]


@pytest.mark.parametrize("source", [CHATML, MARKED, LLAMA3])
def test_what_others_say_is_learnt_without_its_header(source):
    end = "<|eot_id|>" if source == LLAMA3 else "<|im_end|>"
    messages = say("user", "assistant", "user", "Ada", system="system")
    found = learnt(messages, source, tokenizer(), train_roles=["user", "system", "assistant"])
    assert found == [text + end for text in ("system", "user", "assistant", "user", "Ada")]


def flagged(*flags: bool | None) -> list[dict]:
    return [said if on is None else {**said, "train": on} for said, on in zip(say("a", "b", "c", "d"), flags)]


@pytest.mark.parametrize("source", [CHATML, MARKED])
def test_a_messages_own_word_goes_over_the_configuration(source):
    b, c, d = ["b<|im_end|>"], ["c<|im_end|>"], ["d<|im_end|>"]
    tok = tokenizer()
    assert learnt(flagged(None, False, None, None), source, tok) == d
    assert learnt(flagged(None, None, True, False), source, tok) == b + c
    assert learnt(flagged(None, True, None, None), source, tok, train_on="last") == b + d
    assert learnt(flagged(None, None, True, None), source, tok, train_on="last") == c + d


@pytest.mark.parametrize(
    ("turn", "train"),
    [
        ({"train": False}, False),
        ({"training": True}, True),
        ({"weight": 0}, False),
        ({"weight": 1.0}, None),
        ({"train": True, "weight": 1}, True),
        ({"train": None}, None),
        ({}, None),
    ],
)
def test_a_message_says_itself_whether_it_is_learnt(tmp_path, turn, train):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "a", **turn}]}))
    (row,) = read_rows(DataSection(path=str(path), format="messages")).rows
    assert row.messages[0].get("train") is train
    path.write_text(json.dumps({"conversations": [{"from": "gpt", "value": "a", **turn}]}))
    assert read_rows(DataSection(path=str(path), format="sharegpt")).rows[0].messages == row.messages


@pytest.mark.parametrize(
    ("turn", "complaint"),
    [
        ({"train": 1}, "messages[0].train: expected true or false; found 1"),
        ({"training": "no"}, "messages[0].training: expected true or false; found 'no'"),
        ({"weight": 0.5}, "messages[0].weight: expected 0 or 1; found 0.5"),
        ({"weight": True}, "messages[0].weight: expected 0 or 1; found True"),
        ({"train": True, "weight": 0}, "messages[0]: train, weight disagree; keep one"),
    ],
)
def test_a_word_that_is_none_is_refused(tmp_path, turn, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": "a", **turn}]}))
    with pytest.raises(DataError) as caught:
        read_rows(DataSection(path=str(path), format="messages"))
    assert str(caught.value) == f"{path}:1: {complaint}"


def test_what_the_template_writes_after_a_turn_is_learnt_when_asked_for():
    tok = tokenizer()
    assert learnt(say("q", "Ada.", "r", "Bo."), CHATML, tok, turn_end="template") == [
        "Ada.<|im_end|>\n",
        "Bo.<|im_end|>\n",
    ]
    with pytest.raises(DataError, match=r"a:1: data.turn_end template: the chat template says itself"):
        learnt(say("q", "a"), MARKED, tok, turn_end="template")
    with pytest.raises(DataError, match=r"rewrites history: .* message 1 \(the assistant's"):
        learnt(say("q", "a", "r", "b"), QWEN3, tok, turn_end="template")


def test_marks_that_are_not_one_a_turn_cannot_be_chosen_from():
    halves = MARKED.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}",
    )
    assert learnt(say("q", "a"), halves, tokenizer()) == ["a<|im_end|>"]
    with pytest.raises(DataError, match="it has 4 for 2 turns"):
        learnt(say("q", "a", "r", "b"), halves, tokenizer(), train_on="last")


def test_a_template_without_tools_is_refused_where_there_are_some():
    with pytest.raises(DataError, match=r"a:1: the template does not read tools; set data\.template"):
        learnt(say("a", "b"), CHATML, tools=TOOLS)
    with pytest.raises(DataError, match="a:1: the template does not read tool_calls"):
        learnt(CALLED, CHATML)


def test_a_message_that_is_not_to_be_learnt_goes_ill_with_every_token():
    with pytest.raises(DataError, match=r"a:1: message 1 \(counted from 0\) is not to be learnt"):
        learnt(flagged(None, False, None, None), CHATML, train_on_prompt=True)
    assert learnt(flagged(None, True, None, None), CHATML, train_on_prompt=True)


@pytest.mark.parametrize(
    "data",
    [
        {"train_on_prompt": True, "train_on": "last"},
        {"train_on_prompt": True, "train_roles": ["user"]},
        {"train_on_prompt": True, "turn_end": "template"},
        {"format": "text", "train_on": "last"},
        {"format": "text", "train_roles": ["user"]},
        {"format": "text", "turn_end": "template"},
        {"format": "text", "dialect": "llamafactory"},
        {"tags": {"user": "guest"}},
    ],
)
def test_choices_that_would_do_nothing_are_refused(data):
    with pytest.raises(ConfigError, match="would do nothing"):
        make_config({"model": {"path": "m"}, "data": {"path": "a.json", **data}})


@pytest.mark.parametrize("roles", [[], ["user", "user"]])
def test_roles_are_some_and_each_once(roles):
    with pytest.raises(ConfigError, match="train_roles: expected at least one role, each once"):
        make_config({"model": {"path": "m"}, "data": {"path": "a.json", "train_roles": roles}})


TIDES = {"name": "tides", "description": "High water at a port.", "parameters": {"type": "object", "properties": {}}}
CONVERSATION = {
    "tools": json.dumps([TIDES]),
    "messages": [
        {"role": "system", "content": "You keep a lighthouse."},
        {"role": "user", "content": "When is high water at Brest, and at Dover?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "tides", "arguments": '{"port": "Brest"}'}},
                {"id": "2", "type": "function", "function": {"name": "tides", "arguments": '{"port": "Dover"}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "04:12"},
        {"role": "tool", "tool_call_id": "2", "content": "11:40"},
        {"role": "assistant", "content": "At 04:12 and at 11:40.", "weight": 1},
    ],
}


@pytest.fixture
def qwen(shared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "assets/qwen2.5-tokenizer", local_files_only=True)


@pytest.mark.real
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1]),
        ({"train_on": "last"}, [1]),
        ({"train_roles": ["tool"]}, ["04:12", "11:40"]),
        ({"train_roles": ["user"]}, ["When is high water at Brest, and at Dover?<|im_end|>"]),
        ({"train_roles": ["system"]}, ["You keep a lighthouse.\n\n"]),  # one token with the full stop
    ],
)
def test_qwens_template_calls_tools_and_only_what_is_asked_for_is_learnt(tmp_path, qwen, settings, expected):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(CONVERSATION))
    section = DataSection(path=str(path), format="messages", packing=False, **settings)
    data = build_data(section, EvalSection(), TrainSection(steps=1, batch_size=1), qwen).train.examples
    calls = [
        f'<tool_call>\n{{"name": "tides", "arguments": {{"port": "{port}"}}}}\n</tool_call>'
        for port in ("Brest", "Dover")
    ]
    own = ["\n".join(calls) + "<|im_end|>", "At 04:12 and at 11:40.<|im_end|>"]
    wanted = [own[item] if isinstance(item, int) else item for item in expected]
    assert runs(qwen, data.tokens, data.supervised) == wanted
    peer = [dict(message) for message in CONVERSATION["messages"]]
    arguments = [{"name": "tides", "arguments": {"port": port}} for port in ("Brest", "Dover")]
    peer[2] = {"role": "assistant", "tool_calls": [{"function": call} for call in arguments]}
    tools = [{"type": "function", "function": TIDES}]
    assert data.tokens.tolist() == qwen.apply_chat_template(peer, tools=tools, return_dict=False)


@pytest.mark.real
def test_qwens_template_is_opened_with_tools(qwen):
    with open_template(qwen) as chat:
        (answer,) = chat.render([Row("a:1", say("q", "a"), tools=[{"type": "function", "function": TIDES}])])
    assert '<tools>\n{"type": "function", "function": {"name": "tides"' in answer["text"]


def test_the_last_turn_can_be_told_where_the_past_is_rewritten():
    messages = say("q", "<think>\nhm\n</think>\n\na", "r", "<think>\nhm\n</think>\n\nb")
    with pytest.raises(DataError, match="rewrites history"):
        learnt(messages, QWEN3, tokenizer())
    assert learnt(messages, QWEN3, tokenizer(), train_on="last") == ["<think>\nhm\n</think>\n\nb<|im_end|>"]


def test_a_turn_of_which_the_template_says_something_else_is_not_found():
    shouting = CHATML.replace("message['content']", "message['content'].upper()")
    with pytest.raises(DataError, match=r"rewrites history: .* message 0 \(the user's"):
        learnt(say("quiet", "loud"), shouting, tokenizer(), train_roles=["user"])
