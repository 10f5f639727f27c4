"""A plan is what the run then compiles: the same bytes, from no weight at all."""

import math

import huggingface_hub
import jax
import pytest

from jaxtune import loop
from jaxtune.config import make_config
from jaxtune.errors import ConfigError, MeshError, ModelError
from jaxtune.mesh import make_mesh
from jaxtune.models.families import parse_config
from jaxtune.plan.command import model_settings, plan, with_words
from jaxtune.plan.compiling import compile_step
from jaxtune.plan.program import make_step
from jaxtune.plan.target import GENERIC, Target
from tests.plan.shapes import LARGE, config, step_of, target
from tests.runs import sections

FULL = {"method": "full"}
LORA = {"method": "lora", "rank": 4, "targets": "all-linear"}
CONFIGS = {
    "one-device": {"mesh": {"fsdp": 1}},
    "fsdp": {"tune": FULL, "mesh": {"fsdp": 8}},
    "virtual-tokens": {"tune": {"method": "prefix", "prefix_projection": True}, "mesh": {"fsdp": 2}},
    "hybrid": {"tune": FULL, "mesh": {"data": 2, "fsdp": 4}},
    "zero-1": {"tune": FULL, "mesh": {"fsdp": 4, "zero": 1}},
    "zero-2-micro-batches": {"tune": FULL, "mesh": {"fsdp": 2, "zero": 2}, "train": {"micro_batches": 4}},
    "tensor": {"tune": FULL, "mesh": {"fsdp": 2, "tensor": 2, "sequence_parallel": True}},
    "context": {"mesh": {"fsdp": 2, "context": 2}},
    "pipeline": {"tune": FULL, "mesh": {"fsdp": 2, "pipe": 2}, "train": {"micro_batches": 4}},
    "block-offload": {"tune": FULL, "mesh": {"fsdp": 4}, "memory": {"remat": "block", "offload": ["optimizer"]}},
    "adafactor-bfloat16": {
        "tune": FULL,
        "mesh": {"fsdp": 2},
        "optim": {"name": "adafactor"},
        "precision": {"params": "bfloat16"},
    },
}
SELDOM = {"fsdp", "hybrid", "zero-1"}  # others have all that is in them


@pytest.fixture
def compiled_by_the_run(monkeypatch):
    """What the loop compiles for its steps; the run ends there."""
    found = []

    def keep(*arguments, original=loop._compile):
        found.append(original(*arguments)[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_compile", keep)

    def run(config):
        with pytest.raises(KeyboardInterrupt):
            loop.train(config)
        return found.pop()

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name not in SELDOM else pytest.mark.thorough) for name in CONFIGS]
)
def test_a_plan_has_the_bytes_that_the_run_compiles(name, tiny_model, tmp_path, monkeypatch, compiled_by_the_run):
    settings = make_config(sections(tiny_model(), tmp_path, **CONFIGS[name]))
    devices = jax.devices()[: math.prod(settings.mesh.sizes.values())]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    theirs = compiled_by_the_run(settings).memory_analysis()

    (tmp_path / "data.json").unlink()  # a plan does not read it
    step = make_step(settings, model_settings(settings), make_mesh(settings.mesh, devices))
    made = compile_step(step, Target("cpu", devices, GENERIC))
    ours = made.memory
    assert ours.arguments + ours.host == theirs.argument_size_in_bytes
    assert ours.outputs + ours.host == theirs.output_size_in_bytes
    assert ours.temporaries == theirs.temp_size_in_bytes
    assert made.parameters.total() + made.optimizer.total() <= theirs.argument_size_in_bytes
    assert ours.temporaries >= made.gradients.total() * 0.5


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"optim": {"schedule": "wsd", "warmup": 3, "decay": 3}}, "3 and 3 steps of a run of 4"),
        ({"tune": {"method": "adalora", "tinit": 3, "tfinal": 3}}, "leave none of 4 steps"),
    ],
)
def test_what_is_longer_than_the_run_is_refused_as_the_run_does(section, words):
    step_of(config(**section))
    with pytest.raises(ConfigError, match=words):
        step_of(config(**section, train={"steps": 4}))


STREAM = {"streaming": True}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"tune": {"method": "prompt", "num_virtual_tokens": 63}}, "data.max_length 64: tune.num_virtual_tokens 63"),
        ({"data": STREAM, "train": {"steps": None}}, "data.streaming: nobody knows how many rows"),
        ({"data": STREAM, "eval": {"fraction": 0.1}}, "data.streaming: a share of rows"),
    ],
)
def test_what_no_data_can_mend_is_refused_without_looking_at_them(section, words, tiny_model, tmp_path):
    settings = make_config(sections(tiny_model(), tmp_path, **section))
    (tmp_path / "data.json").unlink()
    with pytest.raises(ConfigError, match=words):
        plan(settings, target(8), None)


def test_a_kernel_that_is_asked_for_by_name_is_refused_as_on_its_own_platform():
    step_of(config(memory={"attention": "cudnn"}))  # where auto is bfloat16
    refused = {
        "cuDNN computes in bfloat16": {"memory": {"attention": "cudnn"}, "precision": {"compute": "float32"}},
        "the ring has its own tiles": {"memory": {"attention": "tiles"}, "mesh": {"context": 2}},
    }
    for words, section in refused.items():
        with pytest.raises(ConfigError, match=words):
            step_of(config(**section))


def test_new_tokens_take_the_spare_rows_as_in_a_run(tiny_model, tmp_path, capsys):
    """The model has two rows more than the tokenizer has tokens."""
    model = tiny_model(vocab_size=386)
    new = {"method": "trainable_tokens", "new_tokens": ["<zz>"]}
    tree = sections(model, tmp_path, tune=new, mesh={"fsdp": 1, "tensor": 2})
    done = plan(make_config(tree), target(2), None)
    assert done.step.assembled.params["embed"]["weight"].size == 386
    assert "Warning" not in capsys.readouterr().out

    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(MeshError, match="not the 387"):
        plan(make_config(tree | {"model": {"path": str(tmp_path / "bare")}}), target(2), None)
    assert "tune.new_tokens: " in capsys.readouterr().out
    own = {"path": str(tmp_path / "bare"), "tokenizer": str(model)}
    assert with_words(make_config(tree | {"model": own})).tune.ids(386) == (384,)


def test_a_plan_for_this_machine_needs_no_place_for_temporary_files(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert compile_step(step_of(config()), target(1)).memory.peak > 0


def test_without_the_hub_it_is_said_that_config_json_is_enough(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    settings = make_config({"model": {"path": "owner/name"}, "data": {"path": "-"}})
    with pytest.raises(ModelError, match=r"hub cannot be used .* give its directory. A plan reads its config.json"):
        model_settings(settings)


def test_the_step_of_a_72b_model_is_made_and_traced_without_its_weights():
    before = sum(array.nbytes for array in jax.live_arrays())
    step = step_of(config(mesh={"fsdp": 4, "tensor": 2}), parse_config(LARGE))
    step.trace()
    assert sum(x.size for x in jax.tree.leaves(step.program.state["trainable"])) == 72_706_203_648
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 2**20
