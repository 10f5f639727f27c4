"""GPTQ on a pretrained model: at 4 bits it costs less perplexity than rounding to the same grid."""

import json
import re

import numpy as np
import pytest

from jaxtune.quant.make import Calibration, quantize_model
from jaxtune.quant.makers import GroupedMaker


def write_texts(pages, path) -> str:
    """The paragraphs of prose in our own pages, as data of format text."""
    paragraphs = [
        " ".join(part.split()) for page in pages for part in re.split(r"\n\s*\n", page.read_text(encoding="utf-8"))
    ]
    prose = [text for text in paragraphs if len(text) > 200 and not text.startswith(("```", "|"))]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose), encoding="utf-8")
    return str(path)


@pytest.mark.real
@pytest.mark.slow
def test_gptq_at_4_bits_costs_less_perplexity_than_rounding(smollm2, repository, tmp_path):
    docs = repository / "docs"
    data = write_texts([docs / "parallelism.md", docs / "many_processes.md"], tmp_path / "data.jsonl")
    held = write_texts([repository / "README.md", repository / "CONTRIBUTING.md"], tmp_path / "eval.jsonl")
    calibration = Calibration(data, eval=held, samples=8, length=128)
    cost = {}
    for name, damp in (("gptq", 0.01), ("rtn", None)):
        maker = GroupedMaker(4, 64, damp, act_order=False, symmetric=True)
        made = quantize_model(str(smollm2.llama), tmp_path / name, maker, calibration)
        cost[name] = [np.log(after / before) for before, after in (made.calibration, made.eval)]
    assert all(gptq < rtn for gptq, rtn in zip(cost["gptq"], cost["rtn"], strict=True)), cost
