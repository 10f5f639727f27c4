"""A base model and the configuration of a run on it, neither of which is trained."""

import pytest

from jaxtune.config import make_config


@pytest.fixture
def model(tmp_path):
    home = tmp_path / "model"
    home.mkdir()
    (home / "model.safetensors").write_bytes(b"weights")
    return home


@pytest.fixture
def settings(tmp_path, model):
    """A function: the configuration of a run in tmp_path/run, with some fields changed."""

    def make(**sections):
        base = {
            "model": {"path": str(model)},
            "data": {"path": "d.json"},
            "train": {"output_dir": str(tmp_path / "run")},
        }
        return make_config({**base, **{name: {**base.get(name, {}), **fields} for name, fields in sections.items()}})

    return make
