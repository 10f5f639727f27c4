"""What a run finds of before, its words, its result or its record, is as it was, or it says what is not."""

import copy
import json
import shutil

import pytest

from jaxtune import loading
from jaxtune.errors import CheckpointError, UserError
from jaxtune.rundir import open_run
from tests.rundir.support import take_steps, tree


def test_a_changed_tokenizer_or_template_is_told_in_place_of_the_data_that_it_makes(
    settings, model, tiny_tokenizer, capsys
):
    def check(data, **changed):
        words = copy.deepcopy(tiny_tokenizer)
        for name, value in changed.items():
            setattr(words, name, value)
        with open_run(settings()) as run:
            run.check(data, model, tokenizer=words)
            run.begin(0)

    check("data")
    take_steps(settings(), model)
    check("data")
    for data in ("data", "other"):
        with pytest.raises(CheckpointError, match=r"run: the tokenizer \(.*model\) changed since"):
            check(data, eos_token=tiny_tokenizer.bos_token or "a")
    with pytest.raises(CheckpointError, match=r"run: the chat template \(.*model\) changed since"):
        check("other", chat_template="another")
    assert "Warning" not in capsys.readouterr().out
    check("data", chat_template="another")
    assert "changed since this run began; the training data did not" in capsys.readouterr().out


def test_an_ended_run_whose_checkpoints_and_result_are_gone_is_not_trained_again(tmp_path, settings, model):
    take_steps(settings(), model, finish=True)
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(tmp_path / "run" / name)
    before = tree(tmp_path / "run")
    with open_run(settings()) as run:
        with pytest.raises(CheckpointError, match=r"ended \(adapter/ was its result\), .* no checkpoint to go on from"):
            run.check("data", model, total_steps=100)
    assert tree(tmp_path / "run") == before


def test_a_result_without_its_weights_is_none_and_is_made_again(tmp_path, settings, model):
    take_steps(settings(), model, finish=True)
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    with open_run(settings()) as run:
        assert run.begun and not run.finished
        run.check("data", model, total_steps=100)
    (tmp_path / "run" / "checkpoints" / "100").rmdir()
    with open_run(settings()) as run, pytest.raises(CheckpointError, match=r"adapter/ was its result"):
        run.check("data", model, total_steps=100)


@pytest.mark.parametrize(("method", "name"), [("lora", "adapter"), ("full", "model")])
def test_a_file_of_the_users_among_the_result_is_told_before_a_longer_run_is_trained(
    tmp_path, settings, model, method, name
):
    take_steps(settings(tune={"method": method}), model)
    (tmp_path / "run" / name).mkdir()
    (tmp_path / "run" / name / "README.md").write_text("mine")
    before = tree(tmp_path / "run")
    with pytest.raises(UserError, match=rf"{name}: .*holds README\.md") as caught:
        open_run(settings(tune={"method": method}))
    assert caught.value.exit_code == 2 and tree(tmp_path / "run") == before


@pytest.mark.parametrize(("method", "name"), [("lora", "adapter"), ("full", "model")])
def test_a_result_that_is_a_link_is_told_before_a_longer_run_is_trained(tmp_path, settings, model, method, name):
    take_steps(settings(tune={"method": method}), model)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name}: is in the way"):
        open_run(settings(tune={"method": method}))
    assert (tmp_path / "run" / name).is_symlink()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("config", 5, "is int, expected an object"),
        ("fingerprints", [1], "is list, expected an object"),
        ("changes", "x", "is str, expected a list"),
        ("finished", "no", "is str, expected true or false"),
        ("template", 1, "is int, expected a text, an object or null"),
    ],
)
def test_a_record_with_a_value_of_another_kind_is_named(tmp_path, settings, model, name, value, words):
    take_steps(settings(), model)
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    for read in (lambda: open_run(settings()), lambda: loading.open_run(tmp_path / "run", "float32", None)):
        with pytest.raises(CheckpointError, match=rf'run\.json: "{name}" {words}; bring the file back'):
            read()


@pytest.mark.parametrize("below", ["", "deep"])
def test_a_link_to_what_is_not_there_is_said_to_be_one(tmp_path, settings, below):
    (tmp_path / "run").symlink_to(tmp_path / "unmounted")
    config = settings(train={"output_dir": str(tmp_path / "run" / below)})
    with pytest.raises(CheckpointError, match=r"run is a link to .*unmounted, which is not there; make that directory"):
        open_run(config)
    (tmp_path / "unmounted").mkdir()
    open_run(config).__exit__()
