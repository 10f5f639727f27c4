"""What virtual tokens have for themselves: how they start, what their encoders leave on disk, packs, and whole runs.

Logits and losses against peft's are in test_peft_methods.py, meshes in test_method_meshes.py.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune import tune
from jaxtune.assemble import Source, assemble
from jaxtune.config import ModelSection, make_config, tune_section
from jaxtune.errors import AdapterError, ConfigError, DataError, ModelError
from jaxtune.export import export_run
from jaxtune.float8 import Watch
from jaxtune.mesh import single_device_mesh
from jaxtune.models.weights import HOOKS
from jaxtune.ops import Noise
from jaxtune.tune.peft_config import read_config, resolve, to_peft
from jaxtune.tune.peft_io import save_adapter
from jaxtune.tune.peft_tensors import TENSORS_NAME
from jaxtune.tune.virtual import ENCODER_FILE
from tests.programs import Stepper
from tests.quant.support import QuantStepper
from tests.runs import ROWS, sections
from tests.tune.support import SIZES, TOKENS, difference, logits, peer_logits, peer_model, randomised, tuned

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers", "ignore:::torch")

VIRTUAL = 5
PROMPT = {"method": "prompt", "num_virtual_tokens": VIRTUAL}
MLP = {"method": "p_tuning", "num_virtual_tokens": VIRTUAL, "encoder_hidden_size": 24}
LSTM = {**MLP, "encoder_reparameterization_type": "LSTM"}
PREFIX = {"method": "prefix", "num_virtual_tokens": VIRTUAL}
PROJECTED = {**PREFIX, "prefix_projection": True, "encoder_hidden_size": 24}
TEXT = "Answer as the keeper of the lighthouse would."


def saved(made, directory):
    save_adapter(directory, made.section, made.model.weights, made.params, "base")
    return directory


def peft_model(made):
    """peft's, with its own first values."""
    from peft import PeftConfig, get_peft_model

    settings = {**to_peft(made.section, made.model.weights, None), "inference_mode": False}
    return get_peft_model(peer_model(), PeftConfig.from_peft_type(**settings))


@pytest.fixture(scope="module")
def start(tiny_model):
    def start(seed=0, **options):
        section = tune_section(**PROMPT, **options)
        source = Source.open(ModelSection(path=str(tiny_model("qwen2"))))
        params = assemble(source, section, single_device_mesh(), seed=seed).params
        return np.asarray(params[HOOKS]["prompt"]), np.asarray(params["embed"]["weight"])

    return start


