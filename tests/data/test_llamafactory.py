"""A data folder of LLaMA-Factory's, untouched, gives the tokens and labels that its own code gives for `qwen`.

make_llamafactory.py wrote down what that is.
"""

import json
from pathlib import Path

import pytest

from jaxtune.config import DataSection, EvalSection, TrainSection
from jaxtune.data.loader import build_data

FILES = Path(__file__).parent / "files"
EXPECTED = json.loads((FILES / "llamafactory_qwen.json").read_text())
IGNORED = -100
# jaxtune's names for LLaMA-Factory's settings.
SETTINGS = {
    "default": {"turn_end": "template"},
    "mask_history": {"turn_end": "template", "train_on": "last"},
    "train_on_prompt": {"train_on_prompt": True},
}

pytestmark = pytest.mark.real


@pytest.fixture
def qwen(shared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared / "assets/qwen2.5-tokenizer", local_files_only=True)


def rows(tokenizer, name: str, **settings) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of each example that jaxtune makes of a data set."""
    section = DataSection(
        dataset=name, dataset_dir=str(FILES / "llamafactory"), max_length=2048, too_long="error", **settings
    )
    examples = build_data(section, EvalSection(), TrainSection(steps=1), tokenizer).train.examples
    found = []
    for start, stop in zip(examples.starts, examples.starts[1:]):
        tokens, learnt = examples.tokens[start:stop].tolist(), examples.supervised[start:stop].tolist()
        found.append((tokens, [token if on else IGNORED for token, on in zip(tokens, learnt)]))
    return found


def expected(setting: str, name: str) -> list[tuple[list[int], list[int]]]:
    """What LLaMA-Factory makes of it; that it has a label of the first token, which nothing predicts, is no matter."""
    return [(row["input_ids"], [IGNORED, *row["labels"][1:]]) for row in EXPECTED[f"{setting} {name}"]]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["lighthouse", "harbour"])
def test_alpaca_and_sharegpt_with_tools_are_the_same_tokens_and_labels(qwen, setting, name):
    assert rows(qwen, name, **SETTINGS[setting]) == expected(setting, name)


@pytest.mark.parametrize("setting", SETTINGS)
def test_openais_messages_are_the_same_but_for_what_is_added_to_their_system_prompts(qwen, tmp_path, setting):
    """LLaMA-Factory adds the switch of another model to them, unless a row has tools and no system prompt. Who wants
    that too puts the lines of llamafactory_openai.jinja before the tokenizer's template."""
    plain, wanted = rows(qwen, "letters", **SETTINGS[setting]), expected(setting, "letters")
    assert [ours == theirs for ours, theirs in zip(plain, wanted, strict=True)] == [True, True, False, False, False]
    template = tmp_path / "template.jinja"
    template.write_text((FILES / "llamafactory_openai.jinja").read_text() + qwen.chat_template)
    assert rows(qwen, "letters", template=str(template), **SETTINGS[setting]) == wanted


def test_jaxtunes_own_labels_are_fewer_by_the_line_break_after_each_turn(qwen):
    (newline,) = qwen.encode("\n")
    for (tokens, own), (same, theirs) in zip(rows(qwen, "harbour"), expected("default", "harbour"), strict=True):
        assert tokens == same
        differ = [at for at, (label, other) in enumerate(zip(own, theirs)) if label != other]
        assert differ and all(own[at] == IGNORED and theirs[at] == newline for at in differ)
