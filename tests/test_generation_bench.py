"""The benchmark of generation: both sides answer, and the table has a line for each."""

import sys

import pytest

from tools import generation_bench as tool


def test_the_table_has_the_medians_of_both_sides_and_the_ratio(tiny_model, monkeypatch, capsys):
    rates = {"jaxtune": [30.0, 10.0, 20.0], "transformers": [5.0, 8.0, 4.0]}
    asked = []

    def run(side, **sizes):
        asked.append((side, sizes["dtypes"], sizes["rows"]))
        return {"first": 0.1, "rate": rates[side].pop(), "peak_gb": 1.0, "compile": 2.0}

    monkeypatch.setattr(tool, "run", run)
    monkeypatch.setattr(sys, "argv", ["", "--model", "m", "--dtypes", "float32", "--rows", "2", "--rounds", "3"])
    tool.main()
    *_, ours, theirs = capsys.readouterr().out.splitlines()
    assert ours == "| jaxtune, float32 | 2 | 20.0 | 0.10 | 1.0 | 2.0 | 4.00 |"
    assert theirs == "| transformers, float32 | 2 | 5.0 | 0.10 | 1.0 |  |  |"
    order = [side for side, *_ in asked]
    assert order == ["jaxtune", "transformers", "transformers", "jaxtune", "jaxtune", "transformers"]


@pytest.mark.parametrize("side", tool.SIDES)
def test_a_side_answers_in_a_process_of_its_own(tiny_model, side):
    sizes = {"model": tiny_model("qwen2", vocab_size=41000), "prompt": 5, "new": 64, "dtypes": "bfloat16", "rows": 2}
    found = tool.run(side, **sizes)
    assert found["rate"] > 0 and found["first"] > 0 and found["peak_gb"] > 0.1
    assert (found["compile"] > 0) == (side == "jaxtune")
