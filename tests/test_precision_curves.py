"""The tool that compares the precisions: it trains them all, draws what it found and says when one is too far off."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from tests.conftest import child_environment
from tests.runs import ROWS


@pytest.fixture(scope="module")
def tool(repository):
    spec = importlib.util.spec_from_file_location("precision_curves", repository / "tools" / "precision_curves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_means_and_differences(tool, monkeypatch):
    monkeypatch.setattr(tool, "WINDOW", 2)
    assert tool.means([1.0, 3.0, 5.0]) == [2.0, 4.0]
    assert tool.largest_difference([1.0, 3.0, 5.0], [1.0, 2.0, 9.0]) == 1.5
    monkeypatch.setattr(tool, "WINDOW", 20)
    assert tool.means([1.0, 3.0]) == [2.0]


def test_every_variant_is_a_configuration(tool):
    from jaxtune.config import make_config

    for sections, _ in tool.VARIANTS.values():
        tree = {key: {**value, **sections.get(key, {})} for key, value in tool.SECTIONS.items()}
        make_config({**tree, "model": {"path": "m"}, "data": {**tree["data"], "path": "d"}})


def test_a_curve_that_is_not_finite_or_too_far_off_is_not_allowed(tool, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["precision_curves.py", "--out", str(tmp_path), "--model", "m"])
    steps = [3.0, 2.0, 1.0]
    found = {name: list(steps) for name in tool.VARIANTS}
    monkeypatch.setattr(tool, "losses", lambda name, options: found[name])
    assert tool.main() == 0
    for wrong in ([3.0, 2.0, 1.4], [3.0, float("nan"), 1.0]):
        found["adamw_8bit"] = wrong
        assert tool.main() == 1


@pytest.fixture(scope="module")
def docs(repository):
    return repository / "docs"


def test_what_was_measured_lies_within_what_the_page_allows(tool, docs):
    text = (docs / "precision.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.split("| allowed |\n|---|---|---|---|---|\n")[1].splitlines()]
    found = {row[0].strip(): [float(cell.strip() or 0) for cell in row[1:]] for row in rows if len(row) == 5}
    assert found.keys() == tool.VARIANTS.keys()
    (_, base_end, _, _), drawn = found[tool.BASE], curves(docs / "precision.svg")
    for (name, (_, allowed)), line in zip(tool.VARIANTS.items(), drawn, strict=True):
        start, end, largest, stated = found[name]
        assert stated == allowed and abs(end - base_end) <= largest + 1e-4 and largest <= allowed
        assert end < start / 2  # it learnt
        assert max(map(abs, line)) == pytest.approx(largest, abs=2e-4)
        assert line[-1] == pytest.approx(end - base_end, abs=2e-4)


def curves(picture):
    """The lines of the lower half of the picture, in the units of its axis."""
    axes = picture.read_text(encoding="utf-8").split('id="axes_2"')[1]
    ticks = re.findall(r'id="ytick_.*?<use [^>]*y="([\d.]+)".*?<text[^>]*>([^<]+)</text>', axes, re.S)
    (low, low_text), (high, high_text) = ticks[0], ticks[-1]
    low, high, first, last = map(float, (low, high, low_text.replace("\N{MINUS SIGN}", "-"), high_text))
    lines = re.findall(r'<path d="([^"]*)" clip-path', axes)
    heights = [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", line)] for line in lines]
    return [[first + (y - low) * (last - first) / (high - low) for y in line] for line in heights]


def test_the_page_is_the_tools(tool, docs):
    """What is around the numbers is written in one place."""
    before, between, after = re.split(r"\{run\}|\{table\}", tool.PAGE)
    text = (docs / "precision.md").read_text(encoding="utf-8")
    assert text.startswith(before) and between in text and text.endswith(after)


@pytest.mark.thorough
def test_all_variants_train_and_are_drawn(repository, tiny_model, tmp_path):
    pytest.importorskip("matplotlib")
    data = tmp_path / "data.json"
    data.write_text(json.dumps(ROWS))
    command = [sys.executable, repository / "tools" / "precision_curves.py", "--model", tiny_model("qwen2")]
    command += ["--data", data, "--format", "alpaca", "--steps", "5", "--out", tmp_path / "docs"]
    command += ["--home", tmp_path / "runs"]
    done = subprocess.run([*map(str, command)], env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "docs" / "precision.md").read_text(encoding="utf-8")
    assert "(precision.svg)" in page and page.count("\n| float8, ") == 2
    picture = (tmp_path / "docs" / "precision.svg").read_text(encoding="utf-8")
    assert "adamw_8bit" in picture and len(picture) < 100_000