class TestStarts:
    @pytest.mark.parametrize("text", [TEXT, "Count."], ids=["cut", "repeated"])
    def test_a_text_gives_the_embeddings_that_it_gives_in_peft(self, start, tiny_model, text):
        from peft import PromptTuningConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        directory = str(tiny_model("qwen2"))
        settings = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}
        config = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, tokenizer_name_or_path=directory, **settings
        )
        peer = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config)
        expected = peer.prompt_encoder["default"].embedding.weight.detach().numpy()
        np.testing.assert_array_equal(start(**settings)[0], expected)

    def test_the_vocabulary_gives_rows_of_the_embedding_by_seed(self, start):
        prompt, table = start(prompt_tuning_init="SAMPLE_VOCAB")
        rows = [np.flatnonzero((table == row).all(axis=1)) for row in prompt]
        assert all(len(found) for found in rows)
        assert len({int(found[0]) for found in rows}) > 1
        np.testing.assert_array_equal(start(prompt_tuning_init="SAMPLE_VOCAB")[0], prompt)
        assert np.any(start(seed=1, prompt_tuning_init="SAMPLE_VOCAB")[0] != prompt)

    def test_a_text_without_tokens_is_refused(self, start):
        from jaxtune.tune.prompt import text_ids

        section = tune_section(**PROMPT, prompt_tuning_init="TEXT", prompt_tuning_init_text=" ")
        with pytest.raises(ConfigError, match="has no token"):
            text_ids(section, lambda text: {"input_ids": []})

    @pytest.mark.parametrize("options", [MLP, LSTM, PROJECTED], ids=["MLP", "LSTM", "projection"])
    def test_an_encoder_has_peft_s_weights_of_peft_s_sizes(self, tmp_path, options):
        import torch

        torch.manual_seed(0)
        made = tuned(tune_section(**options))
        ours = load_file(saved(made, tmp_path / "adapter") / ENCODER_FILE)
        theirs = {k: v.detach().numpy() for k, v in peft_model(made).prompt_encoder["default"].state_dict().items()}
        assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
        for name, array in ours.items():
            apart = 0.4 if array.size > 100 else 0.8  # a bias is a few numbers
            assert array.std() == pytest.approx(theirs[name].std(), rel=apart), name
            assert abs(array.mean()) < theirs[name].std(), name

    def test_a_prefix_may_start_at_zero(self):
        for options in (PREFIX, PROJECTED):
            stack = tuned(tune_section(**options, init_weights="zero")).params["stacks"]["0"][HOOKS]
            assert not any(np.any(x) for x in jax.tree.leaves(stack))
            assert all(np.all(np.any(x, axis=(1, 2, 3))) for x in self.fresh(options))

    def fresh(self, options):
        stack = tuned(tune_section(**options)).params["stacks"]["0"][HOOKS]
        return [np.asarray(stack[name]) for name in ("key", "value")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({**PROMPT, "prompt_tuning_init": "TEXT"}, "takes its text from prompt_tuning_init_text"),
        ({**PROMPT, "prompt_tuning_init_text": "x"}, "would do nothing"),
        ({**PROMPT, "prompt_tuning_init": "SAMPLE_VOCAB", "adapter": "x"}, "nothing with an adapter"),
        ({**MLP, "encoder_num_layers": 3}, "encoder_num_layers belongs to encoder_reparameterization_type LSTM"),
        ({**MLP, "encoder_dropout": 0.1}, "encoder_dropout belongs to"),
        ({**LSTM, "encoder_num_layers": 1, "encoder_dropout": 0.1}, "between the layers of the LSTM"),
        ({**PREFIX, "encoder_hidden_size": 8}, "belongs to prefix_projection"),
        ({**PREFIX, "init_weights": "zero", "adapter": "x"}, "nothing with an adapter"),
        ({**PROMPT, "rank": 8}, "belongs to method lora"),
    ],
    ids=str,
)
def test_a_setting_that_would_do_nothing_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        make_config({"model": {"path": "-"}, "data": {"path": "-"}, "tune": options})


@pytest.mark.parametrize("options", [PROMPT, LSTM, PROJECTED], ids=lambda options: options["method"])
def test_packed_documents_see_their_own_virtual_tokens_alone(options):
    made = randomised(tuned(tune_section(**options)))
    first, second = TOKENS[0, :6], TOKENS[1, :4]
    ids = np.array(made.model.virtual_ids)
    pack = np.concatenate([ids, first, ids, second])
    lengths = [VIRTUAL + 6, VIRTUAL + 4]
    positions = np.concatenate([np.arange(length) for length in lengths])
    hidden, _ = made.model.hidden(made.params, pack[None], positions[None], np.repeat([1, 2], lengths)[None])
    found = np.asarray(made.model.logits(made.params, hidden))[0]
    for alone, part in ((first, found[VIRTUAL : VIRTUAL + 6]), (second, found[-4:])):
        assert difference(part, logits(made.model, made.params, alone[None])[0]) < 1e-5
    assert difference(found[-4:], peer_logits(peer_model(), second[None])[0]) > 0.01


