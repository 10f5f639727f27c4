"""The prediction of how a step scales: bytes against closed forms, and the arithmetic that makes seconds of them."""

import json
import math
from dataclasses import replace

import jax
import pytest

from tests.plan.shapes import SMALL, config
from tools import scaling as tool
from tools.scaling_count import Count, Traffic, count_step, members

RATES = tool.Rates(flops=100.0, near=40.0, hop=20.0, far=5.0)
TRAFFIC = Traffic("all-gather", ("fsdp",), "bf16", 1, sent=80, devices=8, members=8)
COUNT = Count("made up", 8, {"fsdp": 8}, flops=500.0, alone=400.0, state=0, bubble=0.0, traffic=())


def counted(**mesh):
    """One step of two rows for each device."""
    devices = math.prod(size for size in mesh.values() if not isinstance(size, bool))
    settings = config(
        mesh={"fsdp": 1, **mesh},
        train={"batch_size": 2 * devices},
        memory={"remat": "block"},
        precision={"compute": "bfloat16"},
    )
    return count_step("small", settings, SMALL, jax.devices()[:devices])


def sent(count, kind, dtype=""):
    return sum(row.sent for row in count.traffic if row.kind == kind and dtype in row.dtype)


def layer():
    """Numbers of the matrices of one layer: what fsdp cuts."""
    return SMALL.hidden_size * (
        2 * (SMALL.num_heads + SMALL.num_kv_heads) * SMALL.head_dim + 3 * SMALL.intermediate_size
    )


def test_data_parallelism_sends_all_gradients_round_a_ring_and_doubling_it_adds_what_the_ring_says():
    from jaxtune.mesh import make_mesh
    from jaxtune.plan.program import make_step

    one = config()
    step = make_step(one, SMALL, make_mesh(one.mesh, jax.devices()[:1]))
    gradients = step.gradients.total()
    four, eight = (sent(counted(data=devices), "all-reduce") for devices in (4, 8))
    assert four == pytest.approx(2 * 3 / 4 * gradients, rel=1e-3)
    assert eight == pytest.approx(2 * 7 / 8 * gradients, rel=1e-3)


def test_fsdp_gathers_a_layers_weights_twice_in_bfloat16_and_scatters_all_gradients_once_in_float32():
    count = counted(fsdp=8)
    layers, head = SMALL.num_layers * layer(), SMALL.vocab_size * SMALL.hidden_size
    assert sent(count, "all-gather", "bf16") == 7 / 8 * 2 * (2 * layers + head)
    assert sent(count, "reduce-scatter") == 7 / 8 * 4 * (layers + 2 * head)


def test_tensor_parallelism_sends_a_layers_activations_as_megatron_does_and_the_recomputation_again():
    """Gathers: two forward, two again, two of gradients; scatters: one less, for a layer's last is not needed again.
    Both: two more at the embedding and the head."""
    count = counted(tensor=8, sequence_parallel=True)
    stream = 16 * 64 * SMALL.hidden_size * 2  # 16 rows of 64 tokens, bfloat16
    assert sent(count, "all-gather") == (6 * SMALL.num_layers + 2) * 7 / 8 * stream
    assert sent(count, "reduce-scatter") == (5 * SMALL.num_layers + 2) * 7 / 8 * stream


def test_efficiency_lies_between_nothing_overlapped_and_all_that_can_be():
    fsdp, tensor = TRAFFIC, replace(TRAFFIC, axes=("tensor",))  # 2 s each, beside 5 s of 4 that one alone would take
    assert tool.efficiency(COUNT, RATES) == (4 / 5, 4 / 5)
    assert tool.efficiency(replace(COUNT, traffic=(fsdp,)), RATES) == (4 / 7, 4 / 5)
    assert tool.efficiency(replace(COUNT, traffic=(tensor,)), RATES) == (4 / 7, 4 / 7)
    assert tool.efficiency(replace(COUNT, traffic=(fsdp,) * 4), RATES) == (4 / 13, 4 / 8)
    assert tool.efficiency(replace(COUNT, bubble=0.5, traffic=(fsdp,)), RATES) == (4 / 12, 4 / 10)


def test_a_ring_between_machines_uses_the_ports_of_its_members_and_a_permutation_one():
    assert tool.seconds(TRAFFIC, RATES) == 80 / 40
    assert tool.seconds(replace(TRAFFIC, devices=16, members=2), RATES) == 80 / 10
    assert tool.seconds(replace(TRAFFIC, devices=128, members=16), RATES) == 80 / 40
    assert tool.seconds(replace(TRAFFIC, kind="collective-permute"), RATES) == 80 / 20
    assert tool.seconds(replace(TRAFFIC, kind="collective-permute", devices=16, members=8), RATES) == 80 / 5


def test_the_last_axis_of_a_mesh_fills_a_machine_first():
    mesh = {"pipe": 4, "fsdp": 4, "tensor": 4}
    assert [members(mesh, (axis,)) for axis in mesh] == [1, 2, 4]
    assert members(mesh, ("fsdp", "tensor")) == 8


def test_every_way_is_a_legal_step_with_the_same_tokens_for_each_device():
    for way in tool.WAYS:
        for devices in tool.SIZES:
            settings = tool.settings(way, devices)
            assert settings.train.batch_size * settings.data.max_length == tool.TOKENS * devices


def test_the_pages_table_is_made_of_the_committed_counts(repository):
    counts = [Count.of(row) for row in json.loads((repository / "docs" / "scaling.json").read_text(encoding="utf-8"))]
    assert [(one.way, one.devices) for one in counts] == [(way, size) for way in tool.WAYS for size in tool.SIZES]
    page = (repository / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.split(tool.BEGIN)[1].split(tool.END)[0].strip().splitlines() == tool.table(counts)
    picture = (repository / "docs" / "scaling.svg").read_text(encoding="utf-8")
    assert all(f">{text}<" in picture for text in (*tool.WAYS, *(f"{card}: efficiency" for card in tool.CARDS)))
