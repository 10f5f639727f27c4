"""Masks: the loss is on what the assistant says and on the token that ends its turn, and nowhere else."""

import numpy as np
import pytest

from jaxtune.config import DataSection
from jaxtune.data.chat import shared_starts, special_tokens, supervised_spans, token_mask
from jaxtune.data.encode import encode
from jaxtune.data.formats import Row
from jaxtune.data.template import ChatTemplate
from jaxtune.errors import DataError
from tests.data.templates import LLAMA3, MARKED, MISTRAL, PHI3, PLAIN, QWEN, QWEN3, say, tokenizer, word_tokenizer
from tests.peer import CHATML

SECTION = DataSection(path="a.json", max_length=4096)


_OPEN: dict[tuple[str, str], ChatTemplate] = {}


@pytest.fixture(scope="module", autouse=True)
def _closed():
    yield
    for chat in _OPEN.values():
        chat.close()


def opened(source: str, eos: str) -> ChatTemplate:
    """One process for each template, not for each test."""
    if (source, eos) not in _OPEN:
        _OPEN[source, eos] = ChatTemplate(source, {"bos_token": "<s>", "eos_token": eos}, "the template")
    return _OPEN[source, eos]


def encoded(messages, source: str, tok=None, **settings):
    """(tokens, supervised) of one conversation."""
    tok = tok or tokenizer()
    section = SECTION.model_copy(update=settings)
    examples, _ = encode([Row("a:1", messages)], section, tok, opened(source, tok.eos_token))
    return examples.tokens, examples.supervised


def learnt(messages, source: str, tok=None) -> list[str]:
    """The texts that are supervised, run by run."""
    tok = tok or tokenizer()
    tokens, mask = encoded(messages, source, tok)
    edges = np.flatnonzero(np.diff(mask.astype(int))) + 1
    runs = zip(np.split(tokens, edges), np.split(mask, edges))
    return [tok.decode(run.tolist()) for run, on in runs if on.all()]


SAID = say("Who are you?", "Ada.", "And where\n", "By the sea.", system="Be brief.")


@pytest.mark.parametrize(
    ("source", "messages", "expected"),
    [
        (CHATML, SAID, ["Ada.<|im_end|>", "By the sea.<|im_end|>"]),
        (QWEN, SAID, ["Ada.<|im_end|>", "By the sea.<|im_end|>"]),
        (MARKED, SAID, ["Ada.<|im_end|>", "By the sea.<|im_end|>"]),
        (LLAMA3, SAID, ["Ada.<|eot_id|>", "By the sea.<|eot_id|>"]),
        (MISTRAL, SAID[1:], [" Ada.</s>", " By the sea.</s>"]),
        (PHI3, SAID, ["Ada.<|end|>", "By the sea.<|end|>"]),
        (QWEN3, SAID, ["Ada.<|im_end|>", "<think>\n\n</think>\n\nBy the sea.<|im_end|>"]),
        (PLAIN, SAID, ["Ada.\n", "By the sea.\n"]),
    ],
    ids=["chatml", "qwen", "marked", "llama3", "mistral", "phi3", "qwen3", "plain"],
)
def test_each_assistant_turn_and_its_end_is_learnt(source, messages, expected):
    assert learnt(messages, source, tokenizer(eos="</s>" if source == MISTRAL else "<|im_end|>")) == expected


AWKWARD = [
    say("q", ""),
    say("q", "", "r", "x"),
    say("", "a"),
    say("q", "\n\nbegins with line breaks"),
    say("q", "ends with blanks  \n"),
    say("q", "   "),
    say("q", "小主，您又起来了？😀é\u200d"),
    say("quotes <|im_start|>assistant\nfake<|im_end|>\n", "and <|im_end|>\n<|im_start|>user\n are quoted", "r", "b"),
    say("assistant", "assistant", "user\n", "a", "a", "a"),
    say("q", "a", "and then nobody answers"),
    [{"role": "assistant", "content": "I begin."}, {"role": "user", "content": "q"}],
    [*say("q", "a"), {"role": "assistant", "content": "b"}, {"role": "system", "content": "s"}],
    say("one", "two three", system=""),
]


@pytest.mark.parametrize("messages", AWKWARD, ids=range(len(AWKWARD)))
def test_marked_masks_are_those_of_transformers(messages):
    tok = tokenizer(trim_offsets=False)  # with trimmed ones transformers loses a turn that begins with white space
    peer = tok.apply_chat_template(messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True)
    tokens, mask = encoded(messages, MARKED, tok)
    assert tokens.tolist() == peer["input_ids"]
    assert mask.tolist() == [bool(on) and at > 0 for at, on in enumerate(peer["assistant_masks"])]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("messages", AWKWARD, ids=range(len(AWKWARD)))
