"""What is secret in the environment is in nothing that jaxtune writes or says."""

import pytest

import jaxtune
from tests.runs import sections

CANARY = "hf_canarycanarycanarycanary"
NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture
def secrets(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, CANARY)


def holding(directory):
    """The files that have the canary in them."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [path for path in files if CANARY.encode() in path.read_bytes()], len(files)


def test_a_runs_files_and_words_hold_no_secret(secrets, tiny_model, tmp_path, capfd):
    tree = sections(tiny_model("qwen2"), tmp_path, steps=2, log={"every": 1, "tensorboard": True})
    jaxtune.train(tree)
    found, count = holding(tmp_path)
    assert found == [] and count > 10
    out, err = capfd.readouterr()
    assert "step 2/2" in out and CANARY not in out + err
