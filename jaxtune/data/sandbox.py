"""The process in which chat templates are rendered: a program of its own, started by template.py.

A template comes from strangers. jinja2's sandbox keeps it from Python; what the sandbox does not bound (loops
in loops, strings of gigabytes) is bounded here by memory and length, and by template.py, which kills this
process when its time is up. Nothing but jinja2 and the standard library is imported: it starts in 0.1 s.

The environment is the one that transformers documents for chat templates: an immutable sandbox, trim_blocks and
lstrip_blocks, loop controls, `tojson` that leaves HTML alone, `raise_exception`, `strftime_now`, and the block
`{% generation %}` around what the assistant says. One thing differs: the clock stands still, because a run that
is resumed on another day must see the same data.

Protocol: JSON lines. In: {template, variables, memory} once, then lists of {messages, tools, turns, limit} for
conversations; or {messages, limit, prompt: true}. Out, for each line in, one line: {error} or the answer.
"""

import json
import re
import secrets
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

TODAY = datetime(2024, 7, 26)  # the day that Llama 3's templates fall back on
_NONCE = secrets.token_hex(8)  # no conversation can hold the marks
_OPEN, _CLOSE = f"\ufdd0{_NONCE}\ufdd1", f"\ufdd1{_NONCE}\ufdd0"


Nowhere = tuple[None, None]


class Refused(Exception):
    """What is wrong with a template or a conversation, in words."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: its output, between marks while `environment.marking` is set."""

    tags = {"generation"}
    environment: Any  # jinja2's type does not know what `extend` adds

    def __init__(self, environment: Any):
        super().__init__(environment)
        environment.extend(marking=False, has_marks=False)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.has_marks = True
        return jinja2.nodes.CallBlock(self.call_method("_surround"), [], [], body).set_lineno(line)

    def _surround(self, caller) -> str:
        text = caller()
        return f"{_OPEN}{text}{_CLOSE}" if self.environment.marking else text


class Namespace(jinja2.utils.Namespace):
    """`namespace(...)` without attributes that begin with an underscore."""

    def __init__(*args, **kwargs):
        self, *given = args  # so that a template may write namespace(self=...)
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name, value):
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the attribute {name!r} of a namespace")


