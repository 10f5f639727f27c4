"""Schedules against transformers, optimisers against torch and optax, clipping against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtune.config import MeshSection, OptimSection
from jaxtune.errors import ConfigError
from jaxtune.leaves import partition
from jaxtune.mesh import RULES, make_mesh, spec
from jaxtune.models.weights import Weight
from jaxtune.optim import clip, decay_mask, descend, global_norm, make_optimizer, make_schedule, state_shardings
from jaxtune.tune.low_rank import LowRank

STEPS = 20
WEIGHTS = {
    "embed": {"weight": Weight((6, 4), ("vocab", "embed"), "embed.weight")},
    "norm": {"weight": Weight((4,), ("embed",), "norm.weight", init="ones")},
    "stacks": {
        "0": {
            "q_proj": {
                "weight": Weight((5, 4), ("heads", "embed"), "layers.{layer}.q.weight", layers=range(3)),
                "bias": Weight((5,), ("heads",), "layers.{layer}.q.bias", layers=range(3)),
            }
        }
    },
}


def draw(seed, dtype=np.float32):
    """Numbers of every size between 1e-3 and 1e3 for every declared weight."""
    random = np.random.default_rng(seed)

    def one(weight):
        numbers = random.standard_normal(weight.full_shape) * 10.0 ** random.uniform(-3, 3)
        return jnp.asarray(numbers, dtype)

    return jax.tree.map(one, WEIGHTS, is_leaf=lambda node: isinstance(node, Weight))


def run(section, params, gradients, lr=1e-2):
    optimizer = make_optimizer(section, WEIGHTS)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        direction, state = optimizer.update(grads, state, params)
        return descend(params, direction, lr), state

    for grads in gradients:
        params, state = step(params, state, grads)
    return params


def torch_run(make, params, gradients, weight_decay):
    """The same steps under a torch optimiser, which has the weights that decay in a group of their own."""
    torch = pytest.importorskip("torch")
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(array))) for array in jax.tree.leaves(params)]
    decays = jax.tree.leaves(decay_mask(params, WEIGHTS))
    groups = [
        {
            "params": [t for t, yes in zip(tensors, decays, strict=True) if yes == wanted],
            "weight_decay": weight_decay * wanted,
        }
        for wanted in (True, False)
    ]
    optimizer = make(torch)(groups)
    for grads in gradients:
        for tensor, grad in zip(tensors, jax.tree.leaves(grads), strict=True):
            tensor.grad = torch.tensor(np.asarray(grad))
        optimizer.step()
    return [tensor.detach().numpy() for tensor in tensors]


def close(ours, theirs, tolerance=1e-6):
    for mine, other in zip(jax.tree.leaves(ours), theirs, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(np.asarray(mine) / scale, np.asarray(other) / scale, atol=tolerance)


TORCH = [
    ("adamw", {}, lambda torch: lambda groups: torch.optim.AdamW(groups, lr=1e-2)),
    (
        "adamw",
        {"beta1": 0.8, "beta2": 0.95, "eps": 1e-3},
        lambda torch: lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-3),
    ),
    ("adam", {}, lambda torch: lambda groups: torch.optim.Adam(groups, lr=1e-2)),
    ("sgd", {}, lambda torch: lambda groups: torch.optim.SGD(groups, lr=1e-2)),
    ("sgd", {"momentum": 0.9}, lambda torch: lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9)),
]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("name", "settings", "make"), TORCH)
def test_twenty_steps_are_those_of_torch(name, settings, make, weight_decay):
    params, gradients = draw(0), [draw(seed) for seed in range(1, STEPS + 1)]
    ours = run(OptimSection(name=name, weight_decay=weight_decay, **settings), params, gradients)
    close(ours, torch_run(make, params, gradients, weight_decay))


def test_lion_is_its_formula():
    section = OptimSection(name="lion", beta1=0.9, beta2=0.99, weight_decay=0.1)
    params, gradients = draw(0), [draw(seed) for seed in range(1, STEPS + 1)]
    ours = run(section, params, gradients)
    decays = jax.tree.leaves(decay_mask(params, WEIGHTS))
    for index, (array, decay) in enumerate(zip(jax.tree.leaves(params), decays, strict=True)):
        array, moment = np.asarray(array, np.float64), np.zeros(array.shape)
        for grads in gradients:
            grad = np.asarray(jax.tree.leaves(grads)[index], np.float64)
            array = array - 1e-2 * (np.sign(0.9 * moment + 0.1 * grad) + 0.1 * decay * array)
            moment = 0.99 * moment + 0.01 * grad
        close([jax.tree.leaves(ours)[index]], [array])


def test_adafactor_treats_every_layer_of_a_stack_as_optax_treats_a_weight():
    weights = {
        "stacks": {"0": {"weight": Weight((130, 140), ("a", "b"), "{layer}", layers=range(3))}},
        "head": {"weight": Weight((150, 128), ("vocab", "embed"), "head")},
    }
    shapes = [(3, 130, 140), (150, 128)]
    random = np.random.default_rng(0)
    arrays = [[random.standard_normal(shape).astype(np.float32) for shape in shapes] for _ in range(6)]

    def tree(stack, head):
        return {"stacks": {"0": {"weight": jnp.asarray(stack)}}, "head": {"weight": jnp.asarray(head)}}

    params, optimizer = tree(*arrays[0]), make_optimizer(OptimSection(name="adafactor"), weights)
    state = optimizer.init(params)
    assert max(array.size for array in jax.tree.leaves(state)) == 3 * 140  # factored: no full second moment
    singles = [*arrays[0][0], arrays[0][1]]
    peer = optax.adafactor(1e-2)
    states = [peer.init(single) for single in singles]
    for stack, head in arrays[1:]:
        direction, state = optimizer.update(tree(stack, head), state, params)
        params = descend(params, direction, 1e-2)
        for i, grad in enumerate([*stack, head]):
            update, states[i] = peer.update(grad, states[i], singles[i])
            singles[i] = singles[i] + update
    close([*params["stacks"]["0"]["weight"], params["head"]["weight"]], singles)


@pytest.mark.parametrize(("ranks", "factored"), [((16, 2), True), ((160, 140), True), ((160, 20), False)])
def test_adafactor_moves_a_layer_as_optax_moves_its_weight_without_the_zeros_that_fill_it_up(ranks, factored):
    """Where one layer is too narrow for it, no second moment is factored."""
    path, shapes, random = ("stacks", "0", "a"), [*((130, rank) for rank in ranks), (0,)], np.random.default_rng(0)
    weights = {"stacks": {"0": {"a": Weight((130, max(ranks)), ("a", "b"), "{layer}", layers=range(3))}}}
    numbers = {path: jnp.array([130.0 * ranks[0], 130.0 * ranks[1], 0.0])}

    def tree(arrays):
        filled = [np.pad(array, [(0, 0), (0, max(ranks) - array.shape[1])]) for array in arrays]
        return {"stacks": {"0": {"a": jnp.asarray(np.stack([*filled, np.zeros_like(filled[0])]))}}}

    singles, *gradients = [[random.standard_normal(s).astype(np.float32) for s in shapes[:2]] for _ in range(6)]
    params, optimizer = tree(singles), make_optimizer(OptimSection(name="adafactor"), weights, shapes={path: shapes})
    state, peer = optimizer.init(params), optax.adafactor(1e-2, factored=factored)
    states = [peer.init(single) for single in singles]
    for grads in gradients:
        direction, state = optimizer.update(tree(grads), state, params, numbers=numbers)
        params = descend(params, direction, 1e-2)
        for i, grad in enumerate(grads):
            update, states[i] = peer.update(grad, states[i], singles[i])
            singles[i] = singles[i] + update
    jax.tree.map(lambda ours, theirs: close([ours], [theirs]), params, tree(singles))


def test_adafactors_decay_is_scaled_by_the_rate():
    section = OptimSection(name="adafactor", weight_decay=0.5)
    params, zero = draw(0), jax.tree.map(jnp.zeros_like, draw(0))
    moved = run(section, params, [zero])
    np.testing.assert_allclose(moved["embed"]["weight"], params["embed"]["weight"] * (1 - 1e-2 * 0.5), rtol=1e-6)
    np.testing.assert_array_equal(moved["norm"]["weight"], params["norm"]["weight"])


def low_rank_params():
    params = draw(0)
    linear = params["stacks"]["0"]["q_proj"]
    linear["weight"] = LowRank(linear["weight"], jnp.ones((3, 4, 2)), jnp.ones((3, 2, 5)), jnp.float32(2))
    mask = jax.tree.map(lambda _: False, params)
    train = LowRank(False, True, True, False)
    mask["stacks"]["0"]["q_proj"] = {"weight": train, "bias": True}
    return partition(params, mask)[0]


def test_norms_and_biases_do_not_decay_and_the_parts_of_an_adapter_do():
    assert decay_mask(draw(0), WEIGHTS) == {
        "embed": {"weight": True},
        "norm": {"weight": False},
        "stacks": {"0": {"q_proj": {"weight": True, "bias": False}}},
    }
    mask = decay_mask(low_rank_params(), WEIGHTS)
    linear = mask["stacks"]["0"]["q_proj"]
    assert (linear["weight"].a, linear["weight"].b, linear["bias"]) == (True, True, False)
    assert mask["embed"] == {"weight": None}


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adam", "sgd", "lion", "adafactor"])
def test_only_what_is_trained_has_state_and_moves(name):
    params = low_rank_params()
    optimizer = make_optimizer(OptimSection(name=name, weight_decay=0.1), WEIGHTS)
    direction, state = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    assert jax.tree.structure(direction) == jax.tree.structure(params)
    assert all(array.dtype == jnp.float32 and (array != 0).all() for array in jax.tree.leaves(direction))
    assert (6, 4) not in {array.shape for array in jax.tree.leaves(state)}


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adam", "sgd", "lion", "adafactor"])
def test_moments_and_directions_of_bfloat16_weights_are_float32(name):
    section = OptimSection(name=name, weight_decay=0.1, momentum=0.9 if name == "sgd" else 0.0)
    params = draw(0, jnp.bfloat16)
    optimizer = make_optimizer(section, WEIGHTS)
    direction, state = optimizer.update(draw(1, jnp.bfloat16), optimizer.init(params), params)
    assert {array.dtype.name for array in jax.tree.leaves(direction)} == {"float32"}
    assert {array.dtype.name for array in jax.tree.leaves(state)} <= {"float32", "int32"}
    exact = jax.tree.map(lambda array: array.astype(jnp.float32), (params, draw(1, jnp.bfloat16)))
    expected, _ = optimizer.update(exact[1], optimizer.init(exact[0]), exact[0])
    jax.tree.map(np.testing.assert_array_equal, direction, expected)


def test_a_step_is_rounded_once_to_the_weights_own_type():
    params = {"x": jnp.asarray([1.0, 2.0], jnp.bfloat16)}
    moved = descend(params, {"x": jnp.asarray([0.3, 0.001], jnp.float32)}, jnp.float32(0.5))
    np.testing.assert_array_equal(moved["x"], jnp.asarray([1 - 0.15, 2 - 0.0005], jnp.bfloat16))
    assert moved["x"].dtype == jnp.bfloat16


PEERS = [
    ("constant", 0.0, "constant_with_warmup", {}),
    ("linear", 0.0, "linear", {}),
    ("cosine", 0.0, "cosine", {}),
    ("cosine", 0.1, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("wsd", 0.0, "warmup_stable_decay", {"num_decay_steps": 7}),
    ("wsd", 0.1, "warmup_stable_decay", {"num_decay_steps": 7, "min_lr_ratio": 0.1}),
]


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize(("name", "min_lr", "peer", "settings"), PEERS)
def test_every_step_has_the_rate_that_transformers_gives_it(name, min_lr, peer, settings, warmup):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = transformers.get_scheduler(peer, optimizer, warmup, 30, scheduler_specific_kwargs=settings or None)
    theirs = []
    for _ in range(30):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    wsd = {"decay": 7} if name == "wsd" else {}
    section = OptimSection(lr=3e-4, schedule=name, warmup=warmup, min_lr=min_lr, **wsd)
    ours = make_schedule(section, 30)(np.arange(1, 31))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * 3e-4)
    assert ours.dtype == jnp.float32


def test_a_rate_can_be_had_for_one_step_inside_jit():
    schedule = make_schedule(OptimSection(schedule="linear", warmup=0, lr=1.0), 10)
    assert [float(jax.jit(schedule)(jnp.int32(step))) for step in (1, 6, 10, 11, 99)] == pytest.approx(
        [1.0, 0.5, 0.1, 0.0, 0.0]
    )


def test_a_share_of_warm_up_is_rounded_up_as_transformers_rounds_it():
    transformers = pytest.importorskip("transformers")
    for share, total in [(0.03, 100), (0.03, 40), (0.5, 7), (0.07, 100), (0.0, 9)]:
        theirs = transformers.TrainingArguments.get_warmup_steps(
            type("Arguments", (), {"warmup_steps": share})(), total
        )
        rates = np.asarray(
            make_schedule(OptimSection(schedule="constant", lr=1.0, warmup=share), total)(np.arange(1, total + 1))
        )
        assert (rates < 1).sum() == theirs


@pytest.mark.parametrize(("name", "last"), [("linear", 0.3), ("cosine", 0.3), ("wsd", 0.3), ("constant", 1.0)])
def test_the_end_of_the_run_has_the_lowest_rate_and_keeps_it(name, last):
    section = OptimSection(schedule=name, lr=1.0, warmup=0.1, min_lr=0.0 if name == "constant" else 0.3)
    rates = np.asarray(make_schedule(section, 50)(np.arange(1, 80)))
    np.testing.assert_allclose(rates[50:], last, rtol=1e-6)
    assert (np.diff(rates[6:]) <= 0).all()


def test_a_wsd_that_does_not_fit_is_refused_and_shares_are_fitted():
    with pytest.raises(ConfigError, match="10 and 15 steps of a run of 20"):
        make_schedule(OptimSection(schedule="wsd", warmup=10, decay=15), 20)
    assert float(make_schedule(OptimSection(schedule="wsd", lr=1.0, warmup=0.0), 1)(1)) == 1.0
    rates = make_schedule(OptimSection(schedule="wsd", lr=1.0, warmup=0.6, decay=0.6), 10)(np.arange(1, 11))
    assert int(np.argmax(rates)) == 6 and float(rates[6]) == 1.0


def test_a_broken_number_of_steps_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.warmup: found 2\.5; allowed"):
        make_schedule(OptimSection(warmup=2.5), 20)


@pytest.mark.parametrize(("max_norm", "size"), [(0.5, 1), (1e9, 1), (1e-8, 1e-9)])
def test_clipping_is_torchs(max_norm, size):
    torch = pytest.importorskip("torch")
    grads = jax.tree.map(lambda array: size * array, draw(3))
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(array))) for array in jax.tree.leaves(grads)]
    for tensor in tensors:
        tensor.grad = tensor.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
    assert float(global_norm(grads)) == pytest.approx(float(norm), rel=1e-6)
    close(clip(grads, global_norm(grads), max_norm), [tensor.grad.numpy() for tensor in tensors])


def test_without_a_largest_norm_gradients_pass_in_float32():
    grads = {"x": jnp.asarray([3.0, 4.0], jnp.bfloat16), "y": None}
    assert float(global_norm(grads)) == 5.0
    passed = clip(grads, global_norm(grads), None)
    assert passed["x"].dtype == jnp.float32 and passed["x"].tolist() == [3.0, 4.0] and passed["y"] is None


def test_a_norm_of_bfloat16_gradients_is_summed_in_float32():
    grads = {"x": jnp.ones(100_000, jnp.bfloat16)}
    assert float(global_norm(grads)) == pytest.approx(100_000**0.5, rel=1e-6)


def homes_and_state(name, weights, section):
    """The weights' shardings on a mesh, and those of an optimiser's state, by path."""
    mesh = make_mesh(section)
    leaf = {"is_leaf": lambda node: isinstance(node, Weight)}
    homes = jax.tree.map(lambda weight: NamedSharding(mesh, spec(weight.full_axes, RULES)), weights, **leaf)
    params = jax.tree.map(lambda weight: jax.ShapeDtypeStruct(weight.full_shape, jnp.float32), weights, **leaf)
    state = jax.eval_shape(make_optimizer(OptimSection(name=name), weights).init, params)
    placed = jax.tree_util.tree_leaves_with_path(state_shardings(state, params, homes))
    return {jax.tree_util.keystr(path): home.spec for path, home in placed}


UP = {"stacks": {"0": {"up": {"weight": Weight((160, 256), ("mlp", "embed"), "{layer}", layers=range(3))}}}}
DOWN = {"stacks": {"0": {"down": {"weight": Weight((256, 160), ("embed", "mlp"), "{layer}", layers=range(3))}}}}
SQUARE = {"stacks": {"0": {"o": {"weight": Weight((256, 256), ("embed", "heads"), "{layer}", layers=range(3))}}}}


@pytest.mark.parametrize(
    ("weights", "row", "column"),
    [
        (UP, P("pipe", "tensor"), P("pipe", "fsdp")),
        (DOWN, P("pipe", "tensor"), P("pipe", "fsdp")),  # optax's row is what is left without the largest dimension
        (SQUARE, P("pipe", "fsdp"), P("pipe", "tensor")),
    ],
)
def test_adafactors_factors_lie_as_the_dimensions_that_they_have(weights, row, column):
    placed = homes_and_state("adafactor", weights, MeshSection(fsdp=4, tensor=2))
    assert [home for path, home in placed.items() if ".v_row" in path] == [row]
    assert [home for path, home in placed.items() if ".v_col" in path] == [column]
    assert [home for path, home in placed.items() if path.endswith(".v")] == [P()]  # one number a layer


def test_scales_of_8_bit_blocks_lie_as_their_weight_where_a_rows_blocks_divide():
    placed = homes_and_state("adamw_8bit", UP, MeshSection(fsdp=4, tensor=2))
    assert {path[-6:]: home for path, home in placed.items() if "weight" in path} == {
        ".codes": P("pipe", "tensor", "fsdp"),
        "absmax": P("pipe", "tensor", None),
    }
    wide = {"head": {"weight": Weight((64, 1024), ("vocab", "embed"), "head")}}
    placed = homes_and_state("adamw_8bit", wide, MeshSection(fsdp=4, tensor=2))
    assert {home for path, home in placed.items() if "weight" in path} == {P("tensor", "fsdp")}


def test_moments_lie_where_their_weights_lie_and_counters_everywhere():
    placed = homes_and_state("adamw", UP, MeshSection(fsdp=4, tensor=2))
    assert {home for path, home in placed.items() if "weight" in path} == {P("pipe", "tensor", "fsdp")}
    assert {home for path, home in placed.items() if "count" in path} == {P()}


def test_an_unused_setting_of_another_optimiser_is_refused():
    with pytest.raises(ValueError, match="momentum belongs to sgd"):
        OptimSection(name="adamw", momentum=0.9)
    with pytest.raises(ValueError, match="momentum belongs to sgd"):
        OptimSection(name="adamw_8bit", momentum=0.9)
    with pytest.raises(ValueError, match="decay belongs to wsd"):
        OptimSection(schedule="cosine", decay=0.5)
