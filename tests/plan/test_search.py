"""A search's answers fit, are legal and load as they are printed."""

from collections import Counter
from dataclasses import replace

import jax
import pytest

from jaxtune.config import AXES, parse_yaml
from jaxtune.errors import MeshError
from jaxtune.plan.compiling import Plan
from jaxtune.plan.memory import Compiled
from jaxtune.plan.search import meshes, pasteable, search
from tests.plan.shapes import SMALL, config, step_of, target

LONG = 10**6


def test_every_mesh_has_all_devices_and_none_comes_twice():
    found = [tuple(sizes.values()) for sizes in meshes(8, LONG)]
    assert len(found) == len(set(found)) == 35  # ways to write 8 = 2^3 as a product of five
    assert all(jax.numpy.prod(jax.numpy.array(sizes)) == 8 for sizes in found)
    short = list(meshes(8, 512))
    assert all(sizes["context"] == 1 for sizes in short)


@pytest.fixture(scope="module")
def loose():
    """(what a search finds with plenty of memory, what it told of on the way)."""
    told = []
    return search(config(), SMALL, target(4), 10**7, lambda done, text: told.append(text)), told


def test_a_search_gives_plans_that_fit_on_different_meshes(loose):
    found, told = loose
    assert 1 <= len(found.plans) <= 3 and found.compiled == len(told)
    assert all(plan.memory.peak <= 10**7 for plan in found.plans)
    assert len({tuple(plan.step.mesh.shape.items()) for plan in found.plans}) == len(found.plans)
    assert found.seconds == sorted(found.seconds)
    assert all(plan.step.config.train.batch_size == 16 for plan in found.plans)


def test_a_smaller_budget_finds_something_smaller(loose):
    peak = loose[0].plans[0].memory.peak
    tight = search(config(), SMALL, target(4), int(0.8 * peak), lambda *_: None)
    assert tight.plans and tight.plans[0].memory.peak < peak


def test_where_nothing_fits_the_smallest_is_shown_after_a_few():
    found = search(config(), SMALL, target(2), 1000, lambda *_: None)
    assert found.plans == [] and found.nearest is not None
    assert found.compiled == 3


def test_what_is_printed_loads_back_to_the_same_settings():
    settings = config(
        mesh={"pipe": 2, "fsdp": 2, "tensor": 2, "zero": 1, "sequence_parallel": True},
        memory={"remat": "block", "offload": ["optimizer"]},
        train={"batch_size": 16, "micro_batches": 4},
    )
    again = config(**parse_yaml(pasteable(settings, settings), "pasted"))
    assert (again.mesh, again.memory, again.train) == (settings.mesh, settings.memory, settings.train)
    step_of(again)


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"fsdp": 2, "pipe": 2, "zero": 1, "schedule": "gpipe"}])
def test_what_is_printed_gives_the_layout_over_a_configuration_with_another(mesh):
    mine = {
        "mesh": {"fsdp": 1, "tensor": 2, "sequence_parallel": True, "context": 2, "context_attention": "ulysses"},
        "memory": {"remat": "none", "offload": ["optimizer"], "attention": "xla"},
    }
    chosen = config(mesh=mesh, memory={"attention": "xla"})
    printed = parse_yaml(pasteable(chosen, config(**mine)), "pasted")
    by_key = {name: {**mine.get(name, {}), **keys} for name, keys in printed.items()}
    for pasted in (by_key, {**mine, **printed}):
        again = config(**pasted)
        assert (again.mesh, again.memory) == (chosen.mesh, chosen.memory)


def test_a_batch_that_no_mesh_can_share_is_refused():
    odd = replace(SMALL, num_heads=3, num_kv_heads=3, num_layers=1)
    with pytest.raises(MeshError, match=r"no mesh of 8 devices fits this model and train.batch_size 1"):
        search(config(train={"batch_size": 1}), odd, target(8), 10**9, lambda *_: None)


@pytest.fixture
def uncompiled(monkeypatch):
    """A search takes every step for one that fits, and compiles none."""
    compiled = Compiled(arguments=10, outputs=5, aliased=5, temporaries=10)

    def without(step, _):
        return Plan(step, compiled, Counter(), Counter(), Counter(), 1e6, 1e6, [])

    monkeypatch.setattr("jaxtune.plan.search.compile_step", without)


def test_a_mesh_that_the_tuning_method_does_not_go_over_is_passed_over(uncompiled):
    blocks = {"method": "oft", "targets": ["down_proj"], "oft_block_size": 128}  # over two devices it has 64 inputs
    found = search(config(tune=blocks, train={"batch_size": 3}), SMALL, target(2), 10**9, lambda *_: None)
    assert found.plans and all(plan.step.mesh.shape["tensor"] == 1 for plan in found.plans)


def test_a_mesh_over_which_a_kernel_does_not_go_is_passed_over(uncompiled):
    odd = replace(SMALL, num_heads=3, num_kv_heads=3, num_layers=1)  # data, fsdp or context may be 2
    asked = config(memory={"attention": "tiles"}, data={"max_length": 8192}, train={"batch_size": 2})
    found = search(asked, odd, target(2), 10**9, lambda *_: None)
    assert len(found.plans) == 2 and all(plan.step.mesh.shape["context"] == 1 for plan in found.plans)


def test_where_the_tuning_method_goes_over_none_its_refusal_is_told(uncompiled):
    odd = replace(SMALL, num_layers=1)
    blocks = {"method": "oft", "targets": ["down_proj"], "oft_block_size": 128}
    with pytest.raises(MeshError, match=r"mesh\.tensor 2 leaves 64 inputs"):
        search(config(tune=blocks, train={"batch_size": 1}), odd, target(2), 10**9, lambda *_: None)


def test_axes_are_in_the_order_of_the_mesh():
    assert all(tuple(sizes) == AXES for sizes in meshes(4, LONG))
