"""The tokenizer in a .gguf cuts text as the tokenizer of the Hugging Face directory does."""

import json
import random

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxtune.errors import ModelError
from jaxtune.gguf_tokenizer import SPLITS, read_gguf_tokenizer
from jaxtune.tokenizer import load_tokenizer, stop_ids
from tests.gguf_peer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER, byte_level_fields
from tests.peer import CHATML, SPECIAL, TEXT

SAMPLES = [
    "Hello, world! It's 3.14159 o'clock, WE'LL see; don't they'd I'm",
    "  two spaces,   three, \t tabs\t\tand\n\nnew lines \r\n at the end  \n",
    "def add(a, b):\n    return a + b  # 12345\n",
    "小主，您又起来了？今天的天气真好。1234567890 ٣٤٥ ½ Ⅷ",
    "naïve café e\u0301 ﬁ ｆｕｌｌ \u00a0\u3000 ẞ İ 👩‍👩‍👧 🇫🇷",
    "<|im_start|>user\nWhat is 42?<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|im_end|> x <tool>y</tool>",
    "https://example.org/a?b=c&d=%20#e_f-g/…—“quoted”",
    "",
    " ",
    "\n",
    "a",
]


def noise(count=60, seed=0):
    """Random strings of the characters that tokenizers disagree about."""
    draw = random.Random(seed)
    letters = [*"aB1 2 .,'\n\t-_<|>é中½", "'s", "'LL", "  ", "\r\n", "<|im_end|>", "👍", "e\u0301", "123"]
    return ["".join(draw.choices(letters, k=draw.randint(1, 30))) for _ in range(count)]


def write(path, fields, architecture="qwen2", pre="gpt-2"):
    """A .gguf of a tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, architecture)
    kinds = {str: "string", bool: "bool", int: "uint32", list: "array"}
    for name, value in {"tokenizer.ggml.pre": pre, **fields}.items():
        if value is not None:
            getattr(writer, f"add_{kinds[type(value)]}")(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def assert_same_tokens(ours, theirs, samples):
    for text in samples:
        for special in (True, False):
            mine = ours(text, add_special_tokens=special)["input_ids"]
            want = theirs(text, add_special_tokens=special)["input_ids"]
            assert mine == want, (text, ours.convert_ids_to_tokens(mine), theirs.convert_ids_to_tokens(want))
        assert ours.decode(want) == theirs.decode(want)
        assert ours.decode(want, skip_special_tokens=True) == theirs.decode(want, skip_special_tokens=True)


# The published tokenizers: their pre-tokenizers as their tokenizer.json files have them.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def published(name):
    """(pre-tokenizer, normaliser, ignore_merges) of the models that a `pre` names."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated")  # noqa: E731
    return {
        "gpt-2": (gpt2, None, False),
        "default": (gpt2, None, False),
        "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]), None, False),
        "qwen2": (pre_tokenizers.Sequence([split(QWEN2), bytes_only]), normalizers.NFC(), False),
        "llama-bpe": (pre_tokenizers.Sequence([split(LLAMA3), bytes_only]), None, True),
    }[name]


def trained(name):
    """A tokenizer of that kind, trained on a few lines, with special and other added tokens."""
    pre, normal, ignore_merges = published(name)
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer, core.decoder = pre, decoders.ByteLevel()
    if normal:
        core.normalizer = normal
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([*TEXT.splitlines(), "12 123 1234 11 22 2024   x  1 \n\n\n"] * 2, trainer)
    names = {"eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=[SPECIAL[1]], chat_template=CHATML, **names
    )
    tokenizer.add_tokens(["<tool>", "</tool>"])
    return tokenizer


def fields_of(tokenizer, **more):
    file = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        **byte_level_fields(file),
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.chat_template": CHATML,
        **more,
    }


@pytest.mark.parametrize("pre", ["gpt-2", "default", "smollm", "qwen2", "llama-bpe"])
def test_text_is_cut_as_by_the_tokenizer_that_the_file_was_made_from(tmp_path, pre):
    theirs = trained(pre)
    fields = fields_of(theirs)
    ours = read_gguf_tokenizer(write(tmp_path / "m.gguf", fields, pre=pre))
    assert_same_tokens(ours, theirs, [*SAMPLES, *noise(), *TEXT.splitlines()])
    assert ours.get_vocab() == theirs.get_vocab()


