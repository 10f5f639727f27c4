"""AdaLoRA's penalty, scores and budget are peft's, step by step, and what it keeps is saved with the rest.

Files and merging are compared with peft in test_peft_methods.py, meshes with one device in test_method_meshes.py.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config import tune_section
from jaxtune.errors import ConfigError
from jaxtune.leaves import partition
from jaxtune.tune import course
from jaxtune.tune.adalora import Triplets, _places, budgets, penalty
from jaxtune.tune.peft_config import CONFIG_NAME
from jaxtune.tune.peft_io import save_adapter
from tests.programs import Stepper
from tests.tune import test_peft_methods
from tests.tune.support import difference, logits, peer_logits, tuned
from tests.tune.test_peft_methods import LR, QWEN2, STEPS, batch, loaded, our_batch, our_run

OPTIONS = {"method": "adalora", "init_r": 4, "target_r": 2, "alpha": 16, "targets": ["q_proj", "down_proj"]}
SCHEDULE = {"tinit": 2, "tfinal": 3, "total_step": STEPS}


def section(**options):
    return tune_section(**{**OPTIONS, **SCHEDULE, **options})


def peer_run(model, until=STEPS):
    """peft's losses; the model then has its last E and rank pattern."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    losses = []
    for step in range(1, until + 1):
        tokens, labels = (torch.tensor(x) for x in batch(step))
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def started(tmp_path, **options):
    made = tuned(section(**options), **QWEN2)
    save_adapter(tmp_path / "start", made.section, made.model.weights, made.params)
    return made, loaded(tmp_path / "start", QWEN2, is_trainable=True).train()


@pytest.mark.parametrize("every", [1, 2])
def test_ten_steps_follow_peft_s_and_leave_the_same_triplets(tmp_path, every):
    made, model = started(tmp_path, deltaT=every)
    losses, state = our_run(made)
    np.testing.assert_allclose(losses, peer_run(model), rtol=1e-4)
    stack = state["trainable"]["stacks"]["0"]
    kept = 0
    for block, ours in (
        ("self_attn.q_proj", stack["attention"]["q_proj"]),
        ("mlp.down_proj", stack["mlp"]["down_proj"]),
    ):
        for layer in range(3):
            module = model.get_submodule(f"base_model.model.model.layers.{layer}.{block}")
            e = module.lora_E["default"].detach().numpy()
            np.testing.assert_allclose(ours["weight"].e[layer], e, atol=1e-4)
            np.testing.assert_array_equal(ours["weight"].e[layer] != 0, e != 0)
            kept += np.count_nonzero(e)
    assert kept == 2 * 6


def test_the_penalty_is_part_of_the_loss(tmp_path):
    made, _ = started(tmp_path)
    plain = our_run(tuned(section(orth_reg_weight=0.0), **QWEN2))[0]
    assert our_run(made)[0][0] - plain[0] == pytest.approx(0.5 * 2, rel=0.05)  # A A^T is next to nothing: |1| is 2


def test_the_budget_falls_with_the_third_power():
    expected = [24, 24, 24, *(int(12 * (1 - (step - 2) / 5) ** 3 + 12) for step in range(3, 8))]
    assert budgets(24, 12, 2, 7).tolist() == expected and expected[-1] == 12


def test_an_adapter_with_triplets_taken_out_is_read(tmp_path):
    """As peft saves one after training, with its penalty; a module may have none left."""
    import torch

    _, model = started(tmp_path)
    peer_run(model)
    config = model.peft_config["default"]
    name = next(iter(config.rank_pattern))
    config.rank_pattern[name] = [False] * 4
    model.get_submodule(f"base_model.model.{name.partition('.lora_E')[0]}").lora_E["default"].data.zero_()
    model.save_pretrained(tmp_path / "trained")
    made = tuned(tune_section(method="adalora", adapter=str(tmp_path / "trained")), **QWEN2)
    tokens, peer = torch.tensor(batch(1)[0]), loaded(tmp_path / "trained", QWEN2, is_trainable=True).eval()
    with torch.no_grad():
        plain, whole = (one(input_ids=tokens, labels=tokens).loss.item() for one in (peer.base_model.model, peer))
    trains, _ = partition(made.params, made.mask)
    ours = course(made.section, made.model.weights, STEPS)
    assert float(ours.penalty(trains)) == pytest.approx(whole - plain, rel=1e-4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.grad(ours.penalty)(trains)))
    expected = peer_logits(model.eval())
    assert difference(logits(made.model, made.params), expected) < 1e-4
    save_adapter(tmp_path / "again", made.section, made.model.weights, made.params)
    assert difference(peer_logits(loaded(tmp_path / "again", QWEN2).eval()), expected) < 1e-4


