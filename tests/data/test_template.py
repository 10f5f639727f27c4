"""Templates: rendered as transformers renders them, and a hostile one ends with a message, not with the run."""

import errno
import os
import re
import subprocess
import sys

import pytest

from jaxtune.data import sandbox, template
from jaxtune.data.formats import Row
from jaxtune.data.template import ChatTemplate, open_template
from jaxtune.data.workers import Workers
from jaxtune.errors import DataError
from tests.data.templates import LLAMA3, MARKED, MISTRAL, PHI3, PLAIN, QWEN, QWEN3, say, tokenizer
from tests.peer import CHATML

VARIABLES = {"bos_token": "<s>", "eos_token": "<|im_end|>"}


def render(source: str, *conversations, **settings) -> list[dict]:
    with ChatTemplate(source, VARIABLES, "the template", **settings) as chat:
        return list(chat.render([Row(f"a:{n}", messages) for n, messages in enumerate(conversations, 1)]))


def refused(source: str, messages=None, **settings) -> str:
    with pytest.raises(DataError) as caught:
        render(source, messages or say("q", "a"), **settings)
    return str(caught.value)


TEMPLATES = {
    "chatml": CHATML,
    "marked": MARKED,
    "qwen": QWEN,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "plain": PLAIN,
    "blocks": "{% for message in messages %}\n  {% if true %}\n{{ message.content }}\n  {% endif %}\n{% endfor %}\n",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ {'b': '<é>', 'a': 1} | tojson }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{{ dict(a=1) }} {{ dict.fromkeys(['a'], 2) }} {{ dict([('b', 3)]) }}",
    "undefined": "[{{ nothing }}{{ messages[0].nothing }}{{ tools is none }}{{ documents }}{{ pad_token is defined }}]",
    "methods": "{{ messages[0]['content'].strip().split('a')[-1].upper() }}{{ messages[-1].content | length }}",
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", [say("q", "a"), say(" héllo <b>\n", "\n小主 ", "", "x"), say("1", "2\n", "3")])
def test_rendering_is_that_of_transformers(source, messages):
    tok = tokenizer()
    peer = [
        tok.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=prompt)
        for prompt in (False, True)
    ]
    variables = {name: value for name, value in tok.special_tokens_map.items() if isinstance(value, str)}
    with ChatTemplate(source, variables, "the template") as chat:
        (answer,) = chat.render([Row("a:1", messages)])
        assert [answer["text"], chat.prompt(messages)] == peer


def test_many_conversations_come_back_in_order():
    conversations = [say(*(f"{n}.{turn}" for turn in range(2 + n % 60))) for n in range(300)]
    texts = [answer["text"] for answer in render(CHATML, *conversations)]
    assert texts == [tokenizer().apply_chat_template(messages, tokenize=False) for messages in conversations]


def test_turns_are_prefixes_of_the_whole():
    (answer,) = render(CHATML, say("q", "a", "r", "b", system="s"))
    prefixes = [
        (index, answer["text"][:prompt], answer["text"][:through]) for index, prompt, through, _ in answer["turns"]
    ]
    for index, prompt, through in prefixes:
        assert prompt.endswith("<|im_start|>assistant\n")
        assert through == f"{prompt}{'a' if index == 2 else 'b'}<|im_end|>\n"


def test_turns_of_a_rewritten_past_are_not_prefixes():
    (answer,) = render(QWEN3, say("q", "a", "r", "b"))
    assert [through is None for _, _, through, _ in answer["turns"]] == [True, False]
    (answer,) = render("{{ messages | length }}{% if add_generation_prompt %}!{% endif %}", say("q", "a"))
    assert answer["turns"] == [[1, None, 1, None]]


def test_marks_are_where_the_blocks_are():
    (answer,) = render(MARKED, say("q", "a", "r", "小主"))
    assert [answer["text"][start:end] for start, end in answer["marks"]] == ["a<|im_end|>", "小主<|im_end|>"]


def test_marks_are_found_inside_macros_and_sets():
    source = (
        "{% macro turn(text) %}{% generation %}{{ text }}!{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% set said = turn(m.content) %}> {{ said }}{% endfor %}"
    )
    (answer,) = render(source, say("q", "a"))
    assert answer["text"] == "> q!> a!"
    assert answer["marks"] == [[2, 4], [6, 8]]


def test_marked_text_that_is_changed_afterwards_is_refused():
    source = "{% set x %}{% generation %}{{ messages[0].content }}{% endgeneration %}{% endset %}{{ x | length }}"
    assert "cannot be found again" in refused(source)


def test_marks_cannot_be_forged_by_what_is_said():
    (answer,) = render(MARKED, say("{% generation %}\ufdd0\ufdd1", "\ufdd1a\ufdd0"))
    assert [answer["text"][start:end] for start, end in answer["marks"]] == ["\ufdd1a\ufdd0<|im_end|>"]


