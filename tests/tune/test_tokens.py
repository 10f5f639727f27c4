"""Trainable tokens, and new ones that grow the vocabulary. The peers are peft 0.21 and transformers' resized models."""

import json
from copy import deepcopy
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune import tune
from jaxtune.assemble import Source, assemble
from jaxtune.config import ModelSection, make_config, tune_section
from jaxtune.errors import AdapterError, ConfigError, MeshError, ModelError
from jaxtune.export import export_run
from jaxtune.mesh import make_mesh, single_device_mesh
from jaxtune.plan.program import make_step
from jaxtune.section import TuneSection
from jaxtune.tune.merge import merged
from jaxtune.tune.peft_config import read_config
from jaxtune.tune.peft_io import save_adapter
from jaxtune.tune.tokens import TokenRows
from tests.peer import tokenizer
from tests.runs import sections, unfinish
from tests.tune.support import SIZES, difference, logits, model_config, peer_logits, peer_state, randomised, tuned

VOCAB = SIZES["vocab_size"]
TOKENS = np.random.default_rng(3).integers(0, VOCAB + 3, (2, 11))
NEW = ["<|a|>", "<|b|>", "<|c|>"]


def tokens_section(**options) -> TuneSection:
    return tune_section(method="trainable_tokens", **options)


def resized(tied: bool):
    """The peer with three rows more, each the mean of the others."""
    import torch
    from transformers import AutoModelForCausalLM

    config, state = peer_state("qwen2", tied)
    model = AutoModelForCausalLM.from_config(deepcopy(config))  # resizing changes the one that it has
    model.load_state_dict(state)
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table[VOCAB:] = table[:VOCAB].mean(0)
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_as_the_mean_of_the_others_in_tables_as_large_as_they_must_be(tied):
    made = tuned(tokens_section(new_tokens=NEW), tied=tied)
    assert made.model.config.vocab_size == VOCAB + 3
    expected = peer_logits(resized(tied), TOKENS)
    assert difference(logits(made.model, made.params, TOKENS), expected) < 1e-4
    assert difference(logits(made.model, merged(made.params), TOKENS), expected) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_peft_loads_what_new_tokens_learned_on_a_resized_model(tied, tmp_path):
    from peft import PeftModel

    made = randomised(tuned(tokens_section(new_tokens=NEW, token_indices=[7]), tied=tied))
    save_adapter(tmp_path / "a", made.section, made.model.weights, made.params)
    model = PeftModel.from_pretrained(resized(tied), tmp_path / "a").eval()
    ours = logits(made.model, made.params, TOKENS)
    assert difference(ours, peer_logits(resized(tied), TOKENS)) > 0.1
    assert difference(ours, peer_logits(model, TOKENS)) < 1e-4
    again = tuned(read_config(tmp_path / "a"), tied=tied)  # ids past the vocabulary grow it here too
    assert difference(logits(again.model, again.params, TOKENS), ours) < 1e-4


def test_only_the_rows_train():
    made = tuned(tokens_section(token_indices=[3, 9]), tied=False)
    leaves = [(jax.tree_util.keystr(path), flag) for path, flag in jax.tree_util.tree_leaves_with_path(made.mask)]
    assert [path for path, flag in leaves if flag] == ["['embed']['weight'].rows_NE"]
    assert isinstance(made.params["embed"]["weight"], TokenRows)


def test_a_token_is_added_once_and_never_split():
    words, section = tune.words(tokens_section(new_tokens=["sea breeze", "<|a|>"], token_indices=[5]), tokenizer_copy())
    assert section.ids(400) == (5, 384, 385)
    assert words.encode("The sea breeze<|a|>")[-2:] == [384, 385]
    assert words.decode([384, 385]) == "sea breeze<|a|>"


def tokenizer_copy():
    return deepcopy(tokenizer())


def test_a_tokenizer_with_several_templates_lies_beside_the_adapter_with_all_of_them(tmp_path):
    from transformers import AutoTokenizer

    words = tokenizer_copy()
    words.chat_template = {"default": words.chat_template, "rag": "{{ 'rag' }}"}
    words, section = tune.words(tokens_section(new_tokens=NEW), words)
    made = tuned(section)
    for _ in range(2):  # over itself too
        save_adapter(tmp_path / "a", section, made.model.weights, made.params, tokenizer=words)
    assert AutoTokenizer.from_pretrained(tmp_path / "a").chat_template == words.chat_template


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name some in tune.token_indices or tune.new_tokens"),
        ({"token_indices": [3, 3]}, "twice"),
        ({"token_indices": [VOCAB]}, "past the model's vocabulary, 0 to 47; to add tokens"),
        ({"token_indices": [1], "targets": ["lm_head"]}, "lm_head is its embedding"),
        ({"token_indices": [1], "targets": []}, "tune.targets is empty"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        tuned(tokens_section(**options))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (["<|im_end|>"], r"has <\|im_end\|> already.*\(2\) in tune.token_indices"),
        (["x1", "x1"], "twice"),
        ([""], "empty"),
    ],
)
def test_a_new_token_is_new(new, message):
    with pytest.raises(ConfigError, match=message):
        tune.words(tokens_section(new_tokens=new), tokenizer_copy())


