"""An export gives the run's logits in peft and in transformers, or it does not get its name."""

import json
import shutil

import numpy as np
import pytest
from safetensors import SafetensorError
from tokenizers import normalizers

import jaxtune
from jaxtune import assemble, export
from jaxtune.errors import ConfigError, ModelError, SaveError, UserError
from jaxtune.export import export_run, probe_tokens
from jaxtune.tune import peft_io
from tests.peer import write_tokenizer
from tests.runs import LORA, sections, unfinish

TOKENS = np.random.default_rng(1).integers(0, 384, (2, 40))
METHODS = {
    "lora": LORA,
    "untied": {**LORA, "targets": ["q_proj", "embed_tokens", "lm_head"]},
    "full": {"method": "full"},
    "vera": {"method": "vera", "rank": 8, "targets": ["q_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def run_of(tiny_model, tmp_path_factory):
    """run_of(method) -> the directory of a finished run; do not write in it."""
    made = {}

    def make(method):
        if method not in made:
            home = tmp_path_factory.mktemp(method)
            model = tiny_model("qwen2", tie_word_embeddings=True)
            jaxtune.train(sections(model, home, tune=METHODS[method], steps=2))
            made[method] = home / "run"
        return made[method]

    return make


def peer_logits(directory, base=None):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base or directory, dtype=torch.float32)
    if base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, directory)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def test_peft_is_told_which_revision_of_the_base_an_adapter_is_of(tiny_model, tmp_path, monkeypatch):
    """By training and by the export; PEFT would take the newest."""
    found = tiny_model("qwen2", tie_word_embeddings=True)
    monkeypatch.setattr(assemble, "resolve_model", lambda path, revision=None, weights=True: found)
    jaxtune.train(sections("org/model", tmp_path, steps=1, model={"revision": "abc123"}))
    export_run(tmp_path / "run", tmp_path / "exported", "peft")
    for directory in (tmp_path / "run" / "adapter", tmp_path / "exported"):
        stored = json.loads((directory / "adapter_config.json").read_text())
        assert (stored["base_model_name_or_path"], stored["revision"]) == ("org/model", "abc123")


def test_a_run_whose_adapter_cannot_be_written_says_how_to_go_on(tiny_model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    tree = sections(tiny_model("qwen2"), tmp_path, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(peft_io, "_write_files", full)
        with pytest.raises(SaveError) as caught:
            jaxtune.train(tree)
    assert "adapter: cannot be written: [Errno 28] No space left on device; every step is saved" in str(caught.value)
    assert not list((tmp_path / "run").glob("*adapter*"))
    assert [row["step"] for row in jaxtune.train(tree)] == [1, 2]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def assert_close(ours, theirs, share=1e-4):
    np.testing.assert_allclose(ours, theirs, atol=share * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_model_gives_the_runs_logits_in_transformers(run_of, method, tmp_path):
    run, out = run_of(method), tmp_path / "merged"
    done = export_run(run, out, "hf")
    assert done.difference < 1e-4 * done.largest
    assert_close(jaxtune.load_model(run).logits(TOKENS), peer_logits(out))
    assert_close(jaxtune.load_model(out).logits(TOKENS), peer_logits(out))


def test_a_merged_model_is_a_whole_directory(run_of, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    out = tmp_path / "merged"
    export_run(run_of("lora"), out, "hf")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(export_base(run_of("lora"))).chat_template
    assert GenerationConfig.from_pretrained(out).eos_token_id == 2
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def export_base(run):
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())["model"]["path"]


def test_an_adapter_that_untied_the_head_merges_into_a_model_with_two_matrices(run_of, tmp_path):
    out = tmp_path / "merged"
    export_run(run_of("untied"), out, "hf")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    params = jaxtune.load_model(out).params
    assert np.abs(np.asarray(params["head"]["weight"] - params["embed"]["weight"])).max() > 1e-3


def test_an_exported_adapter_is_the_runs_own_bytes_and_peft_reads_it(run_of, tmp_path):
    run, out = run_of("lora"), tmp_path / "adapter"
    done = export_run(run, out, "peft")
    assert done.difference == 0.0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (run / "adapter" / name).read_bytes()
    assert_close(jaxtune.load_model(run).logits(TOKENS), peer_logits(out, export_base(run)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_export_has_narrow_files_and_stays_within_what_its_type_allows(run_of, tmp_path, dtype):
    from safetensors import safe_open

    done = export_run(run_of("lora"), tmp_path / "narrow", "hf", dtype)
    assert 0 < done.difference <= done.tolerance * done.largest
    with safe_open(tmp_path / "narrow" / "model.safetensors", framework="flax") as file:
        assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {dtype}  # noqa: SIM118


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_has_not_finished_is_exported_from_its_checkpoint(run_of, tmp_path, method):
    half = tmp_path / "half"
    shutil.copytree(run_of(method), half)
    unfinish(half)
    done = export_run(half, tmp_path / "out", "hf")
    assert done.step == 2
    np.testing.assert_array_equal(
        jaxtune.load_model(tmp_path / "out").logits(TOKENS), merged_logits(run_of(method), tmp_path / "whole")
    )


def merged_logits(run, out):
    export_run(run, out, "hf")
    return jaxtune.load_model(out).logits(TOKENS)


def test_the_adapter_of_a_checkpoint_is_that_of_the_finished_run(run_of, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(run_of("lora"), half)
    unfinish(half)
    export_run(half, tmp_path / "out", "peft")
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (run_of("lora") / "adapter" / name).read_bytes()


def test_the_template_that_a_run_was_given_goes_along(tiny_model, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}assistant:")
    data = {"template": str(template)}
    jaxtune.train(sections(tiny_model("llama"), tmp_path, tune={"method": "full"}, steps=2, data=data))
    out = tmp_path / "out"
    export_run(tmp_path / "run", out, "hf")
    for directory in (tmp_path / "run" / "model", out):
        assert jaxtune.load_model(directory).tokenizer.chat_template == template.read_text()


def words_with_another_cut(model):
    write_tokenizer(model.parent / "words", normalizers.Lowercase())
    return {"tokenizer": str(model.parent / "words")}


def ends_that_are_no_ids(model):
    (model / "generation_config.json").write_text('{"eos_token_id": [2, "</s>"]}')
    return {}


def words_linked_from_elsewhere(model):
    (model / "tokenizer.json").rename(model.parent / "tokenizer.json")
    (model / "tokenizer.json").symlink_to("../tokenizer.json")
    return {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            words_with_another_cut,
            r"words: beside the config\.json of this model .* as Qwen2Tokenizer, .* such as ",
        ),
        (ends_that_are_no_ids, r"generation_config\.json: eos_token_id is \[2, '</s>'\]"),
        (words_linked_from_elsewhere, r"tokenizer\.json is a link to"),
    ],
)
def test_what_cannot_go_along_with_a_whole_model_is_said_before_the_first_step(tiny_model, tmp_path, spoil, message):
    model = shutil.copytree(tiny_model("qwen2"), tmp_path / "model")
    tree = sections(model, tmp_path / "home", tune=METHODS["full"], model=spoil(model))
    with pytest.raises(ModelError, match=message):  # a SaveError would come after the last
        jaxtune.train(tree)
    assert not list((tmp_path / "home" / "run").glob("*/"))


@pytest.mark.parametrize("format", ["hf", "peft"])
def test_a_wrong_export_never_gets_its_name(run_of, tmp_path, monkeypatch, format):
    def spoiled(directory, assembled, params, *rest):
        norm = {"weight": params["norm"]["weight"] * 1.01}
        return write(directory, assembled, {**params, "norm": norm}, *rest)

    def spoiled_adapter(directory, section, weights, params, *rest):
        params["stacks"]["0"]["attention"]["q_proj"]["weight"] = half_of(params)
        return save(directory, section, weights, params, *rest)

    def half_of(params):
        import dataclasses

        leaf = params["stacks"]["0"]["attention"]["q_proj"]["weight"]
        return dataclasses.replace(leaf, b=leaf.b * 0.5)

    write, save = export._write_model, export.save_adapter
    monkeypatch.setattr(export, "_write_model", spoiled)
    monkeypatch.setattr(export, "save_adapter", spoiled_adapter)
    with pytest.raises(ModelError, match=r"gives other logits than the run.*allowed 0\.001 of the largest"):
        export_run(run_of("lora"), tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(run_of, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="is there already"):
        export_run(run_of("lora"), tmp_path / "out", "hf")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_of_two_that_write_one_directory_the_second_is_refused(run_of, tmp_path, monkeypatch):
    def meanwhile(*arguments):
        monkeypatch.undo()
        with pytest.raises(ModelError, match="out: another process writes it"):
            export_run(run_of("lora"), tmp_path / "out", "peft")
        return compare(*arguments)

    compare = export._compare
    monkeypatch.setattr(export, "_compare", meanwhile)
    export_run(run_of("lora"), tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_came_there_while_an_export_was_written_is_not_written_over(run_of, tmp_path, monkeypatch):
    def meanwhile(*arguments):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        return compare(*arguments)

    compare = export._compare
    monkeypatch.setattr(export, "_compare", meanwhile)
    with pytest.raises(ModelError, match="out: is there already; give a new directory"):
        export_run(run_of("lora"), tmp_path / "out", "peft")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_an_empty_directory_that_cannot_be_replaced_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    def busy(*_):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(export.Path, "rename", busy)
    with pytest.raises(ModelError, match=r"out: cannot be written: \[Errno 16\] Device or resource busy"):
        with export._unchecked(tmp_path / "out") as unchecked:
            unchecked.mkdir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("format", "at"),
    [("hf", "hf_write.save_file"), ("hf", "hf_write.write_json"), ("peft", "tune.peft_io._write_files")],
)
@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), OSError(13, "Permission denied")])
def test_a_disk_without_room_for_an_export_is_a_failure_and_named_as_asked_for(
    run_of, tmp_path, monkeypatch, format, at, problem
):
    def fail(*_, **__):
        raise SafetensorError(f"I/O error: {problem.strerror} (os error {problem.errno})") if rust else problem

    rust = at.endswith("save_file")
    monkeypatch.setattr(f"jaxtune.{at}", fail)
    with pytest.raises(UserError, match=rf"^{tmp_path}/out: cannot be written: .*{problem.strerror}") as caught:
        export_run(run_of("lora"), tmp_path / "out", format)
    full = problem.errno == 28
    assert caught.value.exit_code == (1 if full else 2)
    assert ("make room, or mend the disk, then run the same command again" in str(caught.value)) == full
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "format", "dtype", "message"),
    [
        ("full", "peft", "float32", "trained with tune.method full"),
        ("lora", "onnx", "float32", "allowed: peft, hf"),
        ("lora", "hf", "int8", "allowed: float32, bfloat16, float16"),
        ("lora", "peft", "bfloat16", "an adapter is float32"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    run_of, tmp_path, method, format, dtype, message
):
    with pytest.raises(ConfigError, match=message):
        export_run(run_of(method), tmp_path / "out", format, dtype)
    assert list(tmp_path.iterdir()) == []


def test_the_probe_fits_the_model():
    from types import SimpleNamespace

    probe = probe_tokens(SimpleNamespace(vocab_size=10, max_positions=16))
    assert probe.shape == (4, 16)
    assert set(probe.ravel().tolist()) == set(range(10))


def test_the_tool_prints_the_difference(run_of, repository, tmp_path, run_python):
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    tool = repository / "tools" / "export.py"
    done = run_python(code, tool, "--run", run_of("lora"), "--out", tmp_path / "out", "--format", "hf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the largest logit difference against the run is" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
