"""What Ulysses exchanges, and with which heads it can."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import pytest

from jaxtune.attention_kernel import choose, ring_of
from jaxtune.errors import MeshError
from jaxtune.models import kernels, tiled
from jaxtune.parallel.context import spread_attention
from jaxtune.parallel.ulysses import check_heads, ulysses_attention
from tests.parallel.support import PACKED, SPLIT, assert_same, draw, on_parts, split, whole, with_gradients


def test_heads_are_exchanged_for_sequence_and_only_segments_are_gathered():
    run = on_parts(partial(with_gradients, ulysses_attention), 4, (SPLIT,) * 5)
    text = run.lower(*draw(), PACKED).compile().as_text()
    assert "all-to-all(" in text
    gathered = re.findall(r"= (\S+) all-gather(?:-start)?\(", text)
    assert gathered and all(kind.startswith("s32[") for kind in gathered)
    assert "collective-permute(" not in text and "all-reduce(" not in text


@pytest.mark.parametrize(
    ("parts", "heads", "kv_heads"),
    [
        pytest.param(8, 8, 2, id="each repeated until there is one for each device"),
        pytest.param(2, 12, 3, id="to the least common multiple"),
        pytest.param(2, 8, 4, id="not repeated"),
    ],
)
def test_key_heads_are_repeated_as_far_as_needed(parts, heads, kv_heads):
    inputs = *draw(heads=heads, kv_heads=kv_heads), PACKED
    assert_same(split(ulysses_attention, parts, *inputs), whole(*inputs))


def test_heads_that_cannot_be_shared_are_refused_with_what_would_fit():
    message = "mesh.context = 4 does not divide the 14 query heads .* may be 1, 2, 7, 14, or .* ring"
    with pytest.raises(MeshError, match=message):
        check_heads(14, 4)
    with pytest.raises(MeshError, match="does not divide the 6 query heads"):
        split(ulysses_attention, 4, *draw(heads=6), PACKED)
    check_heads(14, 7)


def test_between_the_exchanges_a_kernel_has_whole_sequences_of_its_heads(monkeypatch):
    monkeypatch.setattr(tiled, "BLOCK", 16)
    monkeypatch.setattr(kernels, "BLOCK", 16)
    attend = partial(spread_attention, "ulysses", kernel="tiles")
    for window in (None, 13):
        windowed = partial(attend, window=window)
        assert_same(split(windowed, 2, *draw(), PACKED), whole(*draw(), PACKED, window))
    named = re.findall(r"name\[name=attended\]", str(jax.make_jaxpr(on_parts(attend, 2))(*draw()[:3], PACKED)))
    assert len(named) == 2  # its output, once, and the logarithm of the sums


def test_a_run_takes_the_platforms_kernel_for_ulysses_and_none_for_the_ring():
    def kernel(**mesh):
        config = SimpleNamespace(mesh=SimpleNamespace(**mesh))
        mesh = SimpleNamespace(shape={"context": 2})
        return choose("auto", SimpleNamespace(windows=()), "float32", "cpu", ring_of(config, mesh))[0]

    assert (kernel(context_attention="ulysses"), kernel(context_attention="ring")) == ("tiles", "xla")