def test_the_kinds_of_cut_differ_on_these_samples(tmp_path):
    fields = fields_of(trained("gpt-2"))
    cuts = {}
    for pre in ("gpt-2", "smollm", "qwen2", "llama-bpe"):
        tokenizer = read_gguf_tokenizer(write(tmp_path / f"{pre}.gguf", fields, pre=pre))
        cuts[pre] = str([tokenizer(text)["input_ids"] for text in [*SAMPLES, *noise()]])
    assert len(set(cuts.values())) == 4


def test_special_tokens_template_and_stops_are_the_tokenizers(tmp_path):
    theirs = trained("qwen2")
    ours = load_tokenizer(write(tmp_path / "m.gguf", fields_of(theirs), pre="qwen2"))
    assert (ours.eos_token_id, ours.pad_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.pad_token_id, None)
    messages = [{"role": "user", "content": "What is 42?"}, {"role": "assistant", "content": "小主"}]
    ids = [t.apply_chat_template(messages, return_dict=False) for t in (ours, theirs)]
    assert ids[0] == ids[1]
    assert stop_ids(ours) == (theirs.eos_token_id,)
    assert ours.decode(ids[0], skip_special_tokens=True) == theirs.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("pre", "flag", "adds"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_a_first_token_is_added_where_the_file_or_its_kind_says_so(tmp_path, pre, flag, adds):
    fields = fields_of(trained(pre), **{"tokenizer.ggml.bos_token_id": 7, "tokenizer.ggml.add_bos_token": flag})
    tokenizer = read_gguf_tokenizer(write(tmp_path / "m.gguf", fields, pre=pre))
    assert (tokenizer("hello")["input_ids"][0] == 7) == adds
    assert tokenizer("hello", add_special_tokens=False)["input_ids"][0] != 7


def test_a_last_token_is_added_where_the_file_says_so(tmp_path):
    theirs = trained("gpt-2")
    path = write(tmp_path / "m.gguf", fields_of(theirs, **{"tokenizer.ggml.add_eos_token": True}))
    assert read_gguf_tokenizer(path)("hello")["input_ids"][-1] == theirs.eos_token_id


@pytest.mark.parametrize(("pre", "stays"), [("llama-bpe", True), ("gpt-2", False)])
def test_a_word_that_no_merges_make_stays_whole_only_in_llama_3s_kind(tmp_path, pre, stays):
    fields = fields_of(trained(pre))
    fields["tokenizer.ggml.tokens"].append("Ġquux")
    fields["tokenizer.ggml.token_type"].append(NORMAL)
    tokenizer = read_gguf_tokenizer(write(tmp_path / "m.gguf", fields, pre=pre))
    assert ("Ġquux" in tokenizer.tokenize("a quux")) == stays


def test_rows_that_only_fill_up_the_embedding_are_no_tokens(tmp_path):
    theirs = trained("qwen2")
    fields = fields_of(theirs)
    fields["tokenizer.ggml.tokens"] += ["[PAD600]", f"[PAD{len(fields['tokenizer.ggml.tokens']) + 1}]"]
    fields["tokenizer.ggml.token_type"] += [UNUSED, UNUSED]
    ours = read_gguf_tokenizer(write(tmp_path / "m.gguf", fields, pre="qwen2"))
    assert set(ours.get_vocab()) == {*theirs.get_vocab(), "[PAD600]"}


def test_saved_and_loaded_again_it_is_the_same(tmp_path):
    theirs = trained("smollm")
    ours = read_gguf_tokenizer(write(tmp_path / "m.gguf", fields_of(theirs), pre="smollm"))
    ours.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert_same_tokens(again, theirs, [*SAMPLES, *noise()])
    assert again.chat_template == CHATML


def sentencepiece(**more):
    """The fields of a small SentencePiece vocabulary: bytes, characters and some words with scores."""
    words = ["▁hello", "▁world", "hello", "▁the", "▁cat", "▁", "▁▁", "▁▁▁▁", "ll", "he", "lo", "▁h", "▁w", "or", "ld"]
    words += ["▁t", "th", "e▁", "hell", "▁he", "the", "cat", "at", "▁c", "▁ca", "llo", "wor", "rld", "▁hell", "orld"]
    letters = sorted(set("helowrdtca.,!1239HT"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *letters]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(words) + len(letters))]
    # A token's score is above those of its parts' merges as in a trained model: shorter first.
    order = sorted(range(len(words)), key=lambda i: (len(words[i]), i))
    scores = [0.0] * 259 + [float(-order.index(i)) for i in range(len(words))]
    scores += [float(-1000 - i) for i in range(len(letters))]
    tokens += ["<|im_start|>", "<tool>"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [*scores, 0.0, 0.0],
        "tokenizer.ggml.token_type": [*types, CONTROL, USER],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }


