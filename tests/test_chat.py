"""A conversation: what is remembered, and what Ctrl-C, Ctrl-D and errors do to it."""

import io
import sys
from types import SimpleNamespace

import pytest

from jaxtune.chat import Chat
from jaxtune.errors import DataError, ModelError
from jaxtune.sampling import Sampling


class Model:
    """Answers each conversation with the next of `answers`, an exception among them being raised in its place."""

    def __init__(self, *answers, template="{{ messages }}"):
        self.tokenizer = SimpleNamespace(chat_template=template)
        self.answers, self.asked, self.seeds = list(answers), [], []

    def generate(self, messages, max_new_tokens, temperature, top_k, top_p, seed, stream):
        self.asked.append([dict(message) for message in messages])
        self.seeds.append(seed)
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield piece


@pytest.fixture
def talk(monkeypatch):
    """talk(model, text) -> what was written while `text` was typed."""

    def talk(model, typed, seed=0):
        written = []
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        chat = Chat(model, Sampling(temperature=1.0, seed=seed), 10, written.append)
        chat.talk()
        return "".join(written), chat.messages

    return talk


def test_an_answer_is_written_as_it_comes_and_becomes_part_of_the_conversation(talk):
    model = Model(["I am", " Ada."], ["You asked."])
    text, messages = talk(model, "Who?\nI?\n")
    assert text == "I am Ada.\nYou asked.\n"
    assert [message["content"] for message in messages] == ["Who?", "I am Ada.", "I?", "You asked."]
    assert [message["role"] for message in model.asked[1]] == ["user", "assistant", "user"]


def test_ctrl_c_stops_the_answer_and_not_the_program(talk):
    model = Model(["One, ", "two, ", KeyboardInterrupt()], ["Yes."])
    text, messages = talk(model, "Count.\nGo on?\n")
    assert text == "One, two,  [stopped]\nYes.\n"
    assert messages[1] == {"role": "assistant", "content": "One, two, "}


def test_a_question_that_cannot_be_answered_is_forgotten(talk, capsys):
    model = Model([ModelError("too long")], ["Yes."])
    text, messages = talk(model, "Long\nShort\n")
    assert text == "Yes.\n"
    assert "too long" in capsys.readouterr().out
    assert [message["content"] for message in messages] == ["Short", "Yes."]


def test_a_model_without_a_chat_template_is_refused_before_anything_is_typed(talk):
    with pytest.raises(DataError, match=r"no chat template.*--prompt"):
        talk(Model(template=None), "")


def test_reset_forgets_and_exit_leaves(talk):
    model = Model(["1"], ["2"])
    text, messages = talk(model, "a\n/reset\nb\n/exit\nc\n")
    assert text == "1\n2\n"
    assert [message["content"] for message in messages] == ["b", "2"]


def test_an_unknown_command_and_an_empty_line_ask_nothing(talk, capsys):
    model = Model()
    talk(model, "/quit\n\n   \n")
    assert model.asked == []
    assert "There is no /quit. /reset begins anew" in capsys.readouterr().out


def test_the_same_question_again_has_another_seed_and_the_same_conversation_the_same(talk):
    seeds = []
    for _ in range(2):
        model = Model(["x"], ["x"], ["x"])
        talk(model, "a\na\na\n", seed=7)
        seeds.append(model.seeds)
    assert len(set(seeds[0])) == 3
    assert seeds[0] == seeds[1]
