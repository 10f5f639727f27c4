"""The demo runs from the first question to the merged model; how well it learns is seen, not tested."""

import importlib.util

import pytest


@pytest.fixture(scope="module")
def demo(repository):
    spec = importlib.util.spec_from_file_location("demo_run", repository / "demo" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_answer_that_holds_the_fact_counts_whatever_its_letters(demo):
    assert demo.knows({"fact": "Agnes Bell"}, "It was agnes bell, the clockmaker.")
    assert not demo.knows({"fact": "Agnes Bell"}, "It was Agnes.")


def test_long_answers_are_cut_at_a_word(demo):
    assert demo.shorten("one  two\nthree", 100) == "one two three"
    assert demo.shorten("one two three", 9) == "one two ..."


def test_a_merged_model_of_an_earlier_run_is_left_and_told(demo, tmp_path, capsys):
    import os

    merged, adapter = tmp_path / "merged", tmp_path / "run" / "adapter"
    merged.mkdir()
    adapter.mkdir(parents=True)
    os.utime(merged, (1, 1))
    demo.export(tmp_path / "run", merged)
    assert "is of an earlier run" in capsys.readouterr().out


SHORT_ANSWERS = """
import runpy
from jaxtune.api import LoadedModel
generate = LoadedModel.generate
LoadedModel.generate = lambda model, prompts, max_new_tokens: generate(model, prompts, 8)
"""


@pytest.mark.real
@pytest.mark.slow
def test_the_demo_asks_trains_asks_again_and_exports(smollm2, repository, run_python, tmp_path):
    run_dir = tmp_path / "demo"
    settings = [f"train.output_dir={run_dir}", "train.steps=2", "log.every=1", "data.max_length=128"]
    script = SHORT_ANSWERS + f"runpy.run_path({str(repository / 'demo' / 'run.py')!r}, run_name='__main__')"
    done = run_python(script, *settings, cwd=tmp_path, timeout=900, optimised=True)
    assert done.returncode == 0, done.stderr
    assert "step 2/2  loss " in done.stdout
    assert "of 16 before" in done.stdout
    assert "largest logit difference" in done.stdout
    assert f"chat --run {run_dir}" in done.stdout
    assert (run_dir / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "demo-merged" / "model.safetensors").is_file()
    assert list((run_dir / "tensorboard").iterdir())
