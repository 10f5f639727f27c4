"""The Python calls give transformers' numbers and text, from every form that a model lies in."""

import json
import shutil

import numpy as np
import pytest

import jaxtune
from jaxtune import attention_kernel, checkpoint, loop
from jaxtune.errors import AdapterError, CheckpointError, ConfigError, DataError, MeshError, ModelError
from jaxtune.export import export_run
from tests.peer import CHATML
from tests.runs import ROWS, sections, unfinish, write_config

TOKENS = np.random.default_rng(0).integers(0, 384, (3, 50))
QUESTION = [{"role": "user", "content": "What is 7?"}]


def peer_logits(directory, tokens, adapter=None):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


@pytest.fixture(scope="module")
def model(tiny_model):
    return jaxtune.load_model(tiny_model("qwen2"))


@pytest.fixture(scope="module")
def lora(tiny_model, tmp_path_factory):
    """(run directory, rows of its metrics) of a finished LoRA run with a system line."""
    home = tmp_path_factory.mktemp("lora")
    tree = sections(tiny_model("qwen2"), home, data={"system": "Count."})
    return home / "run", jaxtune.train(tree)


def test_importing_jaxtune_is_quick_and_imports_no_jax(run_python):
    code = "import sys, jaxtune; print([m for m in ('jax', 'flax', 'transformers', 'torch') if m in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


def test_the_call_train_survives_the_import_of_the_module_of_that_name(run_python):
    code = "import jaxtune.train, jaxtune; print(callable(jaxtune.train), jaxtune.train.__name__)"
    assert run_python(code).stdout.split()[0] == "True"
    code = "import jaxtune.train, jaxtune\ntry: jaxtune.train({})\nexcept Exception as e: print(type(e).__name__)"
    assert run_python(code).stdout.strip() == "ConfigError"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="lod_model"):
        _ = jaxtune.lod_model


def test_the_version_is_the_packages(repository):
    assert f'version = "{jaxtune.__version__}"' in (repository / "pyproject.toml").read_text()


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_logits_are_those_of_transformers(tiny_model, family):
    directory = tiny_model(family)
    ours = jaxtune.load_model(directory).logits(TOKENS)
    assert ours.dtype == np.float32
    assert_close(ours, peer_logits(directory, TOKENS))


def test_logits_do_not_depend_on_the_padding_that_rounds_lengths_up(model):
    whole = model.logits(TOKENS)
    np.testing.assert_allclose(model.logits(TOKENS[:, :7]), whole[:, :7], atol=1e-5)
    np.testing.assert_allclose(model.logits(TOKENS[1:2].tolist()), whole[1:2], atol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [[1, 2, 3], [[1.0, 2.0]], [[]], [[384]], [[-1]], [[0] * 400], "text", [[1, 2, 3], [1, 2]]],
    ids=lambda bad: str(bad)[:20],
)
def test_tokens_that_the_model_has_no_place_for_are_refused(model, bad):
    with pytest.raises((DataError, ModelError), match="token_ids"):
        model.logits(bad)


def test_a_prompt_is_continued_and_messages_are_answered_as_transformers_does(model, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tiny_model("qwen2")
    peer, words = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)

    def text(ids):
        ids = torch.tensor([ids])
        out = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
        return words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    assert model.generate("My name is", max_new_tokens=30) == text(words.encode("My name is"))
    ids = words.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert model.generate(QUESTION, max_new_tokens=30, temperature=0.0) == text(ids)


def test_several_prompts_are_answered_as_each_alone(model):
    prompts = ["One", "Two ships in the morning", QUESTION]
    assert model.generate(prompts, 20) == [model.generate(prompt, 20) for prompt in prompts]


def test_a_stream_is_the_text_in_pieces(model):
    pieces = list(model.generate(QUESTION, 40, stream=True))
    assert len(pieces) > 5
    assert "".join(pieces) == model.generate(QUESTION, 40)
    with pytest.raises(ConfigError, match="stream"):
        model.generate(["a", "b"], stream=True)


