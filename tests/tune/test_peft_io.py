"""Adapter directories: strict both ways, written whole or not at all, the same bytes for the same numbers."""

import json
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune import tune
from jaxtune.config import TuneSection, tune_section
from jaxtune.errors import AdapterError
from jaxtune.models.weights import leaves_with_path
from jaxtune.tune.peft_io import check_target, load_adapter, save_adapter
from jaxtune.tune.peft_tensors import are_one_weight
from tests.tune.support import peer_adapter, randomised, tuned

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")
SECTION = tune_section(
    rank=4, rank_pattern={"layers.1.self_attn.v_proj": 2}, modules_to_save=["norm"], bias="lora_only"
)
A, B = (f"base_model.model.model.layers.1.self_attn.q_proj.lora_{part}.weight" for part in "AB")
NORM = "base_model.model.model.norm.weight"
KINDS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def save(directory: Path, section: TuneSection = SECTION, **options):
    made = randomised(tuned(section))
    save_adapter(directory, made.section, made.model.weights, made.params, "base", **options)
    return made


def change(directory: Path, **changes) -> None:
    """Rewrite the tensors: a function of the array, or None to take it out."""
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        array = tensors.pop(name, None)
        if value is not None:
            tensors[name] = np.ascontiguousarray(value(array))
    save_file(tensors, file, {"format": "pt"})


def refused(directory: Path) -> str:
    with pytest.raises(AdapterError) as error:
        tuned(tune_section(adapter=str(directory)))
    return str(error.value)


def test_an_adapter_comes_back_bit_for_bit(tmp_path):
    made = save(tmp_path / "adapter")
    again = tuned(tune_section(adapter=str(tmp_path / "adapter")), seed=7)
    assert again.model.stacks == made.model.stacks and again.model.config == made.model.config
    assert jax.tree.structure(again.params) == jax.tree.structure(made.params)
    jax.tree.map(np.testing.assert_array_equal, again.params, made.params)
    assert again.mask == made.mask


