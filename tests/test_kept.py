"""Programs for several CPU devices are neither kept on disk nor taken from there; all others are."""

import os
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import jaxtune
from jaxtune.kept import ZSTD, compiled_anew, keep_programs
from tests.programs import LORA, Stepper
from tests.runs import sections

AXES = ("data", "tensor")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The directory, empty, that JAX keeps every program in."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def mesh(devices: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(-1, 1), AXES)


def compile_one(name: str) -> None:
    def program(x):
        return jnp.sin(x) + len(name)

    program.__name__ = name
    jax.jit(program)(jnp.ones(3)).block_until_ready()


def names(directory) -> set[str]:
    return {path.name.split("-")[0].removeprefix("jit_") for path in directory.iterdir()} & {"first", "second", "third"}


def test_only_what_is_for_one_device_is_kept(kept):
    with compiled_anew(mesh(1)):
        compile_one("first")
    with compiled_anew(mesh(2)):
        compile_one("second")
    assert names(kept) == {"first"}
    compile_one("third")
    assert names(kept) == {"first", "third"}


def test_an_error_does_not_leave_it_off(kept):
    with pytest.raises(ZeroDivisionError), compiled_anew(mesh(2)):
        raise ZeroDivisionError
    compile_one("third")
    assert names(kept) == {"third"}


def test_where_nothing_is_kept_nothing_is_changed(kept):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with compiled_anew(mesh(2)):
            pass
        assert not jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_run_on_several_devices_keeps_neither_its_step_nor_its_evaluation(kept, tiny_model, tmp_path):
    home = tmp_path / "home"
    jaxtune.train(sections(tiny_model("qwen2"), home, steps=2, eval={"fraction": 0.4}))
    model = jaxtune.load_model(home / "run", mesh={"fsdp": 8})
    model.logits(np.zeros((8, 4), np.int32))
    model.generate("x", max_new_tokens=2)
    programs = {path.name.split("-")[0] for path in kept.iterdir()}
    assert programs and not programs & {"jit_train_step", "jit_eval_step", "jit__all_logits", "jit__first", "jit__more"}


def test_a_step_of_one_device_is_kept(kept):
    _ = Stepper(tune=LORA).compiled
    assert "jit_train_step" in {path.name.split("-")[0] for path in kept.iterdir()}


def test_a_pipeline_s_step_runs_again_as_it_ran_first(kept):
    """Read from the disk, this one waits for ever in most of its starts."""
    options = {"mesh": {"fsdp": 1, "tensor": 2, "context": 2, "pipe": 2}, "train": {"micro_batches": 4}}
    first, again = (Stepper(tune=LORA, **options).run(2) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("left", [0, 100])
def test_a_program_that_was_cut_off_is_made_again_and_kept(kept, monkeypatch, capsys, left):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(kept))
    compile_one("first")
    (entry,) = kept.glob("jit_first-*")
    whole = entry.read_bytes()
    if whole.startswith(ZSTD):
        pytest.skip("what zstandard has packed is left to JAX")
    entry.write_bytes(whole[:left])
    with warnings.catch_warnings(record=True) as raw:
        warnings.simplefilter("always")
        keep_programs()
        for _ in range(2):
            compile_one("first")
        warnings.warn("another", stacklevel=1)
    assert capsys.readouterr().out == f"Warning: {entry}: this compiled program was cut off; it is made again\n"
    assert zlib.decompress(entry.read_bytes()) and [str(one.message) for one in raw] == ["another"]


def test_without_a_home_none_are_kept(monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where HOME is not set and nobody knows the user
    keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_programs_are_kept_at_home_unless_the_environment_says_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "jaxtune" / "xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/else/where")
    keep_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/else/where"