def test_ids_with_holes_leave_no_place_for_new_tokens():
    """tokenizers counts on from the number of tokens: 3 would be the id of two."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = WordLevel({"a": 0, "b": 1, "c": 3}, unk_token="a")
    holed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), name_or_path="here")
    told = "of here has 3 tokens, with ids up to 3: new ones would get ids from 3 on, which others have; give each id"
    with pytest.raises(ModelError, match=told):
        tune.words(tokens_section(new_tokens=["x"]), holed)


def test_rows_without_a_token_are_used_before_the_tables_grow():
    _, section = tune.words(tokens_section(new_tokens=NEW), tokenizer_copy())
    config = model_config()
    wide = type(config)(**{**vars(config), "vocab_size": 400})
    assert section.ids(400) == (384, 385, 386) and tune.vocab_size(section, wide) == 400
    assert section.known(400) == 384  # the mean is of rows that have a token
    narrow = type(config)(**{**vars(config), "vocab_size": 384})
    assert tune.vocab_size(section, narrow) == 387


def test_a_file_that_targets_neither_table_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "target_modules": ["q_proj"]})
    )
    with pytest.raises(AdapterError, match="neither embed_tokens nor lm_head"):
        read_config(tmp_path)


def test_ids_keep_their_order_in_the_file(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "TRAINABLE_TOKENS", "token_indices": [10, 9, 100], "target_modules": "model.embed_tokens"}
        )
    )
    assert read_config(tmp_path).token_indices == [10, 9, 100]


def test_a_mesh_that_does_not_divide_the_grown_vocabulary_says_how_many_tokens_are_missing(tiny_model):
    section = tokens_section(new_tokens=NEW)
    source = Source.open(ModelSection(path=str(tiny_model("qwen2"))), tuning=section)
    mesh = make_mesh(jaxtune.config.MeshSection(tensor=2, fsdp=4))
    with pytest.raises(MeshError, match=r"384, but not the 387 .* name 1 more"):
        assemble(source, source.tuning, mesh)


def test_a_plan_knows_of_new_tokens_without_a_tokenizer():
    tree = {"model": {"path": "-"}, "data": {"path": "-", "max_length": 64}, "train": {"batch_size": 2}}
    config = make_config({**tree, "tune": {"method": "trainable_tokens", "new_tokens": NEW}, "mesh": {"fsdp": 1}})
    step = make_step(config, model_config(), single_device_mesh())
    table = step.assembled.params["embed"]["weight"]
    assert (table.base.shape, table.rows_NE.shape, table.ids) == ((VOCAB + 3, 32), (3, 32), (48, 49, 50))


def test_a_plan_takes_an_adapter_as_a_run_does(tmp_path):
    """With ids that are past the base's vocabulary, whose tokens lie beside it."""
    made = tuned(tokens_section(new_tokens=NEW))
    save_adapter(tmp_path, made.section, made.model.weights, made.params)
    tree = {"model": {"path": "-"}, "data": {"path": "-", "max_length": 64}, "train": {"batch_size": 2}}
    config = make_config({**tree, "tune": {"adapter": str(tmp_path)}, "mesh": {"fsdp": 1}})
    table = make_step(config, model_config(), single_device_mesh()).assembled.params["embed"]["weight"]
    assert (table.rows_NE.shape, table.ids) == ((3, 32), (48, 49, 50))
    with pytest.raises(AdapterError, match=r"hidden|shape"):
        make_step(config, replace(model_config(), hidden_size=64), single_device_mesh())


def test_a_run_with_new_tokens_from_its_start_to_its_exports(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, run = tiny_model("qwen2", tie_word_embeddings=True), tmp_path / "run"
    method = {"method": "trainable_tokens", "new_tokens": ["It is number", "<|spare|>"], "token_indices": [300]}
    rows = jaxtune.train(sections(base, tmp_path, steps=4, tune=method, mesh={"fsdp": 4, "tensor": 2}))
    assert rows[-1]["loss"] < rows[0]["loss"]
    tokens = np.array([[384, 300, 385, 5, 7, 300, 384]])
    model = jaxtune.load_model(run)
    assert model.config.vocab_size == 386 and model.tokenizer.encode("It is number") == [384]
    expected = model.logits(tokens)
    assert difference(jaxtune.load_model(base).logits(np.minimum(tokens, 383)), expected[..., :384]) > 1e-3

    with_adapter = jaxtune.load_model(base, adapter=run / "adapter", mesh={"tensor": 2})
    assert with_adapter.tokenizer.encode("It is number") == [384]
    assert with_adapter.tokenizer.chat_template == model.tokenizer.chat_template
    assert difference(with_adapter.logits(tokens), expected) < 1e-5
    assert isinstance(with_adapter.generate("It is number", max_new_tokens=4), str)

    several = jaxtune.load_model(base, mesh={"tensor": 2})
    alone, words = several.logits(np.minimum(tokens, 383)), several.tokenizer.encode("It is number")
    several.add_adapter("new", run / "adapter")
    assert several.tokenizer.encode("It is number") == words and several.config.vocab_size == 384
    several.use_adapter("new")
    assert several.tokenizer.encode("It is number") == [384] and several.config.vocab_size == 386
    assert difference(several.logits(tokens), expected) < 1e-5
    assert isinstance(several.generate("It is number", max_new_tokens=4), str)
    several.use_adapter(None)
    assert several.tokenizer.encode("It is number") == words
    assert difference(several.logits(np.minimum(tokens, 383)), alone) == 0
    with pytest.raises(MeshError, match="divides the model's vocabulary of 384, but not the 386"):
        jaxtune.load_model(base, mesh={"tensor": 4}).add_adapter("new", run / "adapter")

    export_run(run, tmp_path / "hf", "hf")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert peer.config.vocab_size == 386
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode("It is number") == [384]
    assert difference(expected, peer_logits(peer, tokens)) < 1e-4

    unfinish(run)
    export_run(run, tmp_path / "again", "peft")
    assert (tmp_path / "again" / "tokenizer.json").is_file()
    further = tokens_section(adapter=str(tmp_path / "again"), new_tokens=["more"])
    with pytest.raises(ConfigError, match="more is not among the tokens"):
        Source.open(ModelSection(path=str(base)), tuning=further)
