"""The turns of a conversation in sharegpt's form and in OpenAI's: who speaks, what is said, what is learnt of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxtune.data.columns import Cells, OddRow, in_words
from jaxtune.data.records import format_of_turns, kind
from jaxtune.data.tools import read_call_text, read_calls
from jaxtune.data_section import TURN_KEYS, SourceSection
from jaxtune.errors import DataError, listing

# role (system, user, assistant, tool) and content; of assistants tool_calls, of tools tool_call_id and name. `train`
# (whether it is learnt, whatever the configuration says) is ours: chat templates do not see it.
Message = dict[str, Any]

CALL = "call"  # the speaker of a turn that is a call of tools, the assistant's
_NAMES = {  # the speakers' names in each format
    "sharegpt": {
        "user": ["human", "user"],
        "assistant": ["gpt", "assistant"],
        "system": ["system"],
        "observation": ["observation", "tool"],
        "function": ["function_call"],
    },
    "messages": {
        "user": ["user"],
        "assistant": ["assistant"],
        "system": ["system"],
        "observation": ["tool", "function"],
        "function": [],
    },
}
_ROLES = {"observation": "tool", "function": CALL}
_OF_ASSISTANTS, _OF_TOOLS = ("tool_calls", "function_call", "weight"), ("tool_call_id", "name")
_TRAIN = ("train", "training")


@dataclass(frozen=True)
class Speech:
    """How a source's turns are written down."""

    column: str  # what the data call the list of turns
    role: str
    content: str
    roles: dict[str, str]  # a speaker's name -> role, or CALL


def speech_of(section: SourceSection) -> Speech:
    """From a source's format and its tags."""
    tags = section.tags
    role, content = TURN_KEYS[section.format]
    roles: dict[str, str] = {}
    for speaker, names in _NAMES[section.format].items():
        own = getattr(tags, speaker)
        roles |= dict.fromkeys(names if own is None else [own] if own else [], _ROLES.get(speaker, speaker))
    columns = section.columns
    column = columns.conversations if section.format == "sharegpt" else columns.messages
    return Speech(column, tags.role or role, tags.content or content, roles)


def read_turns(record: Cells, column: str) -> list[Message]:
    """The messages of a row."""
    speech = speech_of(record.section)
    messages = [_turn(record, turn, speech, number) for number, turn in enumerate(record.messages(column))]
    return _as_llamafactory(messages, record.section.format) if record.like_llamafactory else messages


def message(role: str, content: str) -> Message:
    """A message of text alone."""
    return {"role": role, "content": content}


def said_by(messages: Iterable[Message], role: str) -> list[int]:
    """Which messages are a role's."""
    return [number for number, said in enumerate(messages) if said["role"] == role]


def _turn(record: Cells, turn: Any, speech: Speech, number: int) -> Message:
    what = f"{speech.column}[{number}]"
    if not isinstance(turn, dict):
        raise DataError(
            f"{record.where}: {what} is {kind(turn)}; expected an object with {speech.role}, {speech.content}"
        )
    role = _role(record, turn, speech, what)
    calls = _calls(record, turn, role, what)
    if not calls:
        _need(record, turn, speech.content, what)
    content = _content(record, turn.get(speech.content), bool(calls), f"{what}.{speech.content}")
    if role == CALL:
        content, calls = read_call_text(record, content, f"{what}.{speech.content}")
    result = message("assistant" if role == CALL else role, content)
    if calls:
        result["tool_calls"] = calls
    if role == "tool":
        said = [key for key in _OF_TOOLS if turn.get(key) is not None]
        result |= {key: record.identity(turn[key], f"{what}.{key}") for key in said}
    result |= _train(record, turn, role, what)
    _count_extras(record, turn, speech, role)
    return result


def _need(record: Cells, turn: dict[str, Any], key: str, what: str) -> None:
    if key not in turn:
        raise DataError(
            f'{record.where}: {what} has no "{key}"; found {listing(turn) or "nothing"}{_advice(record, turn)}'
        )


def _advice(record: Cells, turn: dict[str, Any]) -> str:
    """A word on the other format's turns."""
    format, column = format_of_turns([turn]), speech_of(record.section).column
    if record.like_llamafactory or format is None or format == record.section.format:
        return ""
    return f"; {in_words(format, column)} reads such turns"


