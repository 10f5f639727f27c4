"""When memory runs out there is one message, with what to lower, and the run can go on."""

import jax
import pytest
from typer.testing import CliRunner

import jaxtune.loop as loop
from jaxtune import cli
from jaxtune.checkpoint import latest_valid
from jaxtune.config import make_config
from jaxtune.out_of_memory import remedies
from tests.runs import sections, write_config

XLA = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.\n\tat 0x7f"


def call(config):
    return CliRunner().invoke(cli.app, ["train", "--config", str(config)])


def raises(error):
    def fail(*_, **__):
        raise error

    return fail


def fails_at(step):
    """`prepare` with a step that has no room from this one on."""
    prepare = loop.prepare

    def prepared(*arguments):
        job = prepare(*arguments)
        run = job.train_step

        def train_step(state, frozen, batch, number):
            if int(number) == step:
                raise jax.errors.JaxRuntimeError(XLA)
            return run(state, frozen, batch, number)

        job.train_step = train_step
        return job

    return prepared


@pytest.fixture
def config(tiny_model, tmp_path):
    return write_config(tmp_path / "c.yaml", sections(tiny_model("qwen2"), tmp_path, steps=6))


def told(done):
    """The message of a run that ended for want of memory."""
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.output
    assert "Traceback" not in done.output
    return done.output


def test_in_a_step_it_says_what_a_step_needs_and_what_to_lower_and_the_run_goes_on(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "prepare", fails_at(5))
        message = told(call(config))
    assert (
        "Out of memory in training: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184" in message
    )
    assert "0x7f" not in message
    assert "a step needs 0.0" in message and "GB on each device" in message
    for key in ("train.micro_batches: 2", "memory.remat: full", "memory.offload", "train.batch_size below 8"):
        assert key in message
    assert latest_valid(tmp_path / "run" / "checkpoints") == 4
    done = call(config)
    assert done.exit_code == 0 and "from the checkpoint of step 4" in done.output


@pytest.mark.parametrize(
    ("where", "error"),
    [("_compile", jax.errors.JaxRuntimeError(XLA)), ("assemble", MemoryError())],
    ids=["the compiler", "the host"],
)
def test_before_the_first_step_it_is_told_too(config, monkeypatch, where, error):
    monkeypatch.setattr(loop, where, raises(error))
    assert "Out of memory before the first step: " in told(call(config))


def test_another_error_of_xla_is_not_taken_for_it(config, monkeypatch):
    monkeypatch.setattr(loop, "_compile", raises(jax.errors.JaxRuntimeError("INTERNAL: a bug")))
    assert isinstance(call(config).exception, jax.errors.JaxRuntimeError)


def listed(**more):
    tree = {"model": {"path": "m"}, "data": {"path": "d"}, **more}
    return "\n".join(remedies(make_config(tree)))


def test_only_what_can_still_be_lowered_is_named():
    usual = listed()
    assert "tune.method" not in usual and "train.micro_batches: 2 (now 1" in usual and "model.quantize" in usual
    assert "tune.method: lora" in listed(tune={"method": "full"})
    least = listed(
        train={"batch_size": 1},
        memory={"remat": "full", "offload": ["optimizer", "params"]},
        precision={"params": "bfloat16", "compute": "bfloat16"},
        optim={"name": "lion"},
        model={"path": "m", "quantize": "nf4"},
    )
    assert least.splitlines() == [
        "data.max_length below 1024 (in a new run)",
        "more devices in mesh, with fsdp or tensor",
    ]
