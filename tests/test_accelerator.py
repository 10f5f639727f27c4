"""XLA's flags are set where there are several GPUs, and never over the user's own."""

import pytest

from jaxtune.accelerator import GPU_FLAGS, set_flags

SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler"


@pytest.fixture
def machine(tmp_path):
    """machine(gpus) -> its directory of device files."""

    def make(gpus):
        (tmp_path / "nvidiactl").touch()
        for number in range(gpus):
            (tmp_path / f"nvidia{number}").touch()
        return tmp_path

    return make


@pytest.mark.parametrize("given", ["", "--xla_dump_to=/tmp/x"])
def test_several_gpus_get_the_flags_behind_the_users_own(machine, given):
    environment = {"XLA_FLAGS": given} if given else {}
    assert set_flags(environment, machine(2)) == " ".join(GPU_FLAGS)
    assert environment["XLA_FLAGS"] == f"{given} {' '.join(GPU_FLAGS)}".strip()


def test_a_flag_that_the_user_has_set_is_left_as_it_is(machine):
    environment = {"XLA_FLAGS": f"{SCHEDULER}=false"}
    assert set_flags(environment, machine(2)) == ""
    assert environment["XLA_FLAGS"] == f"{SCHEDULER}=false"
    longer = {"XLA_FLAGS": f"{SCHEDULER}_and_more=1"}
    assert set_flags(longer, machine(2)).startswith(SCHEDULER)


@pytest.mark.parametrize(
    ("gpus", "environment", "jaxlib"),
    [(1, {}, None), (0, {}, None), (8, {"JAX_PLATFORMS": "cpu"}, None), (8, {}, "0.12.0")],
)
def test_nothing_is_set_without_several_gpus_or_with_a_jaxlib_that_was_not_tried(machine, gpus, environment, jaxlib):
    assert set_flags(environment, machine(gpus), jaxlib) == ""
    assert "XLA_FLAGS" not in environment


def test_the_installed_jaxlib_takes_every_flag(run_python):
    done = run_python("import jax; print(jax.devices()[0].platform)", env={"XLA_FLAGS": " ".join(GPU_FLAGS)})
    assert done.stdout.strip() == "cpu", done.stderr
