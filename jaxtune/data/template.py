"""A chat template in its sandbox: conversations in, texts and the places of the assistant's turns out.

The rendering itself is done by sandbox.py in a process of its own; which tokens are trained is for chat.py.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxtune.data.formats import Message
from jaxtune.errors import DataError

SECONDS = 10.0  # for one request; a usual one takes a few milliseconds
MEMORY = 2 << 30  # bytes of address space
MAX_SOURCE = 1 << 20  # characters of a template
MAX_TEXT = 1 << 20  # characters of a rendering, beyond four times the conversation's own
_CHUNK_WORK, _CHUNK_TEXT = 4096, 1 << 22  # squared messages (each prefix is rendered) and characters of a request


class ChatTemplate:
    """A template with the variables that it may read. Close it, or use it in a `with`."""

    def __init__(self, source: str, variables: dict[str, Any], where: str, seconds: float = SECONDS):
        """where: names the template in errors; seconds: what one request may take."""
        if len(source) > MAX_SOURCE:
            raise DataError(f"{where}: {len(source)} characters; a template has at most {MAX_SOURCE}")
        self.where, self.seconds, self.source = where, seconds, source
        # -P: the modules beside sandbox.py are not to be found by bare names.
        command = [sys.executable, "-P", str(Path(__file__).with_name("sandbox.py"))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, encoding="utf-8")
        self._lock = threading.Lock()
        try:
            self.has_marks: bool = self._ask({"template": source, "variables": variables, "memory": MEMORY})[
                "has_marks"
            ]
        except BaseException:
            self.close()
            raise

    def render(
        self, conversations: Iterable[tuple[str, list[Message]]], marks: bool = True
    ) -> Iterator[dict[str, Any]]:
        """For each (file:line, messages): {"text"} and, with `marks`, where the assistant speaks in it.

        The latter is either "marks", the [start, end) characters of the template's {% generation %} blocks, or
        "turns": for each assistant message [its index, end of the generation prompt before it, end of the text
        through it], both counted in characters of the text, or None where that rendering is not a prefix of the text.

        Raises:
            DataError: the template refuses a conversation, fails, or goes over a limit.
        """
        for chunk in _chunks(conversations):
            requests = [{"messages": messages, "marks": marks, "limit": _limit(messages)} for _, messages in chunk]
            wheres = [where for where, _ in chunk]
            for where, answer in zip(wheres, self._ask(requests, wheres), strict=True):
                if "error" in answer:
                    raise DataError(f"{where}: {self.where} does not take this conversation: {answer['error']}")
                yield answer

    def prompt(self, messages: list[Message]) -> str:
        """The text up to where the assistant begins to speak: what generation starts from."""
        request = {"messages": messages, "prompt": True, "limit": _limit(messages)}
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
            raise DataError(f"{at}{self.where} took more than {self.seconds:g} s and was stopped; does it loop?")
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


def _limit(messages: list[Message]) -> int:
    return MAX_TEXT + 4 * sum(len(message["content"]) for message in messages)


def _chunks(conversations: Iterable[tuple[str, list[Message]]]) -> Iterator[list[tuple[str, list[Message]]]]:
    """Requests of bounded work, so that the time limit means the same for all."""
    chunk: list[tuple[str, list[Message]]] = []
    work = text = 0
    for where, messages in conversations:
        more_work, more_text = len(messages) ** 2, sum(len(message["content"]) for message in messages)
        if chunk and (work + more_work > _CHUNK_WORK or text + more_text > _CHUNK_TEXT):
            yield chunk
            chunk, work, text = [], 0, 0
        chunk.append((where, messages))
        work, text = work + more_work, text + more_text
    if chunk:
        yield chunk