class Dict:
    """`dict(...)`, and nothing else of Python's class."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


def make_environment() -> Any:
    """What a chat template may use."""
    extensions = [Generation, jinja2.ext.loopcontrols]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=TODAY.strftime, dict=Dict(), namespace=Namespace)
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message):
    raise Refused(f"it says: {message}")


class Renderer:
    """One template."""

    def __init__(self, source: str, variables: dict[str, Any]):
        self.environment = make_environment()
        self.template = self.environment.from_string(source)
        self.variables = variables
        self.has_marks: bool = self.environment.has_marks

    def render(self, messages: list, tools: list | None, prompt: bool, limit: int, marking: bool = False) -> str:
        """The text of `messages`; with `prompt`, up to where the assistant begins to speak."""
        pieces, length = [], 0
        self.environment.marking = marking
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        for piece in self.template.generate(**{**self.variables, **given}):
            pieces.append(piece)
            length += len(piece)
            if length > limit:
                raise Refused(f"it gives more than {limit} characters")
        return "".join(pieces)

    def conversation(self, messages: list, tools: list | None, turns: list[int] | None, limit: int) -> dict[str, Any]:
        """The whole text and, if asked, where turns are: the assistant's by marks if there are any, else by prefixes.

        turns: which messages; None: nothing is asked.
        """
        messages = self._with_calls(messages, tools, limit)
        text = self.render(messages, tools, False, limit)
        answer: dict[str, Any] = {"text": text}
        if turns is not None and self.has_marks:
            answer["marks"] = self._marks(messages, tools, text, limit)
            turns = [i for i in turns if messages[i]["role"] != "assistant"]
        if turns is not None:
            answer["turns"] = [self._turn(messages, tools, i, text, limit) for i in turns]
        return answer

    def _with_calls(self, messages: list, tools: list | None, limit: int) -> list:
        """The messages in the form in which the template writes all of their calls: some templates (DeepSeek's) read
        calls only where the content is null, and others fail on a null."""
        left: list[str] = []
        with suppress(Exception):  # the template's own refusals come with the conversation's text
            left = self._left_out(messages, tools, limit)
        if not left:
            return messages
        with suppress(Exception):
            nulls = [
                said if said["content"] or "tool_calls" not in said else {**said, "content": None} for said in messages
            ]
            if not self._left_out(nulls, tools, limit):
                return nulls
        raise Refused(f"it leaves out {left[0]}; set data.template to one that writes it")

    def _left_out(self, messages: list, tools: list | None, limit: int) -> list[str]:
        """The calls, in words, whose functions' names the template does not write: with marks in the names' stead."""
        called: dict[str, str] = {}
        marked = []
        for number, said in enumerate(messages):
            calls = []
            for call in said.get("tool_calls", ()):
                mark, function = f"{_NONCE}_{len(called)}_", call["function"]
                called[mark] = f"the call of {function['name']!r} in message {number} (counted from 0)"
                calls.append({**call, "function": {**function, "name": mark}})
            marked.append({**said, "tool_calls": calls} if calls else said)
        text = self.render(marked, tools, False, limit) if called else ""
        return [words for mark, words in called.items() if mark not in text]

    def _marks(self, messages: list, tools: list | None, text: str, limit: int) -> list[tuple[int, int]]:
        parts = re.split(f"({_OPEN}|{_CLOSE})", self.render(messages, tools, False, 2 * limit, marking=True))
        marks, position, starts = [], 0, []
        for part in parts:
            if part == _OPEN:
                starts.append(position)
            elif part == _CLOSE and starts:
                marks.append((starts.pop(), position))
            else:
                position += len(part)
        if "".join(part for part in parts if part not in (_OPEN, _CLOSE)) != text or starts:
            raise Refused("what stands in {% generation %} is changed after the block, so it cannot be found again")
        return marks

    def _turn(self, messages: list, tools: list | None, index: int, text: str, limit: int) -> list[int | None]:
        """[message, where it begins, end of the text through it, where its words are]; None: not to be found in `text`.

        An assistant's turn begins after a generation prompt.
        """
        if messages[index]["role"] != "assistant":
            start, end = self._said(messages[: index + 1], tools, index, text, limit)
            return [index, start, end, start]
        through = text if index + 1 == len(messages) else self.render(messages[: index + 1], tools, False, limit)
        end = len(through) if text.startswith(through) else None
        if any(said["role"] in ("user", "tool") for said in messages[:index]):
            start = self._prompted(messages[:index], tools, text, limit)
        else:
            start = self._first(messages, tools, index, text, limit)
        return [index, start, end, None if start is None else self._words(messages, tools, index, text, start, limit)]

    def _prompted(self, messages: list, tools: list | None, text: str, limit: int) -> int | None:
        """Where the generation prompt that follows `messages` ends."""
        prompt = self.render(messages, tools, True, limit)
        return len(prompt) if prompt and text.startswith(prompt) else None

    def _words(self, messages: list, tools: list | None, index: int, text: str, start: int, limit: int) -> int | None:
        """Where an assistant's words are, in a turn that begins at `start`; a mark tells which of several places."""
        if "tool_calls" in messages[index]:
            return None
        said = messages[index]["content"].strip()
        first = text.find(said, start)
        if first >= 0 and text.find(said, first + 1) >= 0:
            with suppress(Exception):  # the template may read what is said
                marked, _ = self._said(messages, tools, index, text, limit)
                first = max(first, marked or first)
        return first if first >= 0 else None

    def _first(self, messages: list, tools: list | None, index: int, text: str, limit: int) -> int | None:
        """Where an assistant begins who was asked nothing: where its words are, if a generation prompt ends there; or
        None.

        The prompt is one that follows a question: of no messages at all, or of a system prompt alone, many templates
        fail, or do not write what they put before the first one.
        """
        with suppress(Exception):  # of what it was not asked to take
            asked = [{"role": "user", "content": "?"}]
            question, prompt = (self.render(asked, tools, prompted, limit) for prompted in (False, True))
            start, _ = self._said(messages, tools, index, text, limit)
            if start is not None and prompt.startswith(question) and text[:start].endswith(prompt[len(question) :]):
                return start
        with suppress(Exception):
            return self._prompted(messages[:index], tools, text, limit)
        return None

    def _said(self, messages: list, tools: list | None, index: int, text: str, limit: int) -> tuple[int, int] | Nowhere:
        """Where what a message says stands: at the place of a mark that is said in its stead."""
        message = messages[index]
        marked = [*messages[:index], {**message, "content": _OPEN}, *messages[index + 1 :]]
        before, _, after = self.render(marked, tools, False, limit).partition(_OPEN)
        for said in (message["content"], message["content"].strip()):
            if text.startswith(before + said):
                end = len(before) + len(said)
                return len(before), end + _common(text[end:], after)
        return None, None


def _common(a: str, b: str) -> int:
    """How many characters two texts have in common from the start."""
    return next((at for at, (one, other) in enumerate(zip(a, b)) if one != other), min(len(a), len(b)))


def explain(error: BaseException) -> str:
    """What went wrong in a template, in words."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, jinja2.exceptions.TemplateSyntaxError):
        return f"not a Jinja template: {error.message} (line {error.lineno})"
    if isinstance(error, jinja2.exceptions.SecurityError):
        return f"it tries what the sandbox forbids: {error}"
    if isinstance(error, MemoryError):
        return "it takes more memory than allowed"
    return f"{type(error).__name__}: {error}"[:500]


def _limit_memory(limit: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, ValueError, OSError):
        pass  # the time limit holds there too


def _answer(renderer: Renderer, request: dict) -> dict[str, Any]:
    try:
        if request.get("prompt"):
            return {"text": renderer.render(request["messages"], None, True, request["limit"])}
        return renderer.conversation(*(request[name] for name in ("messages", "tools", "turns", "limit")))
    except Exception as error:  # whatever a template does is the template's fault
        return {"error": explain(error)}


def main() -> None:
    """Answer until the input ends."""
    write = lambda answer: print(json.dumps(answer), flush=True)  # noqa: E731, T201
    first = json.loads(sys.stdin.readline())
    _limit_memory(first["memory"])
    try:
        renderer = Renderer(first["template"], first["variables"])
    except Exception as error:
        write({"error": explain(error)})
        return
    write({"has_marks": renderer.has_marks})
    for line in sys.stdin:
        write([_answer(renderer, request) for request in json.loads(line)])


if __name__ == "__main__":
    main()