class TestFiles:
    @pytest.mark.parametrize("options", [PROMPT, MLP, LSTM, PREFIX, PROJECTED], ids=lambda o: str(list(o.values())))
    def test_an_adapter_goes_on_with_the_very_numbers_that_trained(self, tmp_path, options):
        made = randomised(tuned(tune_section(**options)))
        directory = saved(made, tmp_path / "adapter")
        again = tuned(tune_section(method=options["method"], adapter=str(directory)))
        assert again.section.model_copy(update={"adapter": None}) == made.section
        jax.tree.map(np.testing.assert_array_equal, again.params, made.params)
        saved(again, tmp_path / "again")
        for file in directory.iterdir():
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name

    @pytest.mark.parametrize("options", [PROMPT, MLP, LSTM, PREFIX, PROJECTED], ids=lambda o: str(list(o.values())))
    def test_the_config_is_one_that_peft_writes(self, tmp_path, options):
        made = tuned(tune_section(**options))
        saved(made, tmp_path / "ours")
        peft_model(made).save_pretrained(tmp_path / "theirs")
        mine, theirs = (
            json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")
        )
        skipped = {"base_model_name_or_path", "num_attention_heads"}
        assert {k: theirs[k] for k in mine.keys() - skipped} == {k: mine[k] for k in mine.keys() - skipped}
        assert mine["num_attention_heads"] == (theirs["num_attention_heads"] if options["method"] == "prefix" else None)
        rest = {key: theirs[key] for key in theirs.keys() - mine.keys() - {"peft_version"}}
        assert not any(rest.values()), rest

    def test_p_tuning_without_its_encoder_is_a_prompt(self, tmp_path):
        made = randomised(tuned(tune_section(**MLP)))
        directory = saved(made, tmp_path / "adapter")
        (directory / ENCODER_FILE).unlink()
        section = read_config(directory)
        assert section.method == "prompt"
        plain = tuned(section)
        assert difference(logits(plain.model, plain.params), logits(made.model, made.params)) < 1e-5
        with pytest.raises(ConfigError, match=r"tune\.method: 'p_tuning', the adapter has 'prompt'"):
            resolve(tune_section(method="p_tuning", adapter=str(directory)))

    def test_a_projected_prefix_without_its_encoder_is_a_plain_one(self, tmp_path):
        made = randomised(tuned(tune_section(**PROJECTED)))
        directory = saved(made, tmp_path / "adapter")
        (directory / ENCODER_FILE).unlink()
        plain = tuned(read_config(directory))
        assert not plain.section.prefix_projection
        assert difference(logits(plain.model, plain.params), logits(made.model, made.params)) < 1e-5

    @pytest.mark.parametrize("options", [MLP, PROJECTED], ids=["MLP", "projection"])
    def test_an_encoder_that_belongs_to_another_adapter_is_refused(self, tmp_path, options):
        directory = saved(randomised(tuned(tune_section(**options))), tmp_path / "adapter")
        tensors = load_file(directory / TENSORS_NAME)
        save_file({name: array * 1.05 for name, array in tensors.items()}, directory / TENSORS_NAME)
        with pytest.raises(AdapterError, match=f"prompt_embeddings is not what {ENCODER_FILE} gives"):
            tuned(read_config(directory))

    def test_a_prompt_for_a_model_of_another_size_is_refused(self, tmp_path):
        directory = saved(tuned(tune_section(**PROMPT)), tmp_path / "adapter")
        save_file({"prompt_embeddings": np.zeros((VIRTUAL, 8), np.float32)}, directory / TENSORS_NAME)
        with pytest.raises(AdapterError, match=r"prompt_embeddings \(5, 8\), expected \(5, 32\)"):
            tuned(read_config(directory))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"num_transformer_submodules": 2}, "num_transformer_submodules 2; a decoder has 1"),
            ({"num_virtual_tokens": None}, "num_virtual_tokens None"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save = "),
        ],
        ids=str,
    )
    def test_what_we_do_not_have_is_named(self, tmp_path, change, words):
        directory = saved(tuned(tune_section(**PROMPT)), tmp_path / "adapter")
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(AdapterError, match=words):
            read_config(directory)


def test_dropout_is_between_the_lstm_s_layers_in_training_alone():
    made = tuned(tune_section(**LSTM, encoder_dropout=0.5))
    encoder, own = made.model.hooks, made.params[HOOKS]
    noise = Noise(jax.random.key(0), jnp.arange(7))
    still, dropped = encoder.encode(own), encoder.encode(own, noise)
    assert difference(np.asarray(dropped), np.asarray(still)) > 0.01
    np.testing.assert_array_equal(dropped, encoder.encode(own, Noise(noise.key, jnp.arange(3))))
    assert np.any(dropped != encoder.encode(own, noise.fold_in(1)))
    alone = tuned(tune_section(**LSTM)).model.hooks
    np.testing.assert_array_equal(alone.encode(own, noise), still)