def test_the_clock_stands_still():
    (answer,) = render("{{ strftime_now('%d %b %Y') }}", say("q", "a"))
    assert answer["text"] == "26 Jul 2024"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
        "{{ messages | length ** (10 ** 10) }}",
        "{{ 'a' * 10 ** 11 }}",
        "{% set s = namespace(x='a') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}{{ s.x }}",
        "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
        "{{ '%0999999999d' % 1 }}",
        "{% set f = namespace() %}{% macro g() %}{{ g() }}{% endmacro %}{{ g() }}",
    ],
)
def test_a_template_without_end_is_stopped(source):
    text = refused(source, seconds=1.5)
    assert re.match(
        r"(a:1: )?the template( took more than 1.5 s and was stopped| does not take|: it takes more mem)", text
    )


def test_a_text_without_measure_is_stopped():
    """A conversation may be long, and its text four times as long."""
    assert "it gives more than 1048584 characters" in refused("{{ messages[0].content * 1048576 }}{{ '.' * 9 }}")
    long = "q" * (1 << 20)
    (answer,) = render("{{ messages[0].content * 4 }}", say(long, ""))
    assert answer["text"] == long * 4


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's memory; time is limited")
def test_a_memory_without_measure_is_stopped():
    assert "it takes more memory than allowed" in refused("{{ 'a' * messages | length * 10 ** 10 }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__()[0] }}",
        "{{ cycler.__init__.__globals__.os.system('touch marker') }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ strftime_now.__self__.__class__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ dict.__class__ }}",
        "{{ lipsum.__globals__['os'].popen('touch marker').read() }}",
        "{{ ('{0.__class__.__init__.__globals__}').format(messages) }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ messages | map(attribute='__class__') | list | first | attr('mro') }}",
        "{{ self._TemplateReference__context.environment }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.getcwd() }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        (answer,) = render(source, say("q", "a"))
        assert answer["text"].strip() in ("", "[]"), "nothing may come out of it"
    except DataError:
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_template_refuses_is_told_in_its_own_words():
    text = refused(MISTRAL, say("q", "a", "r")[::2])
    assert text == "a:1: the template does not take this conversation: it says: roles must alternate user/assistant"


@pytest.mark.parametrize(("code", "why"), [(errno.EAGAIN, "Resource temporarily"), (errno.EACCES, "Permission denied")])
def test_a_process_that_cannot_be_started_is_one_message(monkeypatch, code, why):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    begins = f"the template: the process that renders it: {sys.executable} cannot be started: {why}"
    assert refused(CHATML).startswith(begins)
    with pytest.raises(DataError, match=r"^a process that tokenises: .* cannot be started"):
        Workers(2, {}).__enter__()


def test_mistakes_in_a_template_are_told():
    assert refused("{% for %}").startswith("the template: not a Jinja template: ")
    assert "(line 2)" in refused("\n{% nonsense %}")
    assert "a:1: the template does not take this conversation: UndefinedError" in refused("{{ x.y }}")
    assert "ZeroDivisionError" in refused("{{ 1 / 0 }}")
    assert "a template has at most" in refused("x" * (template.MAX_SOURCE + 1))


def test_a_process_that_dies_is_told(monkeypatch):
    chat = ChatTemplate(CHATML, VARIABLES, "the template")
    chat._process.kill()
    chat._process.wait()
    with pytest.raises(DataError, match=r"^a:1: the template: its process ended: exit code -9"):
        next(chat.render([Row("a:1", say("q", "a"))]))
    chat.close()


def test_the_process_ends_with_the_template():
    with ChatTemplate(CHATML, VARIABLES, "the template") as chat:
        pass
    assert chat._process.poll() is not None


def test_template_comes_from_the_tokenizer_or_a_file(tmp_path):
    path = tmp_path / "x.jinja"
    path.write_bytes(b"\xef\xbb\xbf[{{ messages[0].content }}|{{ bos_token }}]")
    for source, expected in ((None, "<|im_start|>user\nq<|im_end|>\n"), (str(path), "[q|<s>]")):
        with open_template(tokenizer(), source) as chat:
            assert next(chat.render([Row("a:1", say("q"))]))["text"] == expected


def test_a_dict_of_templates_gives_the_default_one():
    class Named:
        chat_template = {"default": "d", "tool_use": "t"}
        special_tokens_map = {}

    with open_template(Named()) as chat:
        assert chat.source == "d"


def test_no_template_names_the_setting():
    with pytest.raises(DataError, match=r"no chat template; set data\.template"):
        open_template(tokenizer(None))


def test_a_template_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.template none\.jinja: cannot be read: No such file"):
        open_template(tokenizer(), "none.jinja")
    (tmp_path / "x").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match="not UTF-8 text"):
        open_template(tokenizer(), str(tmp_path / "x"))


def test_explanations_are_short():
    assert len(sandbox.explain(ValueError("x" * 9999))) == 500