SENTENCES = [
    "hello world",
    " hello",
    "the cat  hello",
    "hello    world!",
    "Hé, 中文 12 3.\n\tx",
    "",
    " ",
    "hell orld the",
]
SENTENCES += ["<s>hello</s>", "<|im_start|>hello <tool>cat", "the<|im_start|> cat"]


@pytest.mark.parametrize("more", [{}, {"tokenizer.ggml.add_bos_token": False}, {"tokenizer.ggml.add_eos_token": True}])
def test_sentencepiece_is_cut_as_transformers_and_torch_cut_it(tmp_path, more):
    path = write(tmp_path / "m.gguf", sentencepiece(**more), architecture="llama", pre="default")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = read_gguf_tokenizer(path)
    draw = random.Random(0)
    words = ["hello", " ", "world", "the", "cat", "ll", ".", "1", "é", "\n", "  ", "<s>", "ca", "▁"]
    assert_same_tokens(ours, theirs, SENTENCES + ["".join(draw.choices(words, k=12)) for _ in range(60)])
    assert len(ours("hello")["input_ids"]) == 2 - ("tokenizer.ggml.add_bos_token" in more) + (
        "tokenizer.ggml.add_eos_token" in more
    )


def test_sentencepiece_text_round_trips(tmp_path):
    path = write(tmp_path / "m.gguf", sentencepiece(), architecture="llama", pre="default")
    tokenizer = read_gguf_tokenizer(path)
    for text in ("hello world", "Hé, 中文 12 3.\n\tx", "the cat  hello"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tokenizer.ggml.model": "bert"}, "model is 'bert'; supported: gpt2, llama"),
        ({"tokenizer.ggml.model": None}, "no tokenizer.ggml.model; set model.tokenizer"),
        ({"tokenizer.ggml.pre": "falcon"}, "pre is 'falcon'; supported: "),
        ({"tokenizer.ggml.pre": "smolm"}, 'did you mean "smollm"'),
        ({"tokenizer.ggml.pre": None}, "no tokenizer.ggml.pre"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "expected two tokens"),
        ({"tokenizer.ggml.merges": ["qqqq zzzz"]}, "do not fit"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type is 2; expected one for each"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000; expected an id below"),
        ({"tokenizer.ggml.eos_token_id": None}, "no end-of-sequence token"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token is 'yes'; expected a bool"),
    ],
)
def test_fields_that_make_no_tokenizer_are_refused_by_name(tmp_path, fields, says):
    values = {"tokenizer.ggml.pre": "gpt-2", **fields_of(trained("gpt-2")), **fields}
    path = write(tmp_path / "m.gguf", values, pre=values["tokenizer.ggml.pre"])
    with pytest.raises(ModelError) as refusal:
        load_tokenizer(path)
    assert str(path) in str(refusal.value)
    assert says in str(refusal.value)


def test_every_kind_of_split_is_tested():
    assert set(SPLITS) - {"gpt2", "llama3", "llama-v3"} == {"gpt-2", "default", "smollm", "qwen2", "llama-bpe"}


@pytest.mark.real
def test_qwen2_5_out_of_a_gguf_cuts_as_its_own_tokenizer(shared, tmp_path):
    words = shared / "assets" / "qwen2.5-tokenizer"
    theirs = AutoTokenizer.from_pretrained(words)
    ours = read_gguf_tokenizer(write(tmp_path / "m.gguf", fields_of(theirs), pre="qwen2"))
    rows = json.loads((shared / "data" / "huanhuan.json").read_text())[::40]
    assert_same_tokens(ours, theirs, [*SAMPLES, *noise(300), *(row["output"] for row in rows)])


@pytest.mark.real
def test_smollm2_cuts_as_transformers_does_but_for_the_digits_that_it_leaves_together(smollm2):
    ours, theirs = load_tokenizer(smollm2.gguf), load_tokenizer(smollm2.llama)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    assert (ours.eos_token_id, ours.pad_token_id, ours.bos_token_id) == (2, 2, 1)
    assert_same_tokens(ours, theirs, [text for text in [*SAMPLES, *noise(300)] if not any(map(str.isnumeric, text))])
    # The model was trained with each digit a word of its own; transformers' reader does not know `smollm`.
    assert ours.tokenize("a  1½") == ["a", "ĠĠ", "1", "Â½"]
    assert theirs.tokenize("a  1½") == ["a", "Ġ", "Ġ", "1", "Â½"]
