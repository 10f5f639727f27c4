"""What is written is a model that transformers loads, whole or not at all, and never over a stranger's files."""

import dataclasses
import json
import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers.normalizers import Lowercase
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from jaxtune import hf_write
from jaxtune.assemble import Source
from jaxtune.config import ModelSection
from jaxtune.errors import ModelError
from jaxtune.hf_io import load_params, open_source
from jaxtune.hf_write import check_target, write_model
from jaxtune.models.decoder import Model
from jaxtune.models.families import FAMILIES, read_config, to_hf
from jaxtune.models.weights import map_tree
from jaxtune.tokenizer import load_tokenizer
from tests.peer import write_tokenizer


def load(directory: Path, dtype="float32", stacks=None):
    """(arrays, declarations, config)."""
    config = read_config(directory)
    weights = Model.create(config, stacks).weights
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return load_params(open_source(directory), weights, map_tree(lambda _: here, weights), dtype), weights, config


def rewrite(source: Path, target: Path, dtype="float32", stacks=None, **options) -> Path:
    write_model(target, *load(source, stacks=stacks), source, dtype, **options)
    return target


def state(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").state_dict()


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("shard", [4 << 30, 60_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_same_tensors_back(tiny_model, tmp_path, family, shard):
    source = tiny_model(family, tie_word_embeddings=family in ("qwen2", "llama"))
    written = rewrite(source, tmp_path / "out", max_shard_bytes=shard)
    before, after = state(source), state(written)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (written / "model.safetensors.index.json").exists() == (shard == 60_000)


def test_layers_in_several_stacks_are_written_in_their_order(tiny_model, tmp_path):
    source = tiny_model("qwen2", num_hidden_layers=3)
    written = rewrite(source, tmp_path / "out", stacks=(range(1), range(1, 3)), max_shard_bytes=60_000)
    before, after = state(source), state(written)
    assert all(torch.equal(before[key], after[key]) for key in before)
    index = json.loads((written / "model.safetensors.index.json").read_text())
    files = {key: name for key, name in index["weight_map"].items() if "layers." in key}
    assert sorted(files, key=lambda key: int(key.split(".")[2])) == sorted(files, key=files.get)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_is_the_one_asked_for_in_the_files_and_in_the_config(tiny_model, tmp_path, dtype):
    source = tiny_model("qwen2")
    written = rewrite(source, tmp_path / "out", dtype)
    after, before = state(written), state(source)
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(before[key].to(after[key].dtype), after[key]) for key in before)
    assert json.loads((written / "config.json").read_text())["dtype"] == dtype


def test_numbers_that_the_dtype_does_not_hold_are_refused_by_name(tiny_model, tmp_path):
    params, weights, config = load(source := tiny_model("qwen2"))
    params["norm"]["weight"] = params["norm"]["weight"].at[3].set(-70000.0)
    out = tmp_path / "out"
    with pytest.raises(ModelError, match=r"^model\.norm\.weight .* float16's largest, 65504; take dtype bfloat16 or"):
        write_model(out, params, weights, config, source, "float16")
    assert list(tmp_path.iterdir()) == []
    write_model(out, params, weights, config, source, "bfloat16")
    assert state(out)["model.norm.weight"].min() < -65504


def test_files_hold_no_more_than_asked_for_and_the_index_says_what_they_hold(tiny_model, tmp_path):
    written = rewrite(tiny_model("qwen2"), tmp_path / "out", max_shard_bytes=60_000)
    index = json.loads((written / "model.safetensors.index.json").read_text())
    held, total = {}, 0
    for file in written.glob("*.safetensors"):
        with safe_open(file, framework="np") as handle:
            sizes = {key: handle.get_tensor(key).nbytes for key in handle.keys()}  # noqa: SIM118
        assert sum(sizes.values()) <= 60_000 or len(sizes) == 1
        total += sum(sizes.values())
        held |= dict.fromkeys(sizes, file.name)
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == total
    assert all(name.startswith("model-0000") for name in held.values())


def test_only_one_shard_is_on_the_host_at_once(tiny_model, tmp_path, monkeypatch):
    copies = []
    copy = hf_write._to_host

    def watch(*arguments):
        copies.append(weakref.ref(copied := copy(*arguments)))
        alive = [array.nbytes for reference in copies if (array := reference()) is not None]
        assert sum(alive) <= 60_000 or len(alive) == 1
        return copied

    monkeypatch.setattr(hf_write, "_to_host", watch)
    rewrite(tiny_model("qwen2"), tmp_path / "out", max_shard_bytes=60_000)
    assert len(copies) > 20


def test_the_original_fields_stay_and_what_changed_is_written(tiny_model, tmp_path):
    source = shutil.copytree(tiny_model("qwen2", tie_word_embeddings=True), tmp_path / "source")
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**fields, "_name_or_path": "abc", "use_cache": False}))
    params, _, config = load(source)
    untied = dataclasses.replace(config, tied=False)
    params["head"] = {"weight": params["embed"]["weight"] + 1}
    write_model(tmp_path / "out", params, Model.create(untied).weights, untied, source, "float32")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["_name_or_path"], written["use_cache"], written["tie_word_embeddings"]) == ("abc", False, False)
    head = state(tmp_path / "out")["lm_head.weight"].numpy()
    np.testing.assert_array_equal(head, np.asarray(params["head"]["weight"]))


