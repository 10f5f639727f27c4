"""Real data through real tokenizers: huanhuan with Qwen2.5's template, and SmolLM2's own tokenizer."""

import json
import time

import numpy as np
import pytest

from jaxtune.config import DataSection, EvalSection, TrainSection
from jaxtune.data import build_data
from jaxtune.data.chat import special_tokens

pytestmark = pytest.mark.real

SYSTEM = "现在你要扮演皇帝身边的女人--甄嬛"


@pytest.fixture(scope="module")
def qwen(shared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "assets" / "qwen2.5-tokenizer", local_files_only=True)


def build(shared, tokenizer, *, eval: dict | None = None, train: dict | None = None, **section):
    path = str(shared / "data" / "huanhuan.json")
    made = DataSection(path=path, **{"system": SYSTEM, "max_length": 384, **section})
    return build_data(made, EvalSection(**eval or {}), TrainSection(**train or {}), tokenizer)


@pytest.fixture(scope="module")
def data(shared, qwen):
    return build(shared, qwen, train={"epochs": 1})


def test_the_numbers_of_huanhuan_are_the_known_ones(data):
    lengths = data.train.examples.lengths
    assert len(lengths) == 3729
    assert lengths.sum() == 250_698
    assert round(lengths.mean()) == 67
    assert lengths.max() == 249
    learnt = data.train.examples.supervised.sum()
    # The known 34 % count the line break after each <|im_end|>, which generation never gets to.
    assert round((learnt + len(lengths)) / lengths.sum(), 2) == 0.34
    assert learnt == 81_364


def test_tokens_and_targets_are_those_of_the_peers_recipe(data, qwen, shared):
    """transformers' own template and tokenizer; supervised: what follows the prompt, up to <|im_end|>."""
    rows = json.loads((shared / "data" / "huanhuan.json").read_text())
    examples = data.train.examples
    for number in range(0, 3729, 37):
        row = rows[number]
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["instruction"]}]
        prompt = qwen.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        messages.append({"role": "assistant", "content": row["output"]})
        whole = qwen.apply_chat_template(messages, return_dict=False)
        part = slice(examples.starts[number], examples.starts[number + 1])
        assert examples.tokens[part].tolist() == whole
        expected = [len(prompt) <= at < len(whole) - 1 for at in range(len(whole))]
        assert examples.supervised[part].tolist() == expected


def test_packs_of_huanhuan_are_full(data):
    assert data.train.rows * 384 < 1.02 * 250_698
    assert sum(batch.num_tokens for batch in data.train.batches()) == 250_698


def test_huanhuan_takes_a_moment(shared, qwen):
    start = time.process_time()
    build(shared, qwen, eval={"fraction": 0.05})
    assert time.process_time() - start < 8  # 1.3 s of the machine that wrote this


def test_plans_of_packed_and_unpacked_hold_the_same_targets(shared, qwen, data):
    unpacked = build(shared, qwen, packing=False, train={"epochs": 1}).train
    assert unpacked.shape == (1, 8, 256)
    counts = [np.zeros(152_000, int), np.zeros(152_000, int)]
    for count, dataset in zip(counts, (data.train, unpacked)):
        for batch in dataset.batches():
            np.add.at(count, batch.targets[batch.mask], 1)
    np.testing.assert_array_equal(*counts)


def test_smollm2s_tokenizer_needs_no_help(shared, smollm2):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(smollm2.qwen2, local_files_only=True)
    examples = build(shared, tok, train={"epochs": 1}, max_length=2000).train.examples
    assert special_tokens(tok).fullmatch("<|im_end|>")
    last = examples.starts[1:] - 2  # the line break after <|im_end|> is the last token
    assert set(tok.convert_ids_to_tokens(examples.tokens[last])) == {"<|im_end|>"}
    assert examples.supervised[last].all() and not examples.supervised[last + 1].any()
