"""Tools in conversations: which there are, and the calls of them, as chat templates read them.

That is OpenAI's form with one difference, which transformers documents: a call's arguments are an object, not its
JSON text. https://huggingface.co/docs/transformers/chat_extras
"""

import json
from typing import Any

from jaxtune.data.columns import Cells
from jaxtune.data.records import kind
from jaxtune.errors import DataError

Tool = dict[str, Any]  # {"type": "function", "function": {"name": ..., "arguments" or "parameters": ...}}
_END_OF_THOUGHT = "</think>"


def read_tools(record: Cells) -> list[Tool] | None:
    """The functions that a row offers, from a list or its JSON text; None: none."""
    found, what = record.given(record.get("tools")), f'column "{record.name("tools")}"'
    if isinstance(found, str):
        found = _parse(record, found, what) if found.strip() else None
    tools = [found] if isinstance(found, dict) else found or []
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{record.where}: {what}: expected a list of functions, or its JSON text; found {found!r:.60}")
    return [_tool(record, record.as_json(tool, what), what) for tool in tools] or None


def read_calls(record: Cells, calls: Any, what: str) -> list[Tool]:
    """A turn's `tool_calls`. Each is {"function": {"name", "arguments"}}, or that function alone."""
    if not isinstance(calls, list):
        raise DataError(f"{record.where}: {what} is {kind(calls)}; expected a list of calls")
    return [_call(record, call, f"{what}[{number}]") for number, call in enumerate(calls)]


def read_call_text(record: Cells, text: str, what: str) -> tuple[str, list[Tool]]:
    """(thought, calls) of a sharegpt turn: {"name", "arguments"} as JSON text, or a list of such.

    A thought is what stands before it, up to and with </think>.
    """
    thought, end, rest = text.rpartition(_END_OF_THOUGHT)
    found = _parse(record, rest, what)
    return thought + end, read_calls(record, found if isinstance(found, list) else [found], what)


def _tool(record: Cells, tool: dict[str, Any], what: str) -> Tool:
    """In OpenAI's form, of which `type` may be missing, or the function alone may be there, with or without `type`."""
    told = tool.get("type")
    rest = {key: value for key, value in tool.items() if key != "type"}
    function = tool.get("function", rest)
    if told not in (None, "function") or not (isinstance(function, dict) and isinstance(function.get("name"), str)):
        raise DataError(f"{record.where}: {what}: expected functions with names; found {tool!r:.60}")
    return {"type": "function", **rest} if function is not rest else _function(rest)


def _call(record: Cells, call: Any, what: str) -> Tool:
    found = call.get("function", call) if isinstance(call, dict) else None
    if not (isinstance(found, dict) and isinstance(found.get("name"), str) and "arguments" in found):
        raise DataError(f"{record.where}: {what}: expected a function with a name and arguments; found {call!r:.60}")
    arguments = found["arguments"]
    if isinstance(arguments, str):
        arguments = _parse(record, arguments, f"{what}: arguments") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise DataError(f"{record.where}: {what}: arguments is {kind(arguments)}; expected an object, or its JSON text")
    identity = {} if call.get("id") is None else {"id": record.identity(call["id"], f"{what}.id")}
    function = record.as_json({"name": found["name"], "arguments": arguments}, what)
    return {**identity, **_function(function)}


def _function(function: dict[str, Any]) -> Tool:
    return {"type": "function", "function": function}


def _parse(record: Cells, text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{record.where}: {what}: not valid JSON: {error}; found {text!r:.60}") from None
