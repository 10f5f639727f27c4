"""IA3's own option. Numbers and files are compared with peft in test_peft_methods.py."""

import pytest
from peft import PeftModel

from jaxtune import tune
from jaxtune.config import tune_section
from jaxtune.errors import AdapterError
from jaxtune.tune.peft_io import save_adapter
from tests.tune.support import difference, logits, peer_logits, peer_model, randomised, tuned
from tests.tune.test_lora import QWEN2_5_0_5B


@pytest.mark.parametrize("given", [["down_proj"], r"model\.layers\.\d+\.mlp\.down_proj"], ids=str)
def test_the_input_of_a_feed_forward_module_is_scaled(given):
    made = tuned(tune_section(method="ia3", feedforward_modules=given))
    stack, config = made.params["stacks"]["0"], made.model.config
    assert stack["mlp"]["down_proj"]["weight"].scale.shape[-1] == config.intermediate_size
    assert stack["attention"]["k_proj"]["weight"].scale.shape[-1] == config.num_kv_heads * config.head_dim


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["down_prj"], r'tune.feedforward_modules: "down_prj" is no target; did you mean "down_proj"\?'),
        (["down_proj", "up_proj"], r'"up_proj" is no target'),
        ("down_proj", r'"down_proj" is no target; a list has names, a text is a regular expression'),
        ("(down_proj", r'tune.feedforward_modules: "\(down_proj" is not a regular expression'),
    ],
    ids=str,
)
def test_a_feed_forward_module_that_is_no_target_is_refused(given, words):
    with pytest.raises(AdapterError, match=words):
        tune.layout(tune_section(method="ia3", feedforward_modules=given), QWEN2_5_0_5B)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["k_proj", "mlp.down_proj"]},
        {"targets": ["down_proj"], "feedforward_modules": ["mlp.down_proj"]},
        {"targets": "all-linear", "feedforward_modules": ["mlp.down_proj", "up_proj"]},
    ],
    ids=str,
)
def test_other_words_than_the_targets_are_written_as_peft_takes_them(tmp_path, options):
    made = randomised(tuned(tune_section(method="ia3", **options)))
    save_adapter(tmp_path, made.section, made.model.weights, made.params)
    expected = logits(made.model, made.params)
    again = tuned(tune_section(method="ia3", adapter=str(tmp_path)))
    assert difference(logits(again.model, again.params), expected) < 1e-5
    theirs = PeftModel.from_pretrained(peer_model(), tmp_path).eval()
    assert difference(peer_logits(theirs), expected) < 1e-4


def test_the_default_goes_with_any_targets():
    tune.layout(tune_section(method="ia3", targets=["k_proj"]), QWEN2_5_0_5B)