def test_tokenizer_template_and_generation_config_go_along(tiny_model, tmp_path):
    source = shutil.copytree(tiny_model("qwen2"), tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": [0, 2], "temperature": 0.5, "do_sample": true}')
    (source / "README.md").write_text("not ours to spread")
    (source / "tokenization_own.py").write_text("raise SystemExit")
    written = rewrite(source, tmp_path / "out")
    assert not {"README.md", "tokenization_own.py"} & set(contents(written))
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, written))
    assert before("小主, hello 12")["input_ids"] == after("小主, hello 12")["input_ids"]
    assert before.chat_template == after.chat_template
    assert GenerationConfig.from_pretrained(written).eos_token_id == [0, 2]


def test_a_given_tokenizer_takes_the_place_of_the_sources(tiny_model, tmp_path):
    source = tiny_model("qwen2")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{{ 'mine' }}"
    written = rewrite(source, tmp_path / "out", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(written).chat_template == "{{ 'mine' }}"


def test_a_tokenizer_that_differs_from_the_sources_in_its_end_alone_takes_its_place(tiny_model, tmp_path):
    source = tiny_model("qwen2")
    tokenizer = AutoTokenizer.from_pretrained(source, eos_token="<|im_start|>")
    written = rewrite(source, tmp_path / "out", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(written).eos_token == "<|im_start|>"
    assert (written / "tokenizer.json").exists()


def test_a_tokenizer_that_transformers_would_read_with_another_cut_is_refused(tiny_model, tmp_path):
    words, text, out = (
        load_tokenizer(write_tokenizer(tmp_path / "words", Lowercase())),
        "It's 1234567890",
        tmp_path / "out",
    )
    with pytest.raises(ModelError, match="reads the tokenizer as Qwen2Tokenizer, which cuts text otherwise"):
        rewrite(tiny_model("qwen2"), out, tokenizer=words)
    assert [path.name for path in tmp_path.iterdir()] == ["words"]
    written = rewrite(tiny_model("qwen3"), out, tokenizer=words)
    assert AutoTokenizer.from_pretrained(written)(text)["input_ids"] == words(text)["input_ids"]


def test_a_model_whose_own_tokenizer_is_read_with_another_cut_may_have_another_template(tiny_model, tmp_path):
    source = shutil.copytree(tiny_model("qwen2"), tmp_path / "source")
    write_tokenizer(source, Lowercase())
    words = load_tokenizer(source)
    words.chat_template = "another"
    again = load_tokenizer(rewrite(source, tmp_path / "out", tokenizer=words))
    assert (again("IT'S")["input_ids"], again.chat_template) == (words("it's")["input_ids"], "another")


def test_with_another_tokenizer_there_are_no_token_ids_of_the_old_vocabulary(tiny_model, tmp_path):
    """transformers' embedding refuses a padding id behind its end."""
    source, words = shutil.copytree(tiny_model("llama"), tmp_path / "source"), write_tokenizer(tmp_path / "words")
    old = {"bos_token_id": 9000, "eos_token_id": [9001, 32], "pad_token_id": 9002}
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**fields, "vocab_size": 10_000, **old}))
    (source / "generation_config.json").write_text(json.dumps({**old, "temperature": 0.5}))
    tokens = json.loads((words / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (words / "tokenizer.json").write_text(json.dumps(tokens))
    section = {"tokenizer": str(words), "init": "random", "overrides": {"vocab_size": fields["vocab_size"]}}
    opened = Source.open(ModelSection(path=str(source), **section))
    params, weights, _ = load(tiny_model("llama"))
    write_model(tmp_path / "out", params, weights, opened.config, source, "float32", tokenizer=opened.tokenizer)
    config, generation = (
        json.loads((tmp_path / "out" / f"{name}config.json").read_text()) for name in ("", "generation_")
    )
    own = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    assert {name: config[name] for name in own} == own
    assert generation == {**own, "temperature": 0.5}
    assert opened.stop_ids == (2,)


@pytest.mark.parametrize(
    ("stored", "expected"), [(0, [0, 2]), ([0, 1], [0, 1, 2]), (2, 2), ([2, 0], [2, 0]), (None, 2)], ids=str
)
def test_transformers_stops_where_the_template_s_turn_ends(tiny_model, tmp_path, stored, expected):
    source = shutil.copytree(tiny_model("qwen2"), tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": stored, "temperature": 0.5}))
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert tokenizer.convert_ids_to_tokens([2]) == ["<|im_end|>"] and "<|im_end|>" in tokenizer.chat_template
    written = rewrite(source, tmp_path / "out", tokenizer=tokenizer)
    found = GenerationConfig.from_pretrained(written)
    assert (found.eos_token_id, found.temperature) == (expected, 0.5)


@pytest.mark.parametrize("own", [True, False])
def test_all_chat_templates_go_along(tiny_model, tmp_path, own):
    source = shutil.copytree(tiny_model("qwen2"), tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ 'rag' }}")
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert tokenizer.chat_template.keys() == {"default", "rag"}
    if own:
        tokenizer.chat_template["rag"] = "{{ 'mine' }}"
    for _ in range(2):  # over itself too
        written = rewrite(source, tmp_path / "out", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(written).chat_template == tokenizer.chat_template


def test_a_source_without_a_generation_config_gets_one_of_its_token_ids(tiny_model, tmp_path):
    source = shutil.copytree(tiny_model("qwen2"), tmp_path / "source")
    (source / "generation_config.json").unlink()
    written = rewrite(source, tmp_path / "out")
    assert json.loads((written / "generation_config.json").read_text()) == {"eos_token_id": 2, "pad_token_id": 0}


def test_a_model_of_ours_is_replaced_and_nothing_is_left_beside_it(tiny_model, tmp_path):
    rewrite(tiny_model("qwen2"), tmp_path / "out", max_shard_bytes=60_000)
    written = rewrite(tiny_model("llama"), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert read_config(written).model_type == "llama"
    assert [file.name for file in written.glob("*.safetensors")] == ["model.safetensors"]


def stranger(name):
    return lambda path: (path.mkdir(), (path / name).write_text("mine"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_text("mine"), "is in the way"),
        (lambda path: path.symlink_to("elsewhere"), "is in the way"),
        (stranger("notes.txt"), "holds notes.txt"),
        (stranger("config.json"), "holds config.json"),
        (stranger("model.safetensors"), "holds model.safetensors"),
    ],
)
def test_what_we_did_not_write_is_never_written_over(tiny_model, tmp_path, make, says):
    make(tmp_path / "out")
    with pytest.raises(ModelError, match=says):
        rewrite(tiny_model("qwen2"), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    if (tmp_path / "out").is_dir():
        assert set(contents(tmp_path / "out").values()) == {b"mine"}


def test_the_source_itself_and_a_model_of_ours_with_a_strangers_file_are_safe(tiny_model, tmp_path):
    source = shutil.copytree(tiny_model("qwen2"), tmp_path / "source")
    with pytest.raises(ModelError, match="which jaxtune did not write"):
        rewrite(source, source)
    ours = rewrite(source, tmp_path / "out")
    check_target(ours)
    (ours / "README.md").write_text("added by hand")
    with pytest.raises(ModelError, match=r"holds README\.md"):
        check_target(ours)


def test_an_empty_directory_and_a_new_one_are_free(tmp_path):
    check_target(tmp_path)
    check_target(tmp_path / "new" / "deep")


@pytest.mark.parametrize("at", ["save_file", "write_json", "_write_tokenizer", "_write_generation", "_put_in_place"])
@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_anywhere_leaves_what_was_there(tiny_model, tmp_path, monkeypatch, at, problem):
    out = rewrite(tiny_model("llama"), tmp_path / "out")
    before = contents(out)
    work = getattr(hf_write, at)
    calls = []

    def fail(*arguments, **options):
        calls.append(at)
        if len(calls) > 1 or at not in ("save_file", "write_json"):
            raise problem
        return work(*arguments, **options)

    monkeypatch.setattr(hf_write, at, fail)
    expected = ModelError if isinstance(problem, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="cannot be written: .*No space" if expected is ModelError else None):
        rewrite(tiny_model("qwen2"), out, max_shard_bytes=60_000)
    assert contents(out) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_that_finds_no_room_leaves_what_was_there(tiny_model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library says it

    out = rewrite(tiny_model("llama"), tmp_path / "out")
    before = contents(out)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("qwen2"), eos_token="<|im_start|>")
    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(ModelError, match=r"out: cannot be written: .*No space left on device"):
        rewrite(tiny_model("qwen2"), out, tokenizer=tokenizer)
    assert contents(out) == before


def test_a_last_rename_that_fails_puts_the_old_model_back(tiny_model, tmp_path, monkeypatch):
    out = rewrite(tiny_model("llama"), tmp_path / "out")
    before = contents(out)
    rename = Path.rename

    def fail(self, target):
        if self.name == ".out.partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ModelError, match="Input/output error"):
        rewrite(tiny_model("qwen2"), out)
    assert contents(out) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_disk_without_room_is_found_before_anything_is_written(tiny_model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 10)
    monkeypatch.setattr(hf_write.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelError, match=r"cannot be written: .* need 1 MiB, the disk has 0 MiB free") as caught:
        rewrite(tiny_model("qwen2"), tmp_path / "out")
    assert caught.value.exit_code == 1  # a failure, and no mistake of the user's
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_write_left_is_put_right(tiny_model, tmp_path):
    out = rewrite(tiny_model("llama"), tmp_path / "out")
    before = contents(out)
    out.rename(tmp_path / ".out.old")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("")
    params, weights, config = load(tiny_model("qwen2"))
    with pytest.raises(ModelError):
        write_model(out, params, weights, config, tmp_path / "no.gguf", "float32")
    assert contents(out) == before
    rewrite(tiny_model("qwen2"), out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_files_may_be_read_by_whom_the_umask_allows(tiny_model, tmp_path):
    written = rewrite(tiny_model("qwen2"), tmp_path / "out")
    assert len({file.stat().st_mode for file in written.iterdir()}) == 1


def test_what_is_written_is_read_back_to_the_same_config(tiny_model, tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
    source = tiny_model("qwen3", rope_parameters=rope, head_dim=32)
    assert read_config(rewrite(source, tmp_path / "out")) == read_config(source)
    assert to_hf(read_config(source))["rope_parameters"] == rope


SHARDED = """
import sys
from pathlib import Path
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtune.hf_io import load_params, open_source, write_model
from jaxtune.models.decoder import Model
from jaxtune.models.families import read_config
from jaxtune.models.weights import map_tree

source, out = map(Path, sys.argv[1:])
config = read_config(source)
weights = Model.create(config).weights
mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
where = map_tree(lambda w: NamedSharding(mesh, P("a") if w.layers is None else P(None, "a")), weights)
params = load_params(open_source(source), weights, where, "float32")
write_model(out, params, weights, config, source, "float32", max_shard_bytes=60_000)
"""


def test_sharded_arrays_are_gathered(tiny_model, tmp_path, run_python):
    source = tiny_model("qwen2")
    done = run_python(SHARDED, source, tmp_path / "out", devices=8)
    assert done.returncode == 0, done.stderr
    before, after = state(source), state(tmp_path / "out")
    assert all(torch.equal(before[key], after[key]) for key in before)
