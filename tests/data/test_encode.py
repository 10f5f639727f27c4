"""Tokens and lengths: texts end as texts do, long rows are dropped, cut or refused as asked, and all is counted."""

import numpy as np
import pytest

from jaxtune.config import DataSection
from jaxtune.data import encode as module
from jaxtune.data.encode import encode
from jaxtune.data.examples import join
from jaxtune.data.formats import Row
from jaxtune.data.template import ChatTemplate
from jaxtune.errors import DataError
from tests.data.templates import say, tokenizer, word_tokenizer
from tests.peer import CHATML


def chats(*conversations, **settings):
    """(Examples, Lengths) of word-level conversations: a turn of n words has n + 3 tokens."""
    rows = [Row(f"a:{n}", messages) for n, messages in enumerate(conversations, 1)]
    with ChatTemplate(CHATML, {}, "the template") as template:
        return encode(rows, DataSection(path="a.json", **settings), word_tokenizer(), template)


def texts(*contents: str, tok=None, **settings):
    rows = [Row(f"a:{n}", text=text) for n, text in enumerate(contents, 1)]
    return encode(rows, DataSection(path="a.json", format="text", **settings), tok or tokenizer(), None)


def examples_of(examples) -> list[list[int]]:
    return [examples.tokens[a:b].tolist() for a, b in zip(examples.starts, examples.starts[1:])]


LONG = say("a", "b c d e f g")  # 4 + 9 tokens, the first supervised one is the 7th
SHORT = say("a", "b")  # 4 + 4 tokens


def test_a_text_ends_with_eos_and_is_learnt_throughout():
    tok = tokenizer()
    examples, counts = texts("It is late.", "小主")
    assert examples_of(examples) == [[*tok.encode(text), tok.eos_token_id] for text in ("It is late.", "小主")]
    first = examples.starts[:-1]
    assert (np.flatnonzero(~examples.supervised) == first).all()
    assert counts.rows == 2 and counts.dropped == 0


def test_a_text_that_ends_with_eos_gets_no_second_one():
    tok = tokenizer()
    examples, _ = texts("It is late.<|im_end|>")
    assert examples_of(examples) == [tok.encode("It is late.<|im_end|>")]


def test_a_text_begins_as_the_tokenizer_begins_it():
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    core = type(tokenizer().backend_tokenizer).from_str(tokenizer().backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", core.token_to_id("<s>"))])
    tok = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>")
    examples, _ = texts("a", tok=tok)
    assert tok.convert_ids_to_tokens(examples.tokens) == ["<s>", "a", "<|im_end|>"]


def test_an_empty_text_teaches_nothing():
    examples, counts = texts("", "a")
    assert len(examples) == 1 and counts.dropped_silent == 1


def test_a_tokenizer_without_eos_is_refused_for_texts():
    from transformers import PreTrainedTokenizerFast

    tok = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(DataError, match="no eos token"):
        texts("a", tok=tok)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="a fast one"):
        texts("a", tok=Slow())


def test_batches_of_the_tokenizer_change_nothing(monkeypatch):
    conversations = [say("a " * n, "b " * (n % 7)) for n in range(1, 20)]
    whole, _ = chats(*conversations)
    monkeypatch.setattr(module, "CHUNK", 3)
    parts, _ = chats(*conversations)
    np.testing.assert_array_equal(whole.tokens, parts.tokens)
    np.testing.assert_array_equal(whole.supervised, parts.supervised)


def test_long_rows_are_cut_and_counted():
    examples, counts = chats(LONG, SHORT, max_length=8)
    assert examples.lengths.tolist() == [8, 8]
    assert np.split(examples.supervised, [8])[0].tolist() == [False] * 6 + [True] * 2
    assert (counts.truncated, counts.dropped) == (1, 0)


def test_a_row_of_exactly_the_allowed_length_is_whole():
    examples, counts = chats(LONG, max_length=13)
    assert examples.lengths.tolist() == [13] and not counts.truncated


def test_a_row_cut_before_anything_supervised_is_dropped_and_counted():
    examples, counts = chats(say("a b c d e f g h", "i"), SHORT, max_length=8)
    assert len(examples) == 1
    assert (counts.truncated, counts.dropped_cut, counts.dropped_long, counts.dropped) == (0, 1, 0, 1)