def test_delayed_float8_remembers_the_layers_that_a_prompt_s_gradient_passes():
    made = tuned(tune_section(**PROMPT))
    watched = Watch.of(made.model.weights, made.mask, 4).layers
    assert watched == Watch.of(made.model.weights, tuned(tune_section(method="full")).mask, 4).layers


@pytest.mark.parametrize("options", [LSTM, PROJECTED], ids=["LSTM", "projection"])
def test_bfloat16_computes_nearly_the_same(options):
    def losses(compute):
        return Stepper(tune=options, mesh={"fsdp": 1}, precision={"compute": compute}, rows=4).run(2)

    narrow, wide = losses("bfloat16"), losses("float32")
    assert narrow != wide
    np.testing.assert_allclose(narrow, wide, rtol=2e-2)


def test_key_value_heads_that_the_tensor_axis_does_not_divide():
    def losses(mesh):
        return Stepper(tune={**PREFIX, "num_virtual_tokens": 4}, mesh=mesh, rows=4).run(3)

    np.testing.assert_allclose(losses({"tensor": 4, "context": 2}), losses({"fsdp": 1}), atol=2e-5)


def test_what_follows_a_cache_does_not_make_the_virtual_tokens_again():
    made = tuned(tune_section(**LSTM))
    empty = made.model.empty_cache(1, 16, jnp.float32)

    def loops(tokens, cache):
        def step(tokens, cache):
            return made.model.hidden(made.params, tokens, tokens, jnp.ones_like(tokens), cache=cache)

        return str(jax.make_jaxpr(step)(tokens, cache)).count("scan[")

    first, more = np.ones((2, 1, 8), np.int32)
    _, begun = jax.eval_shape(lambda: made.model.hidden(made.params, first, first, more, cache=empty))
    assert loops(first, empty) == 1 + 4  # the layers', and four of the LSTM: two layers, both ways
    assert loops(first[:, :1], begun) == 1


RUNS = {
    "prompt": {**PROMPT, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT},
    "p_tuning": {**MLP, "encoder_hidden_size": None},
    "prefix": PROJECTED,
}


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """made(name) -> (run directory, rows of its metrics): four steps."""
    found = {}

    def make(name):
        if name not in found:
            home = tmp_path_factory.mktemp(name)
            tree = sections(tiny_model("qwen2"), home, tune=RUNS[name], eval={"fraction": 0.2})
            found[name] = home, jaxtune.train(tree)
        return found[name]

    return make