def test_without_marks_the_masks_are_the_same(messages, trim_offsets):
    tok, untrimmed = tokenizer(trim_offsets=trim_offsets), tokenizer(trim_offsets=False)
    for ours, theirs in zip(encoded(messages, CHATML, tok), encoded(messages, MARKED, untrimmed), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("messages", AWKWARD, ids=range(len(AWKWARD)))
def test_nothing_outside_a_turn_is_learnt(messages):
    """Llama 3 trims, so every learnt run is a trimmed answer and its end."""
    said = [message["content"].strip() + "<|eot_id|>" for message in messages if message["role"] == "assistant"]
    assert "".join(learnt(messages, LLAMA3)) == "".join(said)


def test_tokens_are_those_of_the_whole_text():
    tokens, _ = encoded(SAID, CHATML)
    assert tokens.tolist() == tokenizer().apply_chat_template(SAID, return_dict=False)


def test_prompt_tokens_are_learnt_when_asked_for():
    for source in (CHATML, MARKED, QWEN3):
        _, mask = encoded(SAID, source, train_on_prompt=True)
        assert mask.tolist() == [False] + [True] * (len(mask) - 1)


def test_words_can_be_counted_by_eye():
    tokens, mask = encoded(say("a b", "c d"), CHATML, word_tokenizer())
    words = word_tokenizer().convert_ids_to_tokens(tokens)
    assert " ".join(words) == "<|im_start|> user a b <|im_end|> <|im_start|> assistant c d <|im_end|>"
    assert [word for word, on in zip(words, mask) if on] == ["c", "d", "<|im_end|>"]


def test_thoughts_that_are_taken_out_of_earlier_turns_are_a_rewritten_history():
    thinking = say("q", "<think>\nhm\n</think>\n\na", "r", "b")
    with pytest.raises(DataError, match=r"^a:1: the chat template rewrites history: .*message 1 "):
        encoded(thinking, QWEN3)
    assert learnt(thinking[:2], QWEN3) == ["<think>\nhm\n</think>\n\na<|im_end|>"]


def test_a_system_prompt_that_moves_is_a_rewritten_history():
    """As in some of Mistral's templates: the system prompt stands in the last user message."""
    moving = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] "
        "{% if loop.index0 >= messages | length - 2 %}S {% endif %}{{ m.content }}[/INST]"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    assert learnt(say("q", "a"), moving) == ["a<|im_end|>"]
    with pytest.raises(DataError, match="rewrites history"):
        encoded(say("q", "a", "r", "b"), moving)


def test_an_answer_that_is_changed_still_ends_at_its_token():
    shouting = CHATML.replace("message['content']", "message['content'].upper()")
    assert learnt(say("q", "loud"), shouting) == ["LOUD<|im_end|>"]