def test_long_rows_are_dropped_and_counted():
    examples, counts = chats(LONG, SHORT, LONG, max_length=8, too_long="drop")
    assert examples.lengths.tolist() == [8]
    assert (counts.truncated, counts.dropped_long) == (0, 2)


def test_long_rows_can_be_an_error_that_says_how_many_and_which():
    with pytest.raises(DataError) as caught:
        chats(SHORT, say("a", "b c"), LONG, max_length=8, too_long="error")
    assert str(caught.value).startswith(
        "2 of 3 rows are longer than data.max_length 8, the first a:2: 9 tokens, the longest a:3: 13; raise data.max"
    )


def test_of_a_text_that_is_far_too_long_only_the_beginning_is_tokenised(monkeypatch):
    rows = say("a", "b c d e " * 3000), SHORT
    whole, _ = chats(*rows, max_length=50)
    asked = []

    class Spy(type(word_tokenizer())):
        def __call__(self, texts, **options):
            asked.extend(map(len, [texts] if isinstance(texts, str) else texts))
            return super().__call__(texts, **options)

    monkeypatch.setattr(word_tokenizer(), "__class__", Spy)
    cut, counts = chats(*rows, max_length=50)
    assert max(asked) == 64 * 50 and counts.truncated == 1
    monkeypatch.setattr(module, "_CHARACTERS", 10**6)
    uncut, _ = chats(*rows, max_length=50)
    assert max(asked) > 20_000
    for other in (whole, uncut):
        np.testing.assert_array_equal(cut.tokens, other.tokens)
        np.testing.assert_array_equal(cut.supervised, other.supervised)
    monkeypatch.setattr(module, "_CHARACTERS", 64)
    with pytest.raises(DataError, match=r"the first a:1, at least: \d+ tokens"):
        chats(*rows, max_length=50, too_long="error")


def test_a_text_of_very_long_tokens_is_tokenised_as_a_whole():
    """All of it is one unknown word, however long."""
    examples, counts = chats(say("a", "x" * 5000), max_length=20)
    assert examples.lengths.tolist() == [8] and not counts.too_long


def test_a_long_prompt_without_its_answer_in_sight_is_cut_not_silent():
    _, counts = chats(say("a " * 3000, "b"), SHORT, max_length=10)
    assert (counts.dropped_cut, counts.dropped_silent) == (1, 0)


def test_a_row_without_an_assistant_is_dropped_and_counted():
    examples, counts = chats(say("a"), SHORT)
    assert len(examples) == 1 and counts.dropped_silent == 1


@pytest.mark.parametrize(
    ("conversation", "settings", "reason"),
    [
        (say("a"), {}, "1 have no assistant turn that is learnt; there is nothing to learn from"),
        (
            LONG,
            {"max_length": 4},
            "1 have nothing supervised within data.max_length 4; there is nothing to learn from; raise data.max_length",
        ),
        (
            LONG,
            {"max_length": 4, "too_long": "drop"},
            "1 are longer than data.max_length 4; there is nothing to learn from; raise data.max_length",
        ),
    ],
)
def test_no_supervised_token_at_all_is_an_error_with_the_reason(conversation, settings, reason):
    with pytest.raises(DataError) as caught:
        chats(conversation, **settings)
    assert str(caught.value) == f"no supervised token in 1 rows: {reason}"


def test_an_empty_answer_still_teaches_to_end():
    examples, _ = chats(say("a", ""))
    words = word_tokenizer().convert_ids_to_tokens(examples.tokens[examples.supervised])
    assert words == ["<|im_end|>"]


def test_take_gives_the_examples_asked_for():
    parts = [(np.arange(n, dtype=np.int32), np.arange(n) % 2 == 0) for n in (3, 0, 2, 4)]
    examples = join(parts).take(np.array([3, 0]))
    assert examples_of(examples) == [[0, 1, 2, 3], [0, 1, 2]]
    assert examples.supervised.tolist() == [True, False, True, False, True, False, True]
    assert len(join([])) == 0 and len(join([]).tokens) == 0
