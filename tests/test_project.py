"""What holds for the repository as a whole: it needs no torch, runs nobody's code, and says what is there."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxtune.config import make_config, parse_yaml
from tests.runs import sections, write_config

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = sorted((REPOSITORY / "jaxtune").rglob("*.py"))
SOURCES = [*PACKAGE, *sorted(REPOSITORY.glob("t*/**/*.py")), *sorted((REPOSITORY / "demo").glob("*.py"))]
FORBIDDEN_IMPORTS = {"torch", "pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
PROGRAMS = ("system", "popen", "execv", "execve", "execvp", "execvpe", "spawnv", "spawnve", "posix_spawn")
FORBIDDEN_OF_MODULES = {("os", name) for name in PROGRAMS} | {("torch", "load")}
ITSELF = ("jaxtune/huge_pages.py", ("os", "execve"))  # the command's own process
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_the_package_is_found_beside_a_clone_that_is_called_jaxtune(tmp_path):
    """Where git clone was typed: the clone's directory, which has no __init__.py, is not to stand for the package."""
    (tmp_path / "jaxtune" / "jaxtune").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "import jaxtune; print(jaxtune.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().endswith("__init__.py"), done.stdout + done.stderr


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_the_package_imports_neither_torch_nor_what_runs_code_from_files(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not FORBIDDEN_IMPORTS & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.module.split(".")[0] not in FORBIDDEN_IMPORTS
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS), node.lineno
            called = node.func
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                name, given = (called.value.id, called.attr), {keyword.arg for keyword in node.keywords}
                allowed = name not in FORBIDDEN_OF_MODULES or (relative(path), name) == ITSELF
                assert allowed, f"line {node.lineno}: {'.'.join(name)}"
                assert name != ("yaml", "load") or "Loader" in given, f"line {node.lineno}: yaml.load without a Loader"
            for keyword in node.keywords:
                risky = keyword.arg in ("trust_remote_code", "allow_pickle", "shell")
                assert not (risky and getattr(keyword.value, "value", True)), f"line {node.lineno}: {keyword.arg}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_are_short_enough_to_read(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", [path for path in PACKAGE if path.stat().st_size], ids=relative)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


TRAIN_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # makes `import torch` fail
import importlib, pkgutil
import jaxtune
for module in pkgutil.walk_packages(jaxtune.__path__, "jaxtune."):
    importlib.import_module(module.name)
from jaxtune.cli import main
main(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_training_works_where_torch_is_not_installed(run_python, tiny_model, tmp_path):
    rows = [{"instruction": f"Count to {n}", "input": "", "output": " ".join(map(str, range(n)))} for n in range(1, 9)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "model": {"path": str(tiny_model("qwen2"))},
                "data": {"path": str(tmp_path / "data.json"), "max_length": 64},
                "train": {"output_dir": str(tmp_path / "run"), "steps": 2, "batch_size": 2},
            }
        )
    )
    done = run_python(TRAIN_WITHOUT_TORCH, "--config", str(tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", [["-m", "jaxtune.train", "--config"], ["-m", "jaxtune", "preview", "--config"]])
def test_a_command_does_not_import_torch_where_it_is_installed(command, tiny_model, tmp_path):
    config = write_config(tmp_path / "c.yaml", sections(tiny_model("qwen2"), tmp_path, steps=1))
    asked = [sys.executable, "-X", "importtime", *command, str(config)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0, done.stderr[-2000:]
    assert "transformers" in imported and "torch" not in imported


def test_the_package_does_not_ask_for_torch():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert not [name for name in project["dependencies"] if name.startswith(("torch", "peft", "accelerate"))]
    assert "torch==2.13.0" in project["optional-dependencies"]["test"]


def test_ci_runs_the_very_command_of_the_readme():
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"
    assert "\nmake test " in README


@pytest.mark.parametrize("target", ["demo", "test", "check", "bench"])
def test_the_makefile_has_the_targets_that_are_written_about(target):
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


def test_the_licence_is_apaches():
    text = (REPOSITORY / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_and_paths_in_the_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    linked = [page.parent / link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    named = [REPOSITORY / name for name in re.findall(r"`((?:jaxtune|tests|tools|configs|demo|docs)/[\w./-]*)`", text)]
    assert linked or named or page.parent != REPOSITORY
    assert [str(path) for path in {*linked, *named} if not path.exists()] == []


def test_the_readmes_configurations_are_valid():
    """A whole one, and sections to put over it."""
    whole, *more = (parse_yaml(block, "README.md") for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
    assert make_config(whole).train.output_dir == "runs/mine"
    for added in more:
        make_config({**whole, **added})


def test_the_readmes_first_screen_has_both_commands():
    first_screen = README.splitlines()[:14]
    assert any(line.startswith("make demo") for line in first_screen)
    assert any(line.startswith("make test") for line in first_screen)