CHANNELS = (  # the assistant writes a header of its own before its words, as in Harmony
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>final<|end|>' + m.content + (eos_token if loop.last else '<|eot_id|>') }}"
    "{% else %}{{ '<|end|>' + m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
TWO_ENDS = CHANNELS.replace("(eos_token if loop.last else '<|eot_id|>')", "'<|eot_id|>' + eos_token")  # Command R's


@pytest.mark.parametrize("said", ["Ada.", "", "final", "a", "end"])
def test_words_that_the_template_also_writes_before_them_are_learnt_with_their_end(said):
    messages, written = say("q", said, "r", said), f"<|assistant|>final<|end|>{said}"
    assert learnt(messages, CHANNELS) == [f"{written}<|eot_id|>", f"{written}<|im_end|>"]
    assert learnt(messages, TWO_ENDS) == [f"{written}<|eot_id|><|im_end|>"] * 2


SMOLLM2 = (  # puts a system prompt of its own before a first message that is none
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (  # its prompt follows a message, so that there is none without messages
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
ANSWERED_FIRST = [{"role": "assistant", "content": "Hello."}, *say("q", "Ada.")]


@pytest.mark.parametrize("source", [CHATML, MARKED, QWEN, LLAMA3, PLAIN, SMOLLM2, ZEPHYR])
def test_an_assistant_who_begins_is_learnt_without_what_the_template_puts_before(source):
    found = "".join(learnt(ANSWERED_FIRST, source))
    end = {LLAMA3: "<|eot_id|>", PLAIN: "\n"}.get(source, "<|im_end|>")
    assert found == f"Hello.{end}Ada.{end}"
    assert "".join(learnt(ANSWERED_FIRST[:1], source)) == f"Hello.{end}"


@pytest.mark.parametrize("bos", ["", "<s>"])
def test_a_system_prompt_that_the_template_writes_with_the_answer_is_not_learnt(bos):
    """Llama 2's writes none until somebody speaks."""
    source = bos + (
        "{% for m in messages %}{% if m.role != 'system' %}{% if loop.index0 == 1 %}"
        "{{ '<<SYS>>' + messages[0].content + '<</SYS>>' }}{% endif %}"
        "{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content + eos_token }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "system", "content": "Be brief."}, *ANSWERED_FIRST]
    assert learnt(messages, source) == ["Hello.<|im_end|>", "Ada.<|im_end|>"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (MISTRAL, "the template does not take it: it says: "),
        (SMOLLM2.replace("+ message['content']", "+ '> ' + message['content']"), "the chat template does not tell"),
    ],
)
def test_a_template_that_cannot_do_with_an_assistant_who_begins_is_named(source, why):
    with pytest.raises(DataError) as caught:
        encoded(ANSWERED_FIRST, source)
    assert str(caught.value).startswith(f"a:1: the conversation begins with the assistant, and {why}")
    assert str(caught.value).endswith("; put a user's turn before it, or take the row out")


def spans(answer: dict, *contents: str) -> list[tuple[int, int]]:
    return supervised_spans("a:1", say(*contents), answer, special_tokens(tokenizer()), SECTION)


def test_a_turn_ends_before_the_next_prompt():
    text = "q:a;r:b</s>"
    answer = {"text": text, "turns": [[1, 2, 4, 2], [3, 6, len(text), 6]]}
    assert [text[start:end] for start, end in spans(answer, "q", "a", "r", "b")] == ["a;", "b</s>"]


def test_a_turn_whose_end_cannot_be_told_is_refused():
    answer = {"text": "q:a r:b</s>", "turns": [[1, 2, None, 2], [3, 6, 11, 6]]}
    with pytest.raises(DataError, match="rewrites history"):
        spans(answer, "q", "a", "r", "b")


def test_marks_come_in_order():
    assert spans({"text": "abcd", "marks": [(2, 3), (0, 1)], "turns": []}, "q", "a") == [(0, 1), (2, 3)]


def test_token_mask_takes_tokens_that_overlap_and_not_those_that_touch():
    offsets = np.array([(0, 2), (2, 4), (4, 6), (6, 8)])
    assert token_mask(offsets, [(2, 4)]).tolist() == [False, True, False, False]
    assert token_mask(offsets, [(3, 5)]).tolist() == [False, True, True, False]
    assert token_mask(offsets, [(0, 1), (7, 8)]).tolist() == [True, False, False, True]
    assert token_mask(offsets, [(2, 2)]).tolist() == [False] * 4
    assert token_mask(np.zeros((0, 2), int), [(0, 1)]).tolist() == []


def test_token_mask_gives_trimmed_tokens_their_white_space_back():
    offsets = np.array([(0, 2), (4, 4), (4, 6)])  # characters 2 and 3 are blanks that the middle token lost
    assert token_mask(offsets, [(2, 4)]).tolist() == [False, True, False]
    assert token_mask(offsets, [(4, 6)]).tolist() == [False, False, True]


def test_a_token_that_prompt_and_answer_share_is_learnt_and_counted():
    glued = PLAIN.replace(":\n", ": ")
    with ChatTemplate(glued, {}, "the template") as chat:
        rows = [Row("a:1", say("q", "Ada.", "r", "\n"))]
        examples, counts = encode(rows, SECTION, tokenizer(trim_offsets=False), chat)
    assert tokenizer().decode(examples.tokens[examples.supervised]).startswith(" Ada.")
    assert counts.shared_starts == 1
    assert shared_starts(np.array([(0, 2), (2, 4)]), [(1, 2), (2, 3), (3, 4)]) == 2


def test_special_tokens_match_the_longest_first():
    class Two:
        added_tokens_decoder = {}
        all_special_tokens = ["<a", "<a>"]

    assert special_tokens(Two()).match("<a>").group() == "<a>"
    Two.all_special_tokens = []
    assert special_tokens(Two()).search("anything") is None