def _role(record: Cells, turn: dict[str, Any], speech: Speech, what: str) -> str:
    _need(record, turn, speech.role, what)
    name = turn[speech.role]
    if isinstance(name, str) and name in speech.roles:
        return speech.roles[name]
    if record.like_llamafactory:
        raise OddRow
    raise DataError(
        f"{record.where}: {what}: unknown role {name!r:.40}; allowed: {listing(speech.roles)}; data.tags renames them"
    )


def _content(record: Cells, content: Any, may_miss: bool, what: str) -> str:
    """The text of a turn, which may be given in parts."""
    if content is None and may_miss:
        return ""
    if not isinstance(content, list):
        return record.string(content, what)
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            found = repr(part.get("type")) if isinstance(part, dict) else kind(part)
            raise DataError(f"{record.where}: {what}[{number}]: a part of type {found:.40}; only text is learnt from")
        texts.append(record.string(part.get("text"), f"{what}[{number}].text"))
    return "".join(texts)


def _calls(record: Cells, turn: dict[str, Any], role: str, what: str) -> list[dict[str, Any]]:
    """The tools that a turn calls; `function_call` is OpenAI's older way to name one."""
    calls, one = (record.given(turn.get(key)) for key in ("tool_calls", "function_call"))
    if (calls or one) and role != "assistant":
        raise DataError(f"{record.where}: {what} calls a tool, but is not the assistant's")
    if calls and one:
        raise DataError(f"{record.where}: {what} has tool_calls and function_call; keep one")
    key = "function_call" if one else "tool_calls"
    return read_calls(record, [one] if one else calls or [], f"{what}.{key}")


def _train(record: Cells, turn: dict[str, Any], role: str, what: str) -> dict[str, bool]:
    """{"train": ...} where the turn says itself whether it is learnt: Axolotl's key, or OpenAI's `weight` of 0.

    A weight of 1 is what OpenAI takes without one, so it says nothing.
    """
    allowed: dict[str, tuple[Any, ...]] = dict.fromkeys(_TRAIN, (True, False))
    if role == "assistant":
        allowed["weight"] = (0, 1)
    found = {key: turn[key] for key in allowed if turn.get(key) is not None}
    for key, value in found.items():
        if value not in allowed[key] or (key in _TRAIN) != isinstance(value, bool):
            words = "true or false" if key in _TRAIN else "0 or 1"
            raise DataError(f"{record.where}: {what}.{key}: expected {words}; found {value!r:.40}")
    if len({bool(value) for value in found.values()}) > 1:
        raise DataError(f"{record.where}: {what}: {listing(found)} disagree; keep one")
    said = [bool(value) for key, value in found.items() if key in _TRAIN or not value]
    return {"train": said[0]} if said else {}


def _count_extras(record: Cells, turn: dict[str, Any], speech: Speech, role: str) -> None:
    read = {speech.role, speech.content, *_TRAIN}
    read |= set(_OF_ASSISTANTS) if role == "assistant" else set(_OF_TOOLS) if role == "tool" else set()
    said = (key for key, value in turn.items() if key not in read and value is not None and value != [])
    record.unused.update(f"{speech.column}[].{key}" for key in said)


def _as_llamafactory(messages: list[Message], format: str) -> list[Message]:
    """The messages that LLaMA-Factory would learn from.

    Raises:
        OddRow: none. After a system prompt, which comes first if at all, a user or a tool speaks in turn with the
            assistant, who has the last word. Several replies of tools in a row count as one in OpenAI's form only,
            where those at the end are left out too.
    """
    first = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(first) :]
    while format == "messages" and turns and turns[-1]["role"] == "tool":
        turns = turns[:-1]
    roles = [said["role"] for said in turns]
    if format == "messages":
        roles = [role for at, role in enumerate(roles) if role != "tool" or at == 0 or roles[at - 1] != "tool"]
    in_turn = (role in (("user", "tool"), ("assistant",))[at % 2] for at, role in enumerate(roles))
    if not roles or len(roles) % 2 or not all(in_turn):
        raise OddRow
    return [*(said for said in first if said["content"]), *turns]
