"""Prompts become the ids that training saw, and answers come out in whole characters."""

import copy

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from jaxtune.errors import DataError
from jaxtune.text import BROKEN, decode, encode_prompt, text_pieces

QUESTION = [{"role": "user", "content": "What is your name?"}]
FOREIGN = "Zwölf 船 — 🛶 done, 👩‍🚀!"


def one_by_one(tokenizer, ids):
    return list(text_pieces(tokenizer, ([i] for i in ids)))


def llama2_like():
    """A tokenizer whose decoder strips the first space, as those made from sentencepiece do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "▁the", "▁cat", "s", "▁", "▁sat", *(f"<0x{i:02X}>" for i in range(256))]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def test_a_plain_prompt_is_encoded_as_the_tokenizer_does_it(tiny_tokenizer):
    assert encode_prompt(tiny_tokenizer, "My name is") == tiny_tokenizer("My name is")["input_ids"]


def test_a_plain_prompt_does_not_end_with_the_end_that_a_tokenizer_appends(tiny_tokenizer):
    """One that was written stays; what is put in front does too."""
    end, start = tiny_tokenizer.eos_token_id, tiny_tokenizer.convert_tokens_to_ids("<|im_start|>")
    written = [f"My name is{'<|im_end|>' * count}" for count in range(3)] + ["<|im_end|>", ""]
    expected = [tiny_tokenizer(text)["input_ids"] for text in written]
    assert [ids.count(end) for ids in expected] == [0, 1, 2, 1, 0]
    assert [encode_prompt(tiny_tokenizer, text) for text in written] == expected
    ending = copy.deepcopy(tiny_tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", start), ("<|im_end|>", end)]
    )
    assert ending("My name is")["input_ids"] == [start, *expected[0], end]
    assert [encode_prompt(ending, text) for text in written] == [[start, *ids] for ids in expected]
    beginning = copy.deepcopy(tiny_tokenizer)
    beginning.bos_token = "<|im_end|>"
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_end|> $A", special_tokens=[("<|im_end|>", end)]
    )
    assert [encode_prompt(beginning, text) for text in written] == [[end, *ids] for ids in expected]


def test_messages_go_through_the_template_as_transformers_renders_them(tiny_tokenizer):
    ids = encode_prompt(tiny_tokenizer, QUESTION)
    assert ids == tiny_tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert tiny_tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_a_system_line_is_put_before_messages_that_have_none(tiny_tokenizer):
    own = [{"role": "system", "content": "Be brief."}, *QUESTION]
    assert encode_prompt(tiny_tokenizer, QUESTION, "Be brief.") == encode_prompt(tiny_tokenizer, own)
    assert encode_prompt(tiny_tokenizer, own, "Be long.") == encode_prompt(tiny_tokenizer, own)
    assert encode_prompt(tiny_tokenizer, "plain", "Be brief.") == encode_prompt(tiny_tokenizer, "plain")


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ([], "a list of messages"),
        (None, "a list of messages"),
        (["hello"], "with a role"),
        ([{"role": "tool", "content": "x"}], "with a role"),
        ([{"role": "user"}], "the user's message: expected a content"),
        ([{"role": "user", "content": 3}], "the user's message: expected a content of text, .*; found 3"),
        (
            [*QUESTION, {"role": "assistant", "content": None}],
            "the assistant's message: expected a content .*; found None",
        ),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "expected a content of text, or of parts"),
        ([{"role": "user", "content": [{"type": "text"}]}], "expected a content"),
        ([{"role": "user", "content": ["hello"]}], "expected a content"),
    ],
)
def test_what_is_not_messages_is_refused(tiny_tokenizer, bad, what):
    with pytest.raises(DataError, match=what):
        encode_prompt(tiny_tokenizer, bad)


def test_text_in_parts_is_joined_as_in_data(tiny_tokenizer):
    parts = [{"type": "text", "text": text} for text in ("What is ", "your name?")]
    given = [{"role": "user", "content": parts}]
    assert encode_prompt(tiny_tokenizer, given) == encode_prompt(tiny_tokenizer, QUESTION)
    assert given == [{"role": "user", "content": parts}]


def test_text_that_is_not_utf8_is_refused_with_its_place(tiny_tokenizer):
    text = b"x" * 100 + b" a caf\xe9 here"
    text = text.decode("utf-8", "surrogateescape")
    for prompt, system in ((text, None), ([{"role": "user", "content": text}], None), (QUESTION, text)):
        with pytest.raises(DataError, match=r"^the text is not UTF-8: 'x{34} a caf\\udce9 here'$"):
            encode_prompt(tiny_tokenizer, prompt, system)


def test_messages_without_a_chat_template_are_refused():
    with pytest.raises(DataError, match=r"no chat template.*; give plain text .*--prompt"):
        encode_prompt(llama2_like(), QUESTION)


def test_text_comes_with_the_token_that_ends_a_character(tiny_tokenizer):
    ids = tiny_tokenizer.encode(FOREIGN)
    pieces = one_by_one(tiny_tokenizer, ids)
    assert "".join(pieces) == FOREIGN
    assert not any(BROKEN in piece for piece in pieces)
    assert "船" in pieces  # three byte tokens, one piece
    assert len(pieces) < len(ids)


def test_pieces_of_any_size_join_to_the_same_text(tiny_tokenizer):
    ids = tiny_tokenizer.encode(FOREIGN)
    for size in (1, 2, 3, 7, 100):
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        assert "".join(text_pieces(tiny_tokenizer, [[], *parts, []])) == FOREIGN


def test_random_tokens_stream_to_what_they_decode_to(tiny_tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, len(tiny_tokenizer), 40).tolist()
        assert "".join(one_by_one(tiny_tokenizer, ids)) == decode(tiny_tokenizer, ids)


def test_half_a_character_at_the_end_is_not_lost(tiny_tokenizer):
    ids = tiny_tokenizer.encode("ab 🛶")[:-1]
    pieces = one_by_one(tiny_tokenizer, ids)
    assert "".join(pieces) == decode(tiny_tokenizer, ids)
    assert pieces[-1].endswith(BROKEN)


def test_special_tokens_leave_no_text(tiny_tokenizer):
    ids = tiny_tokenizer.encode("one<|im_end|> two")
    assert "".join(one_by_one(tiny_tokenizer, ids)) == "one two"


def test_spaces_survive_a_decoder_that_strips_the_first_one():
    tokenizer = llama2_like()
    names = ["▁the", "▁cat", "s", "</s>", "▁sat", "<0xE8>", "<0x88>", "<0xB9>", "▁", "▁the"]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert "".join(one_by_one(tokenizer, ids)) == decode(tokenizer, ids) == "the cats sat船  the"