@pytest.mark.parametrize("name", RUNS)
class TestRuns:
    def test_it_learns_and_its_tokens_are_the_real_ones(self, made, name, tiny_model):
        rows = made(name)[1]
        losses = [row["loss"] for row in rows if "loss" in row]
        assert losses[-1] < losses[0]
        assert rows[-1]["eval_loss"] > 0
        words = jaxtune.load_model(tiny_model("qwen2")).tokenizer
        longest = max(len(words.encode(row["instruction"] + row["output"])) for row in ROWS)
        assert 0 < rows[0]["tokens"] <= 16 * (longest + 20)  # templates included, virtual ones not

    def test_the_adapter_computes_the_same_in_peft(self, made, name, tiny_model):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        run, base = made(name)[0] / "run", tiny_model("qwen2")
        tokens = np.random.default_rng(0).integers(0, 384, (2, 20))
        peer = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
        with torch.no_grad():
            expected = peer(torch.tensor(tokens)).logits.numpy()[:, -20:]
        for model in (jaxtune.load_model(run), jaxtune.load_model(base, adapter=run / "adapter")):
            assert difference(model.logits(tokens), expected) < 1e-4
        spread = jaxtune.load_model(run, mesh={"fsdp": 2, "tensor": 4})  # which does not divide the key/value heads
        assert difference(spread.logits(tokens), expected) < 1e-4

    def test_it_is_one_of_several_adapters_on_a_model(self, made, name, tiny_model):
        run, tokens = made(name)[0] / "run", np.arange(40).reshape(2, 20)
        model = jaxtune.load_model(tiny_model("qwen2"))
        plain = model.logits(tokens)
        model.add_adapter("run", run / "adapter")
        np.testing.assert_array_equal(model.logits(tokens), plain)
        model.use_adapter("run")
        assert difference(model.logits(tokens), plain) > 0.01
        np.testing.assert_array_equal(model.logits(tokens), jaxtune.load_model(run).logits(tokens))
        assert model.generate("What is 7?", 5) == jaxtune.load_model(run).generate("What is 7?", 5)
        model.use_adapter(None)
        np.testing.assert_array_equal(model.logits(tokens), plain)

    def test_generation_is_what_the_logits_say(self, made, name):
        model = jaxtune.load_model(made(name)[0] / "run")
        prompts = [[5, 6, 7, 8, 9], [40], list(range(100, 120))]
        found = model._generator.tokens(model.params, prompts, 6)
        for prompt, new in zip(prompts, found):
            ids = list(prompt)
            for token in new:
                assert int(model.logits([ids])[0, -1].argmax()) == token
                ids.append(token)
        positions = model.config.max_positions
        with pytest.raises(ModelError, match=f"the model has {positions - VIRTUAL} positions"):
            model.logits([[1] * (positions - VIRTUAL + 1)])
        with pytest.raises(ModelError, match=f"the model has {positions - VIRTUAL} positions"):
            model._generator.tokens(model.params, [[1] * (positions - VIRTUAL)], 2)
        assert model.logits([[1] * (positions - VIRTUAL)]).shape[1] == positions - VIRTUAL
        with pytest.raises(DataError, match="384 is outside the vocabulary"):
            model.logits([[model._model.virtual_ids[0]]])

    def test_it_goes_on_bit_for_bit_from_a_checkpoint(self, made, name, tiny_model, tmp_path):
        tree = sections(tiny_model("qwen2"), tmp_path, tune=RUNS[name], eval={"fraction": 0.2}, steps=2)
        jaxtune.train(tree)
        jaxtune.train({**tree, "train": {**tree["train"], "steps": 4}})
        for file in (made(name)[0] / "run" / "adapter").glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "run" / "adapter" / file.name).read_bytes()

    def test_it_is_exported_for_peft_and_not_merged(self, made, name, tmp_path):
        run = made(name)[0] / "run"
        assert export_run(run, tmp_path / "out", "peft").difference == 0
        names = {file.name for file in (run / "adapter").iterdir()}
        assert {file.name for file in (tmp_path / "out").iterdir()} == names
        with pytest.raises(ConfigError, match=f"what tune.method {name} trains .* cannot be merged"):
            export_run(run, tmp_path / "merged", "hf")

    def test_an_unfinished_run_is_asked_as_it_is(self, made, name, tmp_path):
        from tests.runs import unfinish

        run = tmp_path / "run"
        shutil.copytree(made(name)[0] / "run", run)
        whole = jaxtune.load_model(run).logits(TOKENS)
        unfinish(run)
        assert difference(jaxtune.load_model(run).logits(TOKENS), whole) < 1e-6


def test_virtual_ids_begin_where_the_vocabulary_ends():
    made = tuned(tune_section(**PROMPT))
    ids = range(SIZES["vocab_size"], SIZES["vocab_size"] + VIRTUAL)
    assert tune.virtual_ids(made.section, made.model.config) == made.model.virtual_ids == ids
    assert tune.virtual_ids(tune_section(), made.model.config) == range(48, 48)


@pytest.mark.parametrize(
    "options", [{**PROMPT, "prompt_tuning_init": "SAMPLE_VOCAB"}, PREFIX], ids=["prompt", "prefix"]
)
def test_virtual_tokens_stand_before_a_quantised_base_too(options):
    options = {**options, "num_virtual_tokens": 4}
    plain, narrow = (
        QuantStepper(quantize, tune=options, mesh={"fsdp": 1}, rows=4, train={"batch_size": 4}).run(2)
        for quantize in (None, "nf4")
    )
    assert plain != narrow
    np.testing.assert_allclose(narrow, plain, rtol=0.1)