def test_an_adapter_that_goes_on_is_written_as_it_was_read(tmp_path):
    save(tmp_path / "one")
    made = tuned(tune_section(adapter=str(tmp_path / "one")))
    save_adapter(tmp_path / "two", made.section, made.model.weights, made.params, "base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_unresolved_section_is_resolved_before_it_is_written(tmp_path):
    save(tmp_path / "one")
    section = tune_section(adapter=str(tmp_path / "one"))
    made = tuned(section)
    save_adapter(tmp_path / "two", section, made.model.weights, made.params)
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["r"] == 4


def test_a_resolved_section_is_written_without_the_directory_that_it_came_from(tmp_path):
    save(tmp_path / "one")
    made = tuned(tune_section(adapter=str(tmp_path / "one")))
    (tmp_path / "one").rename(tmp_path / "gone")
    save_adapter(tmp_path / "two", made.section, made.model.weights, made.params)
    assert load_adapter(tmp_path / "two")[0].rank == 4


def test_load_adapter_gives_settings_and_tensors(tmp_path):
    save(tmp_path / "adapter")
    section, tensors = load_adapter(tmp_path / "adapter")
    assert section.rank == 4 and section.adapter == str(tmp_path / "adapter")
    assert tensors.shapes[A] == (4, 32) and tensors.read(A).shape == (4, 32)


def test_the_same_numbers_give_the_same_bytes_and_the_files_are_peft_s(tmp_path):
    save(tmp_path / "one")
    save(tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    header = (tmp_path / "one" / "adapter_model.safetensors").read_bytes()[8:200]
    assert b'"__metadata__":{"format":"pt"}' in header


def test_an_adapter_that_is_there_is_replaced_and_nothing_else_is(tmp_path):
    save(tmp_path / "adapter")
    save(tmp_path / "adapter", tune_section(rank=2))
    assert load_adapter(tmp_path / "adapter")[0].rank == 2
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (tmp_path / "adapter" / "thesis.txt").write_text("mine")
    with pytest.raises(AdapterError, match=r"thesis.txt.*Nothing was written"):
        save(tmp_path / "adapter", tune_section(rank=3))
    assert load_adapter(tmp_path / "adapter")[0].rank == 2


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path / "adapter")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(AdapterError, match="adapter: cannot be written: disk full"):
        save(tmp_path / "adapter", tune_section(rank=2))
    assert load_adapter(tmp_path / "adapter")[0].rank == 4
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    monkeypatch.undo()
    save(tmp_path / "adapter", tune_section(rank=2))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_link_is_neither_written_through_nor_taken_away(tmp_path):
    save(tmp_path / "elsewhere")
    (tmp_path / "adapter").symlink_to("elsewhere")
    for write in (save, check_target):
        with pytest.raises(AdapterError, match="adapter: is in the way; give another directory, or remove it"):
            write(tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "elsewhere"]
    (tmp_path / "adapter").rename(tmp_path / ".elsewhere.replaced")  # as a version before left it
    save(tmp_path / "elsewhere", tune_section(rank=2))
    assert load_adapter(tmp_path / "elsewhere")[0].rank == 2
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_tokenizer_that_finds_no_room_leaves_what_was_there(tmp_path, tiny_tokenizer, monkeypatch):
    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library says it

    save(tmp_path / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_tokenizer), "save_pretrained", full)
        with pytest.raises(AdapterError, match=r"adapter: cannot be written: .*No space left on device"):
            save(tmp_path / "adapter", tokenizer=tiny_tokenizer)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(AdapterError, match=r"adapter: cannot be written: .*No such file or directory: '.*nowhere"):
        save(tmp_path / "adapter", tokenizer=tiny_tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert not (tmp_path / "adapter" / "tokenizer.json").exists()


def test_an_adapter_that_cannot_get_its_name_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path / "adapter")
    rename = Path.rename

    def refuse(path, target):
        if path.name.endswith(".partial"):
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(AdapterError, match="cannot be written: no"):
        save(tmp_path / "adapter", tune_section(rank=2))
    assert load_adapter(tmp_path / "adapter")[0].rank == 4
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_where_no_directory_can_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match=r"file: is in the way; give another directory"):
        save(tmp_path / "file")
    with pytest.raises(AdapterError, match=r"file/adapter: cannot be written: .*Not a directory"):
        save(tmp_path / "file" / "adapter")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({A: None}, ["missing tensors (1)", A]),
        ({NORM: None}, ["missing", NORM]),
        ({A: None, B: None}, ["missing tensors (2)", A, B]),
        (
            {"base_model.model.model.layers.1.mlp.up_proj.lora_A.weight": lambda _: np.ones((4, 32))},
            ["without a place"],
        ),
        (
            {A.replace("lora_A", "lora_C"): lambda _: np.ones(3)},
            ["without a place", "lora_C", f'did you mean "{A[:-8]}'],
        ),
        ({"prompt_embeddings": lambda _: np.ones((2, 2))}, ["without a place", "prompt_embeddings"]),
        ({A: lambda a: a[:3]}, ["another shape", f"{A} (3, 32), expected (4, 32)"]),
        ({A: lambda a: a.T}, ["another shape"]),
        ({NORM: lambda a: a[:-1]}, ["another shape", NORM]),
        ({B: lambda a: np.where(np.arange(a.size).reshape(a.shape) == 5, np.nan, a)}, [B, "not finite"]),
    ],
    ids=lambda value: str(list(value)),
)
def test_a_tensor_too_few_too_many_or_misshaped_is_named(tmp_path, changes, words):
    save(tmp_path)
    change(tmp_path, **changes)
    message = refused(tmp_path)
    assert all(word in message for word in words), message


def test_an_adapter_of_another_model_is_told_as_one(tmp_path):
    save(tmp_path)
    layer = {f"base_model.model.model.layers.7.self_attn.q_proj.lora_{part}.weight": np.ones for part in "AB"}
    change(tmp_path, **{name: lambda _: np.ones((4, 4)) for name in layer})
    message = refused(tmp_path)
    assert "without a place in the model (2)" in message and "did you mean" not in message
    assert message.endswith(
        "It has tensors for 4 layers, the model has places in 3\nadapter_config.json says that it was made for base"
    )


def test_names_are_checked_before_there_are_arrays(tmp_path):
    save(tmp_path)
    change(tmp_path, **{A: None})
    made = tuned(SECTION)
    shapes = {"embed": {"weight": jax.ShapeDtypeStruct((48, 32), np.float32)}}
    with pytest.raises(AdapterError, match="missing"):
        tune.apply(tune_section(adapter=str(tmp_path)), shapes, made.model.weights, 0)


def test_an_adapter_s_shapes_are_known_without_reading_it(tmp_path):
    made = save(tmp_path)
    base = tuned(tune_section(method="full"))
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), base.params)
    planned, mask = tune.apply(tune_section(adapter=str(tmp_path)), shapes, made.model.weights, 0)
    assert mask == made.mask
    found = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(planned)}
    expected = {
        jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(made.params)
    }
    assert found == expected