def test_a_wrong_setting_is_told_at_the_call_and_not_at_the_first_piece(model):
    with pytest.raises(ConfigError, match="temperature"):
        model.generate("x", temperature=-1.0, stream=True)
    with pytest.raises(ModelError, match="256 positions"):
        model.generate("x " * 500, stream=True)
    with pytest.raises(ConfigError, match="max_new_tokens '2'; allowed: a whole number, 1 or more"):
        model.generate("x", "2", stream=True)


def test_the_seed_decides_what_is_drawn(model):
    draw = [model.generate("x", 30, temperature=1.0, top_k=50, seed=seed) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


def test_an_adapter_changes_the_logits_as_peft_does(tiny_model, lora, capsys):
    base, adapter = tiny_model("qwen2"), lora[0] / "adapter"
    ours = jaxtune.load_model(base, adapter=adapter).logits(TOKENS)
    assert_close(ours, peer_logits(base, TOKENS, adapter))
    assert "made for" not in capsys.readouterr().out
    jaxtune.load_model(tiny_model("qwen2", seed=1), adapter=adapter)
    assert f"Warning: {adapter}: made for {base}, and now on" in capsys.readouterr().out
    assert np.abs(ours - jaxtune.load_model(base).logits(TOKENS)).max() > 0.1


def test_a_run_is_its_base_with_its_adapter_and_the_system_line_of_its_data(tiny_model, lora):
    run = jaxtune.load_model(lora[0])
    by_hand = jaxtune.load_model(tiny_model("qwen2"), adapter=lora[0] / "adapter")
    np.testing.assert_array_equal(run.logits(TOKENS), by_hand.logits(TOKENS))
    assert (run.system, by_hand.system) == ("Count.", None)
    told = [{"role": "system", "content": "Count."}, *QUESTION]
    assert run.generate(QUESTION, 20) == by_hand.generate(told, 20)


def test_a_system_line_that_stands_in_a_source_is_the_runs(tiny_model, tmp_path):
    tree = sections(tiny_model("qwen2"), tmp_path, steps=1)
    tree["data"]["sources"] = [{"path": tree["data"].pop("path"), "system": "Count."}]
    jaxtune.train(tree)
    assert jaxtune.load_model(tmp_path / "run").system == "Count."


def test_training_gives_the_rows_of_metrics_jsonl(lora):
    directory, rows = lora
    assert rows == [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_training_takes_a_config_a_dict_or_a_path(tiny_model, tmp_path):
    from jaxtune.config import make_config

    losses = []
    for name in ("dict", "config", "path"):
        tree = sections(tiny_model("qwen2"), tmp_path / name, steps=2)
        forms = {"dict": tree, "config": make_config(tree)}
        asked = forms.get(name) or write_config(tmp_path / "c.yaml", tree)
        losses.append([row["loss"] for row in jaxtune.train(asked)])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("found", [None, [1]])
def test_training_refuses_what_is_none_of_these(found):
    with pytest.raises(ConfigError, match=r"train: expected a Config, .* or a YAML file; found (None|\[1\])$"):
        jaxtune.train(found)


def test_a_run_that_has_not_finished_gives_its_last_checkpoint_and_says_so(lora, tmp_path, capsys):
    half = tmp_path / "half"
    shutil.copytree(lora[0], half)
    unfinish(half)
    ours = jaxtune.load_model(half)
    assert ours.step == 4
    assert "has not finished; this is its checkpoint of step 4" in capsys.readouterr().out
    np.testing.assert_array_equal(ours.logits(TOKENS), jaxtune.load_model(lora[0]).logits(TOKENS))
    shutil.rmtree(half / "checkpoints" / "4")
    earlier = jaxtune.load_model(half)
    assert earlier.step == 2
    assert np.abs(earlier.logits(TOKENS) - ours.logits(TOKENS)).max() > 0.01


@pytest.mark.parametrize("at", ["problems", "arrays", "restore"])
def test_a_checkpoint_that_a_live_run_deletes_meanwhile_gives_way_to_the_last_one(
    lora, tmp_path, monkeypatch, capsys, at
):
    live = tmp_path / "live"
    shutil.copytree(lora[0], live)
    unfinish(live)
    steps, real = live / "checkpoints", getattr(checkpoint, at)
    (steps / "4").rename(tmp_path / "4")

    def go_on(directory, step, *rest, **options):
        if step == 2 and (steps / "2").exists():
            (tmp_path / "4").rename(steps / "4")
            shutil.rmtree(steps / "2")
        return real(directory, step, *rest, **options)

    monkeypatch.setattr(checkpoint, at, go_on)
    assert jaxtune.load_model(live).step == 4
    out = capsys.readouterr().out
    assert "this is its checkpoint of step 4" in out and "step 2" not in out and "damaged" not in out


def test_a_run_that_deletes_every_checkpoint_before_it_is_read_is_told(lora, tmp_path, monkeypatch):
    live = tmp_path / "live"
    shutil.copytree(lora[0], live)
    unfinish(live)

    def go_on(directory, step, *_, **__):
        (directory / str(step)).rename(directory / str(step + 1))
        raise CheckpointError("this checkpoint cannot be read")

    monkeypatch.setattr(checkpoint, "restore", go_on)
    monkeypatch.setattr(checkpoint, "problems", lambda *_, **__: [])
    with pytest.raises(CheckpointError, match=r"deletes its checkpoints before they are read; wait .*checkpoint\.keep"):
        jaxtune.load_model(live)


def test_a_finished_run_without_the_weights_of_its_result_gives_its_checkpoint(lora, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(lora[0], run)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    assert jaxtune.load_model(run).step == 4


def test_a_result_from_before_the_run_went_on_is_not_taken_for_the_runs_own(lora, tmp_path):
    longer = tmp_path / "longer"
    shutil.copytree(lora[0], longer)
    record = json.loads((longer / "run.json").read_text())
    (longer / "run.json").write_text(json.dumps({**record, "finished": False}))
    assert jaxtune.load_model(longer).step == 4


def test_a_run_that_has_saved_nothing_is_refused(lora, tmp_path):
    early = tmp_path / "early"
    shutil.copytree(lora[0], early)
    unfinish(early)
    shutil.rmtree(early / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        jaxtune.load_model(early)


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_a_run_of_the_whole_model_gives_the_same_from_its_checkpoint_as_from_its_result(tiny_model, tmp_path, method):
    tune = {"method": "full"} if method == "full" else {"method": "freeze", "freeze_first": 1}
    jaxtune.train(sections(tiny_model("llama"), tmp_path, tune=tune, steps=2))
    run = tmp_path / "run"
    finished = jaxtune.load_model(run).logits(TOKENS)
    assert_close(finished, peer_logits(run / "model", TOKENS))
    assert np.abs(finished - jaxtune.load_model(tiny_model("llama")).logits(TOKENS)).max() > 0.1
    unfinish(run)
    np.testing.assert_array_equal(jaxtune.load_model(run).logits(TOKENS), finished)


def test_a_run_whose_base_model_was_changed_is_refused(lora, tiny_model, tmp_path):
    changed, run = tmp_path / "changed", tmp_path / "run"
    shutil.copytree(tiny_model("qwen2", seed=1), changed)
    shutil.copytree(lora[0], run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(tiny_model("qwen2")), str(changed)))
    with pytest.raises(CheckpointError, match="not the one that the run began with"):
        jaxtune.load_model(run)


@pytest.fixture
def moved(lora, tiny_model, tmp_path):
    """(the run, its base model): copies that a test may change."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_model("qwen2"), base)
    shutil.copytree(lora[0], run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(tiny_model("qwen2")), str(base)))
    return run, base


def test_a_run_whose_tokenizer_was_changed_is_refused(moved):
    run, base = moved
    jaxtune.load_model(run)
    found = json.loads((base / "tokenizer.json").read_text())
    words = found["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (base / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="base: this tokenizer is not the one that the run began with"):
        jaxtune.load_model(run)


def test_a_run_whose_base_has_another_template_by_now_has_the_one_that_it_learnt_with_and_says_so(moved, capsys):
    run, base = moved
    own = jaxtune.load_model(run).tokenizer
    assert "template" not in capsys.readouterr().out
    own.chat_template, before = CHATML + "{# another #}", own.chat_template
    own.save_pretrained(base)
    assert jaxtune.load_model(run).tokenizer.chat_template == before
    assert "base: has another chat template than when the run began" in capsys.readouterr().out
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "template": None}))  # as earlier versions have it
    assert jaxtune.load_model(run).tokenizer.chat_template == CHATML + "{# another #}"


def test_a_run_keeps_the_template_that_it_learnt_with(tiny_model, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(CHATML + "{# own #}")
    jaxtune.train(sections(tiny_model("qwen2"), tmp_path, steps=1, data={"template": str(template)}))
    template.write_text("{{ messages }}")
    assert jaxtune.load_model(tmp_path / "run").tokenizer.chat_template == CHATML + "{# own #}"
    template.unlink()
    done = export_run(tmp_path / "run", tmp_path / "out", "peft")
    assert done.difference < 1e-4


def test_a_run_whose_base_model_is_gone_says_what_its_path_counts_from(lora, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(lora[0], run)
    config = (run / "config.yaml").read_text().splitlines()
    lines = ["  path: ./moved/away" if line.startswith("  path:") and i < 3 else line for i, line in enumerate(config)]
    (run / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(ModelError, match=r"counts from where the run was started; .* the new model\.path notes it"):
        jaxtune.load_model(run)


def test_what_is_no_model_is_named(tiny_model, lora, tmp_path):
    with pytest.raises(ModelError, match="give its base model, and this directory as adapter"):
        jaxtune.load_model(lora[0] / "adapter")
    with pytest.raises(AdapterError, match="is a run"):
        jaxtune.load_model(lora[0], adapter=lora[0] / "adapter")
    with pytest.raises(ModelError, match="no such file"):
        jaxtune.load_model(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="not an adapter directory"):
        jaxtune.load_model(tiny_model("qwen2"), adapter=tmp_path)
    for wrong in ({"path": None}, {"path": "-", "adapter": 3}):
        with pytest.raises(ConfigError, match="expected text or a Path"):
            jaxtune.load_model(**wrong)


def test_bfloat16_is_near_float32_and_other_types_are_refused(tiny_model, model):
    import jax

    half = jaxtune.load_model(tiny_model("qwen2"), dtype="bfloat16")
    assert {str(array.dtype) for array in jax.tree.leaves(half.params)} == {"bfloat16"}
    logits = half.logits(TOKENS)
    assert logits.dtype == np.float32
    error = np.abs(logits - model.logits(TOKENS)).max()
    assert 0 < error < 0.1 * np.abs(logits).max()
    with pytest.raises(ConfigError, match="float16"):
        jaxtune.load_model(tiny_model("qwen2"), dtype="float16")


@pytest.mark.parametrize("mesh", [{"fsdp": 64}, {"rows": 2}, {"fsdp": 0}, {"fsdp": "2"}])
def test_a_mesh_that_does_not_fit_is_refused(tiny_model, mesh):
    with pytest.raises(MeshError, match="mesh"):
        jaxtune.load_model(tiny_model("qwen2"), mesh=mesh)


def test_a_mesh_of_ones_own_needs_our_axes(tiny_model):
    import jax

    with pytest.raises(MeshError, match="unknown axis x; allowed are pipe, data, fsdp, context, tensor"):
        jaxtune.load_model(tiny_model("qwen2"), mesh=jax.make_mesh((1,), ("x",)))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "tensor": 4}, None], ids=str)
def test_eight_devices_give_what_one_gives(tiny_model, model, sizes):
    import jax

    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = sizes or jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=auto)
    spread = jaxtune.load_model(tiny_model("qwen2"), mesh=mesh)
    assert len(jax.tree.leaves(spread.params)[0].sharding.device_set) == 8
    np.testing.assert_allclose(spread.logits(TOKENS), model.logits(TOKENS), atol=1e-5)
    assert spread.generate("My name is", 20) == model.generate("My name is", 20)


def test_the_rows_of_the_runs_are_what_these_tests_ask_about():
    assert ROWS[7] == {"instruction": "What is 7?", "output": "It is number 7."}


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    """Two adapters of one model, of different methods and layers."""
    from jaxtune.assemble import Source, assemble
    from jaxtune.config import ModelSection, tune_section
    from jaxtune.mesh import single_device_mesh
    from jaxtune.tune.peft_io import save_adapter
    from tests.tune.support import Tuned, randomised

    home, found = tmp_path_factory.mktemp("adapters"), {}
    sections = {"plain": tune_section(rank=4, layers=[1]), "scaled": tune_section(method="ia3")}
    for name, section in sections.items():
        made = assemble(Source.open(ModelSection(path=str(tiny_model("qwen2")))), section, single_device_mesh())
        moved = randomised(Tuned(made.model, made.params, made.mask, section))
        save_adapter(home / name, section, made.model.weights, moved.params)
        found[name] = home / name
    return found


def test_an_adapter_that_lies_in_a_model_s_directory_is_told_to_be_left_off(tiny_model, adapters, tmp_path, capsys):
    directory = shutil.copytree(tiny_model("qwen2"), tmp_path / "both")
    shutil.copytree(adapters["plain"], directory, dirs_exist_ok=True)
    plain = jaxtune.load_model(directory)
    assert f"{directory}: holds an adapter too, which transformers would put on" in capsys.readouterr().out
    np.testing.assert_array_equal(plain.logits(TOKENS), jaxtune.load_model(tiny_model("qwen2")).logits(TOKENS))
    jaxtune.load_model(directory, adapter=directory)
    assert "holds an adapter" not in capsys.readouterr().out
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="a PEFT adapter, not a model"):
        jaxtune.load_model(directory)


def test_a_model_that_may_not_be_read_is_told(tiny_model, tmp_path, forbid):
    directory = shutil.copytree(tiny_model("qwen2"), tmp_path / "model")
    forbid(directory)
    with pytest.raises(ModelError, match="model: cannot be read: Permission denied"):
        jaxtune.load_model(directory)


@pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")
def test_several_adapters_share_one_base_and_are_switched(tiny_model, adapters):
    directory = tiny_model("qwen2")
    model = jaxtune.load_model(directory)
    plain = model.logits(TOKENS)
    for name, where in adapters.items():
        model.add_adapter(name, where)
        np.testing.assert_array_equal(model.logits(TOKENS), plain)
    assert model.adapters == list(adapters)
    for name, where in adapters.items():
        model.use_adapter(name)
        assert np.abs(model.logits(TOKENS) - plain).max() > 0.01
        assert_close(model.logits(TOKENS), peer_logits(directory, TOKENS, where))
    model.use_adapter(None)
    np.testing.assert_array_equal(model.logits(TOKENS), plain)


def test_an_adapter_that_is_not_there_or_has_a_name_that_is_taken_is_refused(tiny_model, adapters):
    model = jaxtune.load_model(tiny_model("qwen2"))
    with pytest.raises(AdapterError, match="not loaded; loaded are none"):
        model.use_adapter("plain")
    model.add_adapter("plain", adapters["plain"])
    with pytest.raises(AdapterError, match="taken are plain"):
        model.add_adapter("plain", adapters["scaled"])
    other = jaxtune.load_model(tiny_model("qwen2"), adapter=adapters["plain"])
    with pytest.raises(AdapterError, match="load its base model"):
        other.add_adapter("scaled", adapters["scaled"])


def test_attention_is_told_whether_a_row_may_hold_two_examples(tiny_model, tmp_path, monkeypatch):
    """On a GPU it then needs no mask."""
    settled, assembled, settle, assemble = [], [], attention_kernel.settle, loop.assemble

    def noted(*arguments, execution, **options):
        assembled.append(execution.one_document)
        return assemble(*arguments, execution=execution, **options)

    monkeypatch.setattr(attention_kernel, "settle", lambda *asked: settled.append(asked[3]) or settle(*asked))
    monkeypatch.setattr(loop, "assemble", noted)
    for packing in (True, False):
        home = tmp_path / str(packing)
        jaxtune.train(sections(tiny_model("qwen2"), home, steps=1, data={"packing": packing, "max_length": 256}))
    assert settled == assembled == [False, True]
