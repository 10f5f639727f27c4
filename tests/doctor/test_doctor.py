"""`jaxtune doctor`: every check passes where all is well, and fails with what to do where its subject is broken."""

import io
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxtune import checkpoint, step
from jaxtune.config import make_config
from jaxtune.data import loader
from jaxtune.data.examples import Many
from jaxtune.doctor import attention, command, machine, run
from jaxtune.doctor.check import FAIL, PASS, SKIPPED, Check, NotHere, Problem, carry_out
from jaxtune.errors import DataError
from tests.runs import sections, write_config


def found(checks, name):
    """(status, text) of the check of this name."""
    [check] = [check for check in checks if check.name == name]
    outcome = carry_out(check)
    return outcome.status, outcome.text


@pytest.fixture
def of_machine(tmp_path):
    return lambda name: found(machine.checks(tmp_path / "runs" / "new"), name)


def test_a_healthy_machine_passes(of_machine, tmp_path):
    texts = {}
    for check in machine.checks(tmp_path / "runs" / "new"):
        status, texts[check.name] = of_machine(check.name)
        assert status == PASS, texts[check.name]
    assert f"jax {jax.__version__}" in texts["Python and packages"]
    assert texts["devices"].startswith("8 x cpu")
    assert "each of 8 devices" in texts["compiler"]
    assert texts["run directory"].startswith(f"{tmp_path}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_too_old_or_absent_is_named_with_what_is_needed(of_machine, monkeypatch):
    lines = ["jax<0.12,>=9.9", "nowhere-to-be-found>=1", 'torch>=99; extra == "test"']
    monkeypatch.setattr(machine, "requires", lambda _: lines)
    status, text = of_machine("Python and packages")
    assert status == FAIL and f"jax {jax.__version__} is installed; <0.12,>=9.9 is needed" in text
    assert "nowhere-to-be-found is not installed; >=1 is needed" in text and "torch" not in text
    monkeypatch.setattr(machine, "PYTHON", (9, 1))
    assert of_machine("Python and packages")[1].endswith("or later is needed")


def test_a_gpu_that_jax_does_not_see_is_a_failure_unless_cpus_were_asked_for(of_machine, monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(machine, "GPUS", (str(tmp_path / "nvidia0"),))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert of_machine("devices")[0] == PASS
    monkeypatch.delenv("JAX_PLATFORMS")
    assert of_machine("devices") == (FAIL, f"there is a GPU ({tmp_path / 'nvidia0'}), but JAX sees CPUs only")


def test_without_devices_what_needs_them_is_skipped_and_the_reason_is_told_once(monkeypatch, tmp_path):
    def none():
        raise RuntimeError("Unable to initialize backend 'tpu': no libtpu.so (set JAX_PLATFORMS='')")

    shown = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setattr(machine, "has_devices", machine.has_devices.__wrapped__)
    monkeypatch.setattr(command, "show", lambda outcomes, _: shown.extend(outcomes))
    assert not command.doctor(None)
    found = {outcome.check.name: (outcome.status, outcome.text) for outcome in shown}
    assert (found.pop("Python and packages")[0], found.pop("run directory")[0]) == (PASS, PASS)
    status, text = found.pop("devices")
    assert status == FAIL and text.startswith("JAX_PLATFORMS=tpu") and "no libtpu.so; unset what" in text
    assert "compiler" in found and set(found.values()) == {(SKIPPED, "JAX has to find devices first")}


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_device_that_multiplies_wrongly_is_found(of_machine, monkeypatch, wrong):
    multiply = jnp.matmul
    monkeypatch.setattr(jnp, "matmul", lambda *args, **kwargs: multiply(*args, **kwargs) * wrong)
    status, text = of_machine("compiler")
    assert status == FAIL and "a matmul on" in text


def test_a_directory_that_cannot_be_written_to_is_a_failure(of_machine, tmp_path):
    (tmp_path / "runs").write_text("in the way")
    for name in ("run directory", "checkpoints"):
        assert of_machine(name)[0] == FAIL


def test_a_checkpoint_that_comes_back_as_another_or_not_at_all_is_a_failure(of_machine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpointer, "restore", lambda *_: {"weights": jnp.zeros(1000), "step": jnp.int32(7)})
        assert of_machine("checkpoints") == (FAIL, "what was restored is not what was saved")
    with monkeypatch.context() as patch:
        patch.setattr(machine, "problems", lambda *_: [])
        assert of_machine("checkpoints") == (FAIL, "a flipped bit was not noticed")
    monkeypatch.setattr(checkpoint, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    status, text = of_machine("checkpoints")
    assert status == FAIL and "could not be saved: No space left" in text


def test_every_way_of_attention_is_the_formula():
    names = [check.name for check in attention.checks()]
    ways = ("at once", "in blocks", "XLA in tiles", "cuDNN", "splash", "ring", "ulysses")
    assert names == [f"attention, {way}" for way in ways]
    for name in names:
        status, text = found(attention.checks(), name)
        if "cuDNN" in name or "splash" in name:
            assert status == SKIPPED and text == f"{name.removeprefix('attention, ')} is not for a cpu"
        else:
            assert status == PASS and text.startswith(("output and gradients", "plain XLA's numbers")), text


@pytest.mark.parametrize("way", ["at once", "ring"])
def test_attention_that_forgets_the_segments_or_a_gradient_is_found(monkeypatch, way):
    blind = SimpleNamespace(
        attention=lambda q, k, v, *_: attention.formula(q, k, v, jnp.ones(q.shape[:2], jnp.int32)),
        spread_attention=lambda kind, q, k, v, _: run_ring(q, k, v, jnp.ones(q.shape[:2], jnp.int32)),
    )
    from jaxtune.parallel.ring import ring_attention as run_ring

    right = attention.attention, attention.spread_attention
    for name in ("attention", "spread_attention"):
        monkeypatch.setattr(attention, name, getattr(blind, name))
    status, text = found(attention.checks(), f"attention, {way}")
    assert status == FAIL and text.startswith("the output differs by")
    cut = [
        lambda *a, f=f, at=at: f(*a[:at], jax.lax.stop_gradient(a[at]), *a[at + 1 :]) for f, at in zip(right, (2, 3))
    ]
    for name, function in zip(("attention", "spread_attention"), cut):
        monkeypatch.setattr(attention, name, function)
    assert found(attention.checks(), f"attention, {way}")[1].startswith("dv differs by")


def test_with_one_device_the_ways_over_several_are_skipped(monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    assert found(attention.checks(), "attention, ring")[0] == SKIPPED


@pytest.fixture
def of_run(tiny_model, tmp_path):
    def examine(name, **more):
        tree = sections(tiny_model("qwen2"), tmp_path, **more)
        return found(run.Examined(make_config(tree)).checks(), name)

    return examine


def test_the_room_for_checkpoints_is_that_of_the_state_times_what_is_kept_and_one(of_run, monkeypatch):
    status, text = of_run("room for checkpoints", tune={"method": "full"})
    assert status == PASS and text.startswith("2 checkpoints and one being written take 0.0")
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: usage)
    status, text = of_run("room for checkpoints", tune={"method": "full"})
    assert status == FAIL and "; 0.0 GB are free in /" in text


@pytest.mark.parametrize(
    ("wrong", "says", "data"),
    [
        ({"mesh": {"tensor": 3}}, "8 devices are not divisible by 3", PASS),
        ({"train": {"batch_size": 6, "micro_batches": 4}}, "train.batch_size 6 is not divisible", FAIL),
        ({"model": {"path": "./nowhere"}}, "./nowhere: no such file", SKIPPED),
    ],
    ids=["mesh", "batch", "model"],
)
def test_a_model_or_a_mesh_that_does_not_fit_is_no_want_of_room(of_run, wrong, says, data):
    status, text = of_run("model and mesh", **wrong)
    assert status == FAIL and says in text
    assert of_run("room for checkpoints", **wrong) == (SKIPPED, "the model and the mesh have to be right first")
    assert of_run("data and labels", **wrong)[0] == data
    status, text = of_run("model and mesh")
    assert status == PASS and text.endswith(" on 8 x cpu")


def test_new_tokens_take_the_spare_rows_of_the_model(tiny_model, tmp_path):
    """It has two more than the tokenizer has tokens, so that the mesh goes on dividing them."""
    new = {"method": "trainable_tokens", "new_tokens": ["<zz>"]}
    tree = sections(tiny_model(vocab_size=386), tmp_path, tune=new, mesh={"tensor": 2})
    status, text = found(run.Examined(make_config(tree)).checks(), "model and mesh")
    assert status == PASS, text


def test_data_and_labels_are_counted_and_a_token_without_a_row_is_a_failure(of_run, monkeypatch):
    status, text = of_run("data and labels", train={"batch_size": 8})
    assert status == PASS and text.startswith("20 conversations in ") and "the largest token is " in text
    monkeypatch.setattr(Many, "largest_token", 384)
    assert of_run("data and labels") == (FAIL, "the data has the token 384, and the model's embedding 384 rows")
    status, text = of_run("data and labels", data={"columns": {"output": "answer"}})
    assert status == FAIL and 'no column "answer"' in text


@pytest.mark.parametrize(
    "tune",
    [
        {"method": "lora", "rank": 4, "dropout": 0.1, "targets": "all-linear"},
        {"method": "prompt", "num_virtual_tokens": 3},
        {"method": "full"},
    ],
    ids=lambda tune: tune["method"],
)
def test_packed_is_unpacked_and_micro_batches_are_the_whole(of_run, tune):
    status, text = of_run("packed = unpacked", tune=tune)
    assert status == PASS and "both ways" in text, text
    status, text = of_run("micro-batches = whole batch", tune=tune)
    assert status == PASS and text.startswith(f"{tune['method']}: loss "), text


def test_packing_that_goes_wrong_is_found(of_run, monkeypatch):
    batch = loader.Dataset.batch

    def blind(self, *args):
        found = batch(self, *args)
        return replace(found, segments=np.minimum(found.segments, 1))

    monkeypatch.setattr(loader.Dataset, "batch", blind)
    status, text = of_run("packed = unpacked")
    assert status == FAIL and text.startswith("the loss in packs differs by")


def test_micro_batches_that_are_averaged_each_by_itself_are_found(of_run, monkeypatch):
    join = step.accumulated

    def lost(function, batch, *how):
        found = join(function, batch, *how)
        return jax.tree.map(lambda x: x / 2, found) if batch["tokens"].shape[0] > 1 else found

    monkeypatch.setattr(step, "accumulated", lost)
    status, text = of_run("micro-batches = whole batch")
    assert status == FAIL and text.startswith("loss differs by 5.0e-01")


def test_a_method_that_needs_a_wider_model_is_skipped_with_the_reason(of_run):
    status, text = of_run("packed = unpacked", tune={"method": "oft", "oft_block_size": 48, "targets": ["q_proj"]})
    assert status == SKIPPED and "does not fit a model of width 64" in text


def raising(error):
    def find():
        raise error

    return Check("it", find, "mend it")


def test_whatever_a_check_raises_is_its_failure_in_a_line():
    endings = [Problem("bent"), NotHere("none"), DataError("x:1: bad"), ValueError("one\ntwo"), RuntimeError()]
    outcomes = [carry_out(raising(error)) for error in endings]
    assert [outcome.text for outcome in outcomes] == ["bent", "none", "x:1: bad", "ValueError: one", "RuntimeError: "]
    assert [outcome.status for outcome in outcomes] == [FAIL, SKIPPED, FAIL, FAIL, FAIL]
    with pytest.raises(KeyboardInterrupt):
        carry_out(raising(KeyboardInterrupt()))


def test_the_table_says_what_to_do_under_what_failed_alone(monkeypatch, capsys):
    text = io.StringIO()
    console = Console(file=text, width=60)
    command.show([carry_out(raising(Problem("bent"))), carry_out(Check("that", lambda: "sound", "leave it"))], console)
    shown = text.getvalue()
    assert "To do: mend it" in shown and "leave it" not in shown and "1 pass, 1 fail" in shown
    monkeypatch.setattr(command, "checks", lambda _: [raising(Problem("bent"))])
    assert not command.doctor(None)
    monkeypatch.setattr(command, "checks", lambda _: [Check("that", lambda: "sound", ""), raising(NotHere("none"))])
    assert command.doctor(None)


@pytest.mark.slow
def test_the_command_ends_with_1_where_something_is_wrong_and_prints_no_traceback(run_cli, tiny_model, tmp_path):
    tree = sections(tiny_model("qwen2"), tmp_path, data={"path": str(tmp_path / "none.json")})
    done = run_cli("doctor", "--config", write_config(tmp_path / "c.yaml", tree), module="jaxtune")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    # With one device there is no ring; without data, nothing to try the method on.
    assert "10 pass, 1 fail, 6 skipped" in done.stdout, done.stdout
    assert "none.json" in done.stdout and done.stdout.count("the data has to be right first") == 2
