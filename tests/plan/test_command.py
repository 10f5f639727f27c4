"""`jaxtune plan` as a user calls it."""

import json
from importlib.util import find_spec

import jax
import pytest

from jaxtune.config import load_config
from jaxtune.errors import MeshError, UserError
from jaxtune.plan.compiling import REFUSED
from jaxtune.plan.report import operations, size
from jaxtune.plan.target import choose, parse_bytes
from tests.plan.shapes import LARGE


@pytest.fixture
def write(tmp_path):
    """write(hf settings, **sections) -> the path of a YAML file; the model is a config.json and nothing else."""

    def make(hf, **sections):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(json.dumps(hf))
        tree = {"model": {"path": str(tmp_path / "model")}, "tune": {"method": "full"}, "train": {"batch_size": 64}}
        tree["data"] = {"path": "nowhere.json", "max_length": 1024}
        file = tmp_path / "plan.yaml"
        file.write_text(json.dumps({**tree, **sections}))
        return file

    return make


@pytest.fixture
def plan(run_cli):
    def run(*arguments, **options):
        return run_cli("plan", *arguments, module="jaxtune", **options)

    return run


SMALL = {**LARGE, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 2}
TPU = {"timeout": 1200}  # libtpu compiles for minutes where others use the cores


@pytest.mark.slow
def test_a_72b_model_is_planned_for_64_devices_without_its_weights(write, plan):
    done = plan("--config", write(LARGE, mesh={"fsdp": 8, "tensor": 8}), "--devices", 64, "--budget", "80GB")
    assert done.returncode == 0, done.stderr
    # 72.7 billion parameters in float32 on 64 devices, and twice as much for AdamW's moments
    for row in ("parameters", "optimiser", "gradients", "activations and temporaries", "in all"):
        assert row in done.stdout
    assert "4.55 GB" in done.stdout and "9.10 GB" in done.stdout
    assert "of 80.00 GB" in done.stdout
    assert "all-gather      fsdp" in done.stdout and "all-reduce      tensor" in done.stdout


def test_the_report_names_memory_operations_and_transfers(write, plan):
    done = plan("--config", write(SMALL, mesh={"fsdp": 4}), "--devices", 4, "--budget", "1MB")
    assert done.returncode == 0, done.stderr
    assert "One step on 4 x cpu (fsdp 4): 64 rows of 1,024 tokens" in done.stdout
    assert "Does not fit" in done.stdout
    assert "asked for by the model" in done.stdout
    assert "reduce-scatter" in done.stdout


def test_offloaded_bytes_have_a_column_of_their_own(write, plan):
    file = write(SMALL, mesh={"fsdp": 2}, memory={"offload": ["optimizer"]})
    done = plan("--config", file, "--devices", 2)
    assert done.returncode == 0, done.stderr
    optimizer = next(line for line in done.stdout.splitlines() if line.startswith("optimiser"))
    assert optimizer.split()[1:3] == ["0", "B"] and optimizer.split()[-1] in ("KB", "MB")


def test_search_prints_yaml_that_a_run_takes(write, plan, tmp_path):
    file = write(SMALL)
    done = plan("--config", file, "--devices", 4, "--budget", "1GB", "--search")
    assert done.returncode == 0, done.stderr
    block = done.stdout.partition("# 1: ")[2].split("\n\n")[0].split("\n", 1)[1]
    pasted = tmp_path / "pasted.yaml"
    base = json.loads(file.read_text())
    pasted.write_text(f"model: {json.dumps(base['model'])}\ndata: {json.dumps(base['data'])}\n{block}")
    assert load_config(pasted).train.batch_size == 64


def test_a_search_without_a_budget_is_refused(write, plan):
    done = plan("--config", write(SMALL), "--devices", 2, "--search")
    assert done.returncode == 2 and "--search needs --budget" in done.stderr


