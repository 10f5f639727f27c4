"""The recipes in configs/ are complete, valid and say what they are said to say."""

import math
from pathlib import Path

import pytest
import yaml

from jaxtune.config import Config, dump_config, load_config, make_config

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request):
    return request.param


def test_the_recipes_are_there():
    names = {path.stem for path in RECIPES}
    qwen = {"qwen2.5-0.5b-lora", "qwen2.5-0.5b-full", "qwen2.5-0.5b-lora-8-devices"}
    assert names >= {"demo", "from-scratch"} | qwen


def test_a_recipe_is_valid_and_survives_being_written_and_read(recipe):
    config = load_config(recipe)
    assert make_config(yaml.safe_load(dump_config(config))) == config


def test_a_recipe_says_how_to_run_it(recipe):
    assert f"--config configs/{recipe.name}" in recipe.read_text()


def test_a_recipe_writes_to_a_directory_of_its_own(recipe):
    assert load_config(recipe).train.output_dir == f"runs/{recipe.stem}"


def test_a_recipe_names_every_section_that_a_reader_would_look_for(recipe):
    wanted = {"model", "tune", "data", "train", "optim", "checkpoint", "eval", "log"}
    assert set(yaml.safe_load(recipe.read_text())) >= wanted
    assert set(yaml.safe_load(recipe.read_text())) <= set(Config.model_fields)


def test_a_recipes_micro_batches_divide_its_batch(recipe):
    train = load_config(recipe).train
    assert train.batch_size % train.micro_batches == 0


def test_the_seed_recipe_is_the_seed_recipe():
    config = load_config(REPOSITORY / "configs" / "qwen2.5-0.5b-lora.yaml")
    tune, data = config.tune, config.data
    assert (tune.method, tune.rank, tune.alpha, tune.dropout, tune.targets) == (
        "lora",
        8,
        32,
        0.1,
        ["q_proj", "v_proj"],
    )
    assert (config.optim.lr, config.train.epochs, data.max_length) == (1e-4, 3, 384)
    assert (data.format, data.system) == ("alpaca", "现在你要扮演皇帝身边的女人--甄嬛")


def test_its_full_twin_has_the_same_data():
    lora, full = (load_config(REPOSITORY / "configs" / f"qwen2.5-0.5b-{name}.yaml") for name in ("lora", "full"))
    assert full.tune.method == "full"
    assert full.data == lora.data


def test_the_eight_device_recipe_uses_eight_devices_and_a_batch_that_fits_them():
    config = load_config(REPOSITORY / "configs" / "qwen2.5-0.5b-lora-8-devices.yaml")
    mesh = config.mesh
    assert mesh.data * mesh.fsdp * mesh.tensor == 8
    assert config.train.batch_size % (mesh.data * mesh.fsdp) == 0


@pytest.mark.parametrize(("name", "devices"), [("qwen2.5-7b-full-8-gpus", 8), ("qwen2.5-72b-full-64-devices", 64)])
def test_a_recipe_for_many_devices_uses_them_all(name, devices):
    config = load_config(REPOSITORY / "configs" / f"{name}.yaml")
    assert math.prod(config.mesh.sizes.values()) == devices
    assert config.train.batch_size % (config.train.micro_batches * config.mesh.data * config.mesh.fsdp) == 0


def test_the_demo_reads_what_the_repository_ships_and_what_its_tool_fetches():
    config = load_config(REPOSITORY / "configs" / "demo.yaml")
    assert (REPOSITORY / config.data.path).is_file()
    assert (REPOSITORY / config.eval.path).is_file()
    tool = (REPOSITORY / "tools" / "get_demo_model.py").read_text()
    assert Path(config.model.path).name in tool
    assert Path(config.model.path).parent == Path(".cache/smollm2")
