"""docs/quickstart.ipynb runs from its first cell to its last, on a tiny model and for a few steps."""

import re

import pytest

from tests.conftest import child_environment


@pytest.fixture(scope="module")
def notebook(repository):
    import nbformat

    return nbformat.read(repository / "docs" / "quickstart.ipynb", as_version=4)


def code(notebook, install=False):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if ("install" in cell.metadata.get("tags", [])) == install]


def output(cell):
    return "".join(out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in cell.outputs)


def test_the_notebook_is_valid_and_kept_without_outputs(notebook):
    import nbformat

    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_only_the_first_code_cell_installs_anything(notebook):
    assert len(code(notebook, install=True)) == 1
    assert code(notebook, install=True) == [cell for cell in notebook.cells if cell.cell_type == "code"][:1]
    assert not [cell for cell in code(notebook) if re.search(r"\bpip\b", cell.source)]


def test_every_cell_compiles(notebook):
    for cell in code(notebook) + code(notebook, install=True):
        compile(cell.source, "cell", "exec")


@pytest.mark.slow
def test_it_runs_from_its_first_cell_to_its_last(notebook, tiny_model, repository, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    for name, value in child_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAXTUNE_MODEL", str(tiny_model("llama")))
    monkeypatch.setenv("JAXTUNE_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("JAXTUNE_STEPS", "4")
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(repository / "docs")}}
    ).execute()
    shown = [output(cell) for cell in code(notebook)]
    assert "on 1 x cpu" in shown[0]
    assert "What is your name?" in shown[2]
    assert "supervised" in shown[4]
    assert "step 4/4" in shown[4]
    assert "\x1b" not in shown[4]  # no bars, whose control characters a notebook shows as they are
    assert re.search(r"^ +4 +\d+\.\d+ +\d+\.\d+ +\d+$", shown[5], re.MULTILINE)
    assert shown[6].count("before:") == shown[6].count("after:") == 4
    assert "model.safetensors" in shown[8]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    assert (tmp_path / "run-merged" / "config.json").exists()