def test_a_mesh_that_does_not_fit_is_refused_as_in_a_run(write, plan):
    done = plan("--config", write(SMALL, mesh={"fsdp": 3, "data": 1}), "--devices", 4)
    assert done.returncode == 2 and "needs 3 devices, found 4" in done.stderr


@pytest.mark.real
@pytest.mark.slow
def test_a_tpu_slice_is_compiled_for_without_a_tpu(write, plan, libtpu):
    done = plan("--config", write(SMALL, mesh={"fsdp": 2, "tensor": 2}), "--target", "v5e:2x2", **TPU, env=libtpu)
    assert done.returncode == 0, done.stderr
    assert "4 x v5e:2x2 (fsdp 2, tensor 2)" in done.stdout and "bf16" in done.stdout
    assert done.stderr == ""  # libtpu's complaints are about the lack of a TPU


@pytest.mark.real
@pytest.mark.slow
def test_what_a_tpu_refuses_is_reported_with_its_numbers(write, plan, libtpu):
    large = {**LARGE, "num_hidden_layers": 8}
    done = plan("--config", write(large, mesh={"fsdp": 4}), "--target", "v5e:2x2", **TPU, env=libtpu)
    assert done.returncode == 0, done.stderr
    assert "The compiler refuses" in done.stdout and "all-gather" in done.stdout


LACKS_HBM = "Ran out of memory on HBM, the total memory required for HLO temporaries (63.62G) exceeds available HBM"


@pytest.mark.parametrize(
    ("message", "is_known"),
    [
        (f"RESOURCE_EXHAUSTED: {LACKS_HBM} (15.75G).", True),  # libtpu 0.0.42.1
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom", True),  # as others say it
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.", True),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", False),  # a kernel's, not the step's
        ("INTERNAL: something else", False),
    ],
)
def test_what_libtpu_says_of_a_step_that_does_not_fit(message, is_known):
    assert bool(REFUSED.search(message)) == is_known


@pytest.mark.real
def test_a_slice_that_does_not_exist_is_refused(write, plan, libtpu):
    done = plan("--config", write(SMALL), "--target", "v5e:3x3", env=libtpu)
    assert done.returncode == 2 and "--target v5e:3x3" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_what_to_install_is_said():
    with pytest.raises(UserError, match=r'pip install "jaxtune\[tpu\]"'):
        choose("v5e:2x2", None)


def test_as_many_devices_are_pretended_as_are_asked_for_whatever_the_environment_says(run_python):
    code = 'from jaxtune.plan.target import choose; print(len(choose("cpu", 4).devices))'
    for env in ({"JAX_NUM_CPU_DEVICES": "2"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}):
        assert run_python(code, env=env).stdout == "4\n"


def test_targets_are_refused_by_name():
    with pytest.raises(MeshError, match="allowed: cpu, or a TPU slice of v4, v5e, v5p, v6e"):
        choose("h100:8", None)
    jax.devices()  # it is started now
    with pytest.raises(MeshError, match="start Python with JAX_NUM_CPU_DEVICES=2048, or"):
        choose("cpu", 2048)
    with pytest.raises(MeshError, match="--devices 2049: a CPU pretends to have 2048 at most; plan for fewer"):
        choose("cpu", 2049)


@pytest.mark.parametrize(
    ("text", "value"), [("80GB", 80 * 10**9), ("16 GiB", 16 * 2**30), ("80", 80 * 10**9), ("1.5tb", 1.5e12)]
)
def test_a_budget_is_read_in_every_unit(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0GB", "80 parsecs"])
def test_a_budget_that_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="expected a size such as 80GB"):
        parse_bytes(text)


def test_numbers_are_written_with_their_unit():
    assert [size(n) for n in (0, 999, 1e3, 2.5e9)] == ["0 B", "999 B", "1.00 KB", "2.50 GB"]
    assert [operations(n) for n in (5, 3e12)] == ["5 FLOP", "3.00 TFLOP"]