def test_a_run_that_starts_from_an_adapter_has_a_schedule_of_its_own(tmp_path):
    """The adapter's, of a run that is over, would be past its end at the first step, or longer than this run."""
    started(tmp_path, total_step=None, tinit=1, tfinal=1)
    where = tmp_path / "start" / CONFIG_NAME
    stored = json.loads(where.read_text())
    assert [stored[name] for name in ("tinit", "tfinal", "deltaT", "total_step")] == [1, 1, 1, 4]
    for total in (1, 1000):
        where.write_text(json.dumps({**stored, "total_step": total}))
        made = tuned(tune_section(method="adalora", adapter=str(tmp_path / "start"), tinit=2), **QWEN2)
        assert (made.section.tinit, made.section.tfinal, made.section.total_step) == (2, 0, None)
        stack = our_run(made)[1]["trainable"]["stacks"]["0"]
        left = stack["attention"]["q_proj"]["weight"].e, stack["mlp"]["down_proj"]["weight"].e
        assert sum(map(np.count_nonzero, left)) == 2 * 6


def test_the_ranks_come_down_where_the_step_of_the_last_allocation_is_not_applied(monkeypatch):
    def overflown(step, model, last=STEPS - SCHEDULE["tfinal"]):
        batch = our_batch(step, model)
        return {**batch, "mask": batch["mask"] * jnp.inf} if step == last else batch

    monkeypatch.setattr(test_peft_methods, "our_batch", overflown)
    losses, state = our_run(tuned(section(deltaT=100), **QWEN2))
    assert np.isnan(losses).sum() == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    stack = state["trainable"]["stacks"]["0"]
    left = stack["attention"]["q_proj"]["weight"].e, stack["mlp"]["down_proj"]["weight"].e
    assert sum(map(np.count_nonzero, left)) == 2 * 6


def test_triplets_that_matter_equally_are_not_all_taken_out():
    made = tuned(section(tinit=0, tfinal=0, total_step=2), **QWEN2)
    trains, _ = partition(made.params, made.mask)
    ours = course(made.section, made.model.weights, 2)
    is_e = lambda path: path[-1] == jax.tree_util.GetAttrKey("e")  # noqa: E731
    trains = jax.tree_util.tree_map_with_path(lambda path, x: x * 0 + 1 if is_e(path) else x, trains)
    _, left = ours.after(ours.kept(trains), trains, jax.tree.map(jnp.zeros_like, trains), jnp.int32(2), jnp.bool_(True))
    found = jax.tree_util.tree_leaves_with_path(left)
    assert sum(int(np.count_nonzero(x)) for path, x in found if is_e(path)) == 12 < 24


def test_the_penalty_of_what_is_orthogonal_has_a_gradient():
    one = Triplets(None, a=jnp.eye(4)[:, :1], b=jnp.eye(4)[:1], scale=jnp.ones(()), e=jnp.ones((1, 1)))
    value, slope = jax.value_and_grad(partial(penalty, 0.5, 1))({"weight": one})
    assert value == 0 and all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


def test_places_are_those_of_all():
    scores = [np.zeros((2, 3)), np.array([[0.0, 2.0, np.inf]])]
    places = [place.tolist() for place in _places(scores)]
    assert sorted(number for place in places for row in place for number in row) == list(range(9))
    assert places[1][0][1:] == [7, 8]


def test_a_resumed_run_goes_on_bit_for_bit():
    """With its scores and its mask; here on another order of layers, that of a pipeline's stages."""
    sections = {"tune": {**OPTIONS, **SCHEDULE}, "mesh": {"pipe": 2, "virtual_stages": 2, "schedule": "interleaved"}}
    sections["train"] = {"micro_batches": 2}
    whole, first, second = (Stepper(**sections) for _ in range(3))
    losses = whole.run(6)
    assert first.run(4) == losses[:4]
    saved = jax.tree.map(np.asarray, first.program.saved(first.state))
    assert {"importance", "change", "mask"} == saved["method"].keys()
    shapes = second.program.saved_shape()
    second.state = second.program.loaded(jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), saved, shapes))
    assert second.run(2, first=5) == losses[4:]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"total_step": 10}, r"tune.total_step 10: the run has only 9 steps"),
        ({"total_step": None, "tinit": 6, "tfinal": 3}, r"tune.tinit 6 and tune.tfinal 3 leave none of 9 steps"),
    ],
    ids=str,
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(settings, words):
    made = tuned(section(**settings), **QWEN2)
    with pytest.raises(ConfigError, match=words):
        course(made.section, made.model.weights, 9)


def test_ranks_do_not_grow():
    with pytest.raises(ValueError, match="target_r 5 is above init_r 4"):
        section(target_r=5)
