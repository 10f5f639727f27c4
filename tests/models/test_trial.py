"""A fused kernel is tried on packed rows before a run; what is wrong with it is said, and plain XLA taken."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import attention_kernel
from jaxtune.config import make_config
from jaxtune.errors import ConfigError
from jaxtune.mesh import single_device_mesh
from jaxtune.models import trial
from jaxtune.models.attention import attention
from jaxtune.models.trial import Disagreement, compare
from jaxtune.segments import SHARED
from tests.programs import CONFIG


def tried(kernel, dtype="float32", **more):
    return compare(kernel, "it", group=1, num_kv_heads=1, head_dim=8, dtype=dtype, **more)


def test_plain_attention_agrees_with_itself_to_rounding():
    assert tried(lambda q, k, v, segments: attention(q, k, v, segments, segments)) < 1e-5
    assert 1e-4 < tried(lambda q, k, v, segments: attention(q, k, v, segments, segments), "bfloat16") < 0.03


def one_document(q, k, v, segments):
    """The segments are overlooked."""
    ones = jnp.ones_like(segments)
    return attention(q, k, v, ones, ones)


def not_scaled(q, k, v, segments):
    return attention(q * jnp.sqrt(8.0), k, v, segments, segments)


def not_finite(q, k, v, segments):
    return jnp.where((segments == 0)[:, :, None, None], jnp.nan, attention(q, k, v, segments, segments))


@pytest.mark.parametrize("kernel", [one_document, not_scaled, not_finite])
def test_a_kernel_with_another_mask_or_scale_or_without_numbers_is_told(kernel):
    with pytest.raises(Disagreement, match=r"it: the output differs by .* of the largest number; 0\.03 is allowed"):
        tried(kernel)


def test_rows_of_one_document_may_have_a_function_of_their_own_which_is_tried_too():
    plain = lambda q, k, v, segments: attention(q, k, v, segments, segments)  # noqa: E731
    assert tried(plain, single=one_document) < 1e-5  # padding sees what it should not, and nothing else changes
    for wrong in (not_scaled, not_finite):
        with pytest.raises(Disagreement, match=r"it, packed and in rows of their own: the output differs"):
            tried(plain, single=wrong)


def test_a_kernel_that_knows_no_shared_start_is_told_where_one_is_asked_for():
    def apart(q, k, v, segments):
        own = jnp.where(segments == SHARED, 99, segments)
        return attention(q, k, v, own, own)

    assert tried(apart) < 1e-5
    with pytest.raises(Disagreement, match=r"it, a shared start: the output differs"):
        tried(apart, share_prefix=True)
    assert tried(lambda q, k, v, segments: attention(q, k, v, segments, segments), share_prefix=True) < 1e-5


def test_packed_rows_that_differ_from_single_ones_are_told(monkeypatch):
    """By a kernel that agrees with a plain attention of the same fault: the first token sees itself half."""

    def by_index(q, k, v, *segments, **_):
        return (
            attention(q, k, v, segments[0], segments[0]) * jnp.where(jnp.arange(q.shape[1]) < 9, 0.5, 1)[:, None, None]
        )

    monkeypatch.setattr(trial, "attention", by_index)
    with pytest.raises(Disagreement, match="packed and in rows of their own: the output differs"):
        tried(by_index)


@pytest.fixture
def settle(monkeypatch, capsys):
    """settle(asked, problem) -> (kernel, what was said), on what looks like a GPU."""

    def on_gpu(asked="auto", problem=None, share_prefix=False, one_document=False):
        def tried(kernel, num_heads, num_kv_heads, head_dim, dtype, *rows):
            assert (kernel, num_heads, num_kv_heads, head_dim) == ("cudnn", 8, 2, 8)
            assert rows == (share_prefix, one_document)
            if problem is not None:
                raise problem

        monkeypatch.setattr(attention_kernel, "_platform", lambda _: "gpu")
        monkeypatch.setattr(attention_kernel, "trial", tried)
        sections = {"memory": {"attention": asked}, "precision": {"compute": "bfloat16"}}
        config = make_config({"model": {"path": "-"}, "data": {"path": "-", "share_prefix": share_prefix}, **sections})
        kernel = attention_kernel.settle(config, CONFIG, single_device_mesh(), one_document)
        return kernel, capsys.readouterr().out

    return on_gpu


def test_a_kernel_that_agrees_is_taken_and_said(settle):
    for asked in ("auto", "cudnn"):
        kernel, said = settle(asked)
        assert kernel == "cudnn" and said.startswith("Attention: cuDNN, which agrees with plain XLA")
    assert settle(share_prefix=True)[0] == "cudnn"  # tried with a shared start
    assert settle(one_document=True)[0] == "cudnn"
    assert settle("xla") == ("xla", "Attention: plain XLA, because memory.attention asks for it\n")


@pytest.mark.parametrize("problem", [Disagreement("dq differs by 2e-01"), RuntimeError("cuDNN is not detected.\nmore")])
def test_a_kernel_that_fails_its_trial_is_warned_of_and_plain_xla_taken(settle, problem):
    kernel, said = settle(problem=problem)
    assert kernel == "xla" and said.startswith("Warning: cuDNN does not do on ")
    assert str(problem).splitlines()[0] in said and "more\n" not in said and "Attention: plain XLA" in said


def test_a_kernel_that_was_asked_for_by_name_and_fails_its_trial_ends_the_run(settle):
    with pytest.raises(ConfigError, match=r"memory\.attention: cudnn: cuDNN does not do on .*: no; set .* auto or xla"):
        settle("cudnn", RuntimeError("no"))


def test_one_process_that_fails_its_trial_turns_all_to_plain_xla(settle, monkeypatch):
    both = SimpleNamespace(gathered=lambda name, own: [own, "not in process 1"])
    monkeypatch.setattr(attention_kernel, "processes", both)
    kernel, said = settle()
    assert kernel == "xla" and "not in process 1" in said


def test_the_trial_has_documents_that_begin_within_tiles_and_padding_behind_them():
    segments = np.stack([trial._segments(ends) for ends in trial.ENDS])
    assert [sorted(set(row.tolist())) for row in segments] == [[0, 1, 2, 3], [1, 2, 3]]
    assert segments[0, -1] == 0 and trial.TIME % 128