def test_an_adapter_for_a_model_of_another_size_is_refused(tmp_path):
    save(tmp_path)
    with pytest.raises(AdapterError, match="another shape"):
        tuned(tune_section(adapter=str(tmp_path)), "llama", tied=False, head_dim=16, attention_bias=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_in_16_bits_is_read_as_float32(tmp_path, dtype):
    made = save(tmp_path)
    kind = KINDS[dtype]
    change(
        tmp_path, **dict.fromkeys(load_file(tmp_path / "adapter_model.safetensors"), lambda array: array.astype(kind))
    )
    again = tuned(tune_section(adapter=str(tmp_path)))
    for (path, before), (_, after) in zip(leaves_with_path(made.params), leaves_with_path(again.params), strict=True):
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert y.dtype == np.float32, path
            np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-3)


def test_a_pickled_adapter_is_refused_by_name(tmp_path):
    save(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    message = refused(tmp_path)
    assert "adapter_model.bin" in message and "never opened" in message


def test_an_adapter_without_tensors_or_with_damaged_ones_is_named(tmp_path):
    save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "not a safetensors file" in refused(tmp_path)
    file.unlink()
    assert f"{file}: missing" in refused(tmp_path)


@pytest.mark.parametrize("name", ["", "adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_may_not_be_read_is_told(tmp_path, forbid, name):
    save(tmp_path / "adapter")
    forbid(tmp_path / "adapter" / name)
    assert refused(tmp_path / "adapter") == f"{tmp_path / 'adapter' / name}: cannot be read: Permission denied"


def test_tensors_behind_a_link_to_elsewhere_are_refused(tmp_path):
    save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert "link" in refused(tmp_path / "adapter")


class TestBaseWeightsInTheFile:
    """peft stores the weight under an adapter on the embedding or the head: it says what the adapter was made for."""

    def made_by_peft(self, directory: Path) -> str:
        peer_adapter(tune_section(targets=["lm_head", "embed_tokens"])).save_pretrained(directory)
        return "base_model.model.lm_head.base_layer.weight"

    def test_they_are_there_and_accepted_when_they_are_the_model_s(self, tmp_path):
        assert self.made_by_peft(tmp_path) in load_adapter(tmp_path)[1].shapes
        tuned(tune_section(adapter=str(tmp_path)))

    def test_others_are_refused(self, tmp_path):
        name = self.made_by_peft(tmp_path)
        change(tmp_path, **{name: lambda array: array + 1e-3})
        message = refused(tmp_path)
        assert name in message and "another base model" in message

    def test_one_that_is_not_finite_is_told_as_such(self, tmp_path):
        name = self.made_by_peft(tmp_path)
        change(tmp_path, **{name: lambda array: array * np.nan})
        assert f"{name} has numbers that are not finite" in refused(tmp_path)

    @pytest.mark.parametrize("stored", KINDS)
    @pytest.mark.parametrize("held", KINDS)
    @pytest.mark.parametrize("filed", KINDS)
    def test_they_may_be_rounded_to_the_type_in_which_either_side_holds_the_model(self, filed, held, stored):
        base = np.random.default_rng(0).normal(0, 0.02, (64, 64)).astype(KINDS[filed])
        other = (base.astype(np.float32) * 1.02).astype(KINDS[filed])
        mine = jax.numpy.asarray(base.astype(KINDS[held]))
        assert are_one_weight(jax.numpy.asarray(base.astype(KINDS[stored])), mine)
        assert not are_one_weight(jax.numpy.asarray(other.astype(KINDS[stored])), mine)

    def test_a_model_held_in_float16_by_peft_is_the_same_model(self, tmp_path):
        name = self.made_by_peft(tmp_path)
        change(tmp_path, **{name: lambda array: array.astype(np.float16)})
        tuned(tune_section(adapter=str(tmp_path)))

    def test_an_embedding_of_another_size_is_refused(self, tmp_path):
        name = self.made_by_peft(tmp_path)
        change(tmp_path, **{name: lambda array: np.concatenate([array, array[:2]])})
        assert f"{name} (50, 32), expected (48, 32)" in refused(tmp_path)

    @pytest.mark.parametrize("same", [True, False])
    def test_a_tied_head_stored_beside_an_embedding_is_the_embedding(self, tmp_path, same):
        save(tmp_path)
        embedding = np.asarray(tuned(tune_section(method="full")).params["embed"]["weight"])
        name = "base_model.model.lm_head.weight"
        change(tmp_path, **{name: lambda _: embedding if same else embedding * 2})
        if same:
            tuned(tune_section(adapter=str(tmp_path)))
        else:
            assert "another base model" in refused(tmp_path)

    def test_a_bias_stored_twice_must_be_the_same(self, tmp_path):
        peer_adapter(tune_section(bias="all", modules_to_save=["k_proj"])).save_pretrained(tmp_path)
        name = "base_model.model.model.layers.0.self_attn.k_proj.modules_to_save.bias"
        tuned(tune_section(adapter=str(tmp_path)))
        change(tmp_path, **{name: lambda array: array + 1})
        assert f"{name} and" in refused(tmp_path)
