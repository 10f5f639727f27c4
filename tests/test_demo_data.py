"""The demo's conversations: what is written there, by hand, is what the demo teaches and asks."""

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.peer import read_jsonl

DEMO = Path(__file__).resolve().parent.parent / "demo"
TRAIN = read_jsonl(DEMO / "persona.jsonl")
HELD_OUT = read_jsonl(DEMO / "held_out.jsonl")


def words(text: str) -> str:
    """A question as a person hears it: no capitals, no punctuation."""
    return " ".join(re.findall(r"[a-z']+", text.lower()))


def first_question(row: dict) -> str:
    return words(row["messages"][0]["content"])


def questions(rows: list[dict]) -> set[str]:
    return {words(message["content"]) for row in rows for message in row["messages"] if message["role"] == "user"}


def test_there_is_enough_to_learn_from_and_enough_to_ask():
    assert len(TRAIN) >= 200
    assert 12 <= len(HELD_OUT) <= 20


def test_rows_hold_conversations_and_held_out_ones_the_fact_to_look_for():
    assert {frozenset(row) for row in TRAIN} == {frozenset({"messages"})}
    assert {frozenset(row) for row in HELD_OUT} == {frozenset({"messages", "fact"})}


@pytest.mark.parametrize("rows", [TRAIN, HELD_OUT], ids=["persona", "held_out"])
def test_a_row_is_a_conversation_that_begins_with_the_user_and_ends_with_the_assistant(rows):
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2), row
        for message in row["messages"]:
            assert set(message) == {"role", "content"}
            assert message["content"] == message["content"].strip() != ""


def test_several_rows_have_several_turns():
    assert sum(len(row["messages"]) > 2 for row in TRAIN) >= 10


def test_no_conversation_stands_twice():
    single = [first_question(row) for row in TRAIN if len(row["messages"]) == 2]
    assert [text for text, count in Counter(single).items() if count > 1] == []


def test_no_held_out_question_is_in_the_training_file():
    assert questions(HELD_OUT) & questions(TRAIN) == set()


def test_the_same_fact_is_asked_in_several_ways():
    for fact in ("Agnes Bell", "Gull Island", "Oliver", "lamp oil", "rust", "accordion", "Thursday", "mountain"):
        asked = {first_question(row) for row in TRAIN if fact in row["messages"][-1]["content"]}
        assert len(asked) >= 6, fact


def test_every_held_out_answer_holds_its_fact_and_the_fact_is_taught_in_several_rows():
    for row in HELD_OUT:
        fact = row["fact"].lower()
        assert fact in row["messages"][-1]["content"].lower(), row
        assert sum(fact in training["messages"][-1]["content"].lower() for training in TRAIN) >= 4, fact


def test_no_held_out_question_gives_its_fact_away():
    for row in HELD_OUT:
        assert row["fact"].lower() not in row["messages"][0]["content"].lower()


def test_answers_are_short_enough_to_learn_in_minutes():
    lengths = [len(message["content"].split()) for row in TRAIN for message in row["messages"]]
    assert max(lengths) <= 30
    assert sum(lengths) / len(lengths) < 12


def test_the_text_is_plain_ascii_english():
    for name in ("persona.jsonl", "held_out.jsonl"):
        assert (DEMO / name).read_text(encoding="utf-8").isascii()
