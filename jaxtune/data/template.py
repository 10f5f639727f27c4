"""A chat template in its sandbox: conversations in, texts and the places of the assistant's turns out.

The rendering itself is done by sandbox.py in a process of its own; which tokens are trained is for chat.py.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxtune.data.child import start
from jaxtune.data.formats import Row
from jaxtune.data.tools import Tool
from jaxtune.data.turns import Message, said_by
from jaxtune.errors import DataError

SECONDS = 10.0  # for one request; a usual one takes a few milliseconds
MEMORY = 2 << 30  # bytes of address space
MAX_SOURCE = 1 << 20  # characters of a template
MAX_TEXT = 1 << 20  # characters of a rendering, beyond four times the conversation's own
_CHUNK_WORK, _CHUNK_TEXT = 4096, 1 << 22  # squared messages (each prefix is rendered) and characters of a request


Turns = Callable[[list[Message]], list[int]]  # which messages of a conversation


def assistant_turns(messages: list[Message]) -> list[int]:
    """Which messages are the assistant's."""
    return said_by(messages, "assistant")


def begins_with_assistant(row: Row) -> bool:
    """Whether there is nothing before the assistant's first turn, not even a system prompt."""
    return said_by(row.messages or [], "assistant")[:1] == [0]


class ChatTemplate:
    """A template with the variables that it may read. Close it, or use it in a `with`."""

    def __init__(self, source: str, variables: dict[str, Any], where: str, seconds: float = SECONDS):
        """where: names the template in errors; seconds: what one request may take."""
        if len(source) > MAX_SOURCE:
            raise DataError(f"{where}: {len(source)} characters; a template has at most {MAX_SOURCE}")
        self.where, self.seconds, self.source = where, seconds, source
        # -P: the modules beside sandbox.py are not to be found by bare names.
        command = [sys.executable, "-P", str(Path(__file__).with_name("sandbox.py"))]
        what = f"{where}: the process that renders it"
        self._process = start(command, what, stderr=subprocess.PIPE, text=True, encoding="utf-8")
        self._lock = threading.Lock()
        try:
            self.has_marks: bool = self._ask({"template": source, "variables": variables, "memory": MEMORY})[
                "has_marks"
            ]
        except BaseException:
            self.close()
            raise

    def render(self, rows: Iterable[Row], turns: Turns | None = assistant_turns) -> Iterator[dict[str, Any]]:
        """For each conversation {"text"} and, unless `turns` is None, where those messages that it gives stand in it.

        That is "turns": for each [its index, where it begins, end of the text through it], counted in characters of
        the text. An assistant's turn begins after the generation prompt, those of others with what they say; None
        stands for a place that a rendering of the messages so far does not tell, not being a prefix of the text.
        A template with {% generation %} blocks says itself where every assistant speaks, which is "marks" then, their
        [start, end) characters, and only the others' are in "turns".
        Of a conversation that begins with the assistant, and that the template refuses for whatever reason, "refused"
        says why: such rows are common, and for the caller to judge.

        Raises:
            DataError: the template refuses a conversation, fails, goes over a limit, or does not read its tools.
        """
        for chunk in _chunks(self._readable(rows)):
            requests = [_request(row, turns) for row in chunk]
            wheres = [row.where for row in chunk]
            for row, answer in zip(chunk, self._ask(requests, wheres), strict=True):
                if "error" not in answer:
                    yield answer
                elif begins_with_assistant(row):
                    yield {"text": "", "refused": f"{self.where} does not take it: {answer['error']}"}
                else:
                    raise DataError(f"{row.where}: {self.where} does not take this conversation: {answer['error']}")

    def _readable(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, unless one has what the template would leave out without a word."""
        tools, calls = ("tools" in self.source), ("tool_calls" in self.source)
        for row in rows:
            if row.tools and not tools:
                raise DataError(
                    f"{row.where}: {self.where} does not read tools; set data.template to one that does, "
                    "or data.columns.tools: null to learn without them"
                )
            if not calls and any("tool_calls" in said for said in row.messages or ()):
                raise DataError(
                    f"{row.where}: {self.where} does not read tool_calls; set data.template to one that does"
                )
            yield row

    def prompt(self, messages: list[Message]) -> str:
        """The text up to where the assistant begins to speak: what generation starts from."""
        request = {"messages": messages, "prompt": True, "limit": _limit(_size(messages))}
        (answer,) = self._ask([request], ["the messages"])
        if "error" in answer:
            raise DataError(f"{self.where} does not take the messages: {answer['error']}")
        return answer["text"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> "ChatTemplate":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: Any, wheres: list[str] | None = None) -> Any:
        """The process's answer to one request, or DataError when there is none in time."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        with self._lock:
            timer = threading.Timer(self.seconds, stop)
            timer.start()
            try:
                line = self._exchange(json.dumps(request))
            finally:
                timer.cancel()
        if line:
            answer = json.loads(line)
            if isinstance(answer, dict) and "error" in answer:
                raise DataError(f"{self.where}: {answer['error']}")
            return answer
        at = "" if not wheres else f"{wheres[0]}: " if len(wheres) == 1 else f"{wheres[0]} to {wheres[-1]}: "
        if late.is_set():
            long = f"took more than {self.seconds:g} s and was stopped"
            raise DataError(f"{at}{self.where} {long}; does it loop, or is this machine too busy to run it?")
        words = self._process.communicate()[1].strip().splitlines()[-1:] or [f"exit code {self._process.returncode}"]
        raise DataError(f"{at}{self.where}: its process ended: {words[0]:.300}")

    def _exchange(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self._process.stdout.readline()


def open_template(tokenizer: Any, path: str | None = None) -> ChatTemplate:
    """The chat template in the file `path` (data.template) or, without one, the tokenizer's own.

    Raises:
        DataError: there is none, it cannot be read, or it is no template.
    """
    variables = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    if path is None:
        return ChatTemplate(_own_template(tokenizer), variables, "the tokenizer's chat template")
    try:
        source = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"data.template {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"data.template {path}: not UTF-8 text") from None
    return ChatTemplate(source, variables, f"data.template {path}")


def _own_template(tokenizer: Any) -> str:
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, dict):  # several by name; generation uses this one when there are no tools
        source = source.get("default")
    if not source:
        raise DataError(
            "the tokenizer has no chat template; set data.template to a file with one (Jinja), "
            "or learn plain text with data.format: text"
        )
    return source


def _request(row: Row, turns: Turns | None) -> dict[str, Any]:
    messages = row.messages or []
    seen = [{key: value for key, value in said.items() if key != "train"} for said in messages]
    asked = None if turns is None else turns(messages)
    return {"messages": seen, "tools": row.tools, "turns": asked, "limit": _limit(_size(messages, row.tools))}


def _limit(size: int) -> int:
    return MAX_TEXT + 4 * size


def _size(messages: list[Message], tools: list[Tool] | None = None) -> int:
    """Characters of a conversation."""
    called = (said["tool_calls"] for said in messages if "tool_calls" in said)
    return sum(len(said["content"]) for said in messages) + sum(len(str(part)) for part in (*called, tools or ""))


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Requests of bounded work, so that the time limit means the same for all."""
    chunk: list[Row] = []
    work = text = 0
    for row in rows:
        more_work, more_text = len(row.messages or ()) ** 2, _size(row.messages or [], row.tools)
        if chunk and (work + more_work > _CHUNK_WORK or text + more_text > _CHUNK_TEXT):
            yield chunk
            chunk, work, text = [], 0, 0
        chunk.append(row)
        work, text = work + more_work, text + more_text
    if chunk:
        yield chunk
