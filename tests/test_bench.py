"""The benchmark beside the peers: what its rounds come to, what it tells of a side that fails, and its own sides."""

import json
import math
import sys
from pathlib import Path

import pytest

from jaxtune.config import load_config
from jaxtune.tokenizer import load_tokenizer
from tests.conftest import child_environment
from tests.runs import ROWS, write_config
from tools import bench as tool
from tools.bench_peers import cases, prepare, report


def answer(tokens=1000, seconds=10.0, **more) -> dict:
    """What a side's script prints."""
    times = {"load_seconds": 1.0, "compile_seconds": None, "first_step_seconds": 5.0}
    losses = {"first_loss": 12.0, "last_loss": 11.0}
    return {"tokens": tokens, "supervised": tokens // 4, "seconds": seconds, "peak_gb": 2.0, **times, **losses, **more}


def side(*rates, is_torch=True, **more) -> dict:
    rounds = [answer(seconds=1000 / rate, **more) for rate in rates]
    return {"why": None, "failed": False, "is_torch": is_torch, "rounds": rounds}


@pytest.fixture
def found():
    """A report of three rounds: TRL is the best torch peer, a JAX peer is faster than it, another has failed."""
    sides = {
        "jaxtune": side(150, 120, 180, is_torch=False, compile_seconds=7.0),
        "trainer": side(50, 60, 40),
        "trl": side(100, 60, 110),
        "tunix": side(300, 300, 300, is_torch=False),
        "easydel": {"why": "failed: no memory / at all", "failed": True, "is_torch": False, "rounds": []},
    }
    found = {"device": {"name": "cpu", "platform": "cpu", "matmul_flops": 2e11}, "dtype": "float32"}
    found |= {
        "versions": {"jax": "0.10.2"},
        "cases": {"lora": {"says": "lora", "flops_per_token": 1e9, "sides": sides}},
    }
    report.summarise(found, "jaxtune")
    return found


def test_rounds_come_to_medians_and_their_spread(found):
    mine = found["cases"]["lora"]["sides"]["jaxtune"]["summary"]
    assert [mine[name] for name in ("tokens_per_second", "slowest", "fastest")] == pytest.approx([150, 120, 180])
    assert mine["supervised_per_second"] == pytest.approx(150 / 4)
    assert mine["model_tflops"] == pytest.approx(0.15) and mine["share"] == pytest.approx(0.75)
    assert (mine["compile_seconds"], mine["peak_gb"]) == (7.0, 2.0)
    assert found["cases"]["lora"]["sides"]["trl"]["summary"]["compile_seconds"] is None


def test_the_ratio_is_to_the_best_torch_peer_and_its_spread_is_of_single_rounds(found):
    case = found["cases"]["lora"]
    assert case["best"] == "trl"  # not the JAX peer
    assert case["ratio"] == pytest.approx({"median": 1.5, "lowest": 1.5, "highest": 2.0})


def test_without_a_peer_or_without_ours_there_is_no_ratio():
    alone = side(10, is_torch=False) | {"summary": report.summary([answer()], 1, 1)}
    assert report.against_best({"jaxtune": alone}, "jaxtune") == (None, None)
    peer = side(10) | {"summary": report.summary([answer()], 1, 1)}
    assert report.against_best({"jaxtune": alone | {"why": "failed: x"}, "trl": peer}, "jaxtune") == ("trl", None)


def test_the_table_has_a_row_for_every_side_also_for_one_that_failed(found):
    lines = report.table(found).splitlines()
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in lines if line.startswith("|")}
    assert {len(row) for row in rows.values()} == {len(report.HEAD)}
    assert rows["jaxtune"][0].strip() == "150.0 (120.0 to 180.0)"
    assert [rows[name][-1].strip() for name in ("jaxtune", "trl", "trainer")] == ["1.50", "1.00", "0.50"]
    assert rows["easydel"][0].strip() == "failed: no memory / at all"
    assert lines[-1] == "jaxtune / trl, the best torch peer: 1.50 (1.50 to 2.00 in a round)"


def test_the_numbers_are_written_as_json_and_drawn_as_a_picture(found, tmp_path):
    pytest.importorskip("matplotlib")
    options = tool.parse(["--json", str(tmp_path / "b.json"), "--png", str(tmp_path / "b.png")])
    tool.write(found, options)
    assert json.loads((tmp_path / "b.json").read_text()) == found
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "b.png").stat().st_size > 5000


def test_cases_and_sides_are_chosen_by_patterns(capsys):
    assert tool.matching(cases.CASES, "lora,*-7b") == ["lora", "lora-7b", "qlora-7b"]
    assert tool.matching(cases.SIDES, "jaxtune,trl*") == ["jaxtune", "trl", "trl-liger"]
    with pytest.raises(SystemExit):
        tool.parse(["--cases", "lora-1"])
    assert "--cases: nothing matches lora-1" in capsys.readouterr().err
    assert all(one.script.exists() for one in cases.SIDES.values())


def test_a_jax_peer_is_a_script_here_and_an_interpreter(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cases, "SCRIPTS", tmp_path)
    (tmp_path / "tunix.py").write_text("")
    ((name, peer),) = tool.parse(["--jax-peer", "tunix=/env/bin/python"]).jax_peer
    assert (name, peer.python, peer.script, peer.is_torch) == ("tunix", "/env/bin/python", tmp_path / "tunix.py", False)
    for wrong in ("tunix", "other=/env/bin/python", "trainer=/env/bin/python"):
        with pytest.raises(SystemExit):
            tool.parse(["--jax-peer", wrong])


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize(("on_gpu", "dtype"), [(False, "float32"), (False, "bfloat16"), (True, "bfloat16")])
def test_every_case_is_a_specification_and_a_valid_configuration(name, on_gpu, dtype, tmp_path):
    case, options = cases.CASES[name], tool.parse(["--data", "rows.jsonl", "--steps", "5"])
    spec = tool.specification(case, tmp_path, options, on_gpu, dtype)
    assert set(spec) >= {"model", "rows", "method", "length", "batch", "steps", "warm", "dtype", "lora"}
    assert (spec["steps"], spec["dtype"]) == (5, dtype)
    config = load_config(spec["jaxtune"])
    weights = "float32" if case.method == "full" else dtype  # the peers' full tuning keeps float32 ones, too
    assert (config.precision.compute, config.precision.params) == (dtype, weights)
    assert (config.train.batch_size, config.data.max_length) == (spec["batch"], spec["length"])
    assert config.train.micro_batches == (2 if name in ("lora", "qlora") and not on_gpu else 1)
    assert config.data.format == ("megatron" if case.blocks else "messages")
    assert config.model.quantize == ("nf4" if case.method == "qlora" else None)


SCRIPTS = {
    "loses": "import sys; print('a line'); sys.exit('no such | kernel')",
    "silent": "raise SystemExit(3)",
    "chatty": "print('not an answer')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "slow": "import time; time.sleep(60)",
}
WORDS = {
    "loses": "failed: no such / kernel",
    "silent": "failed: not a word",
    "chatty": "failed: not an answer",
    "killed": "failed: killed by signal 9, perhaps for its memory",
    "slow": "failed: took more than 0.5 s",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_side_that_fails_is_told_with_its_last_words(script, tmp_path):
    (tmp_path / "side.py").write_text(SCRIPTS[script])
    found = {"why": None, "failed": False, "rounds": []}
    tool.take_turn(
        cases.Side(tmp_path / "side.py"),
        found,
        tmp_path / "spec.json",
        tmp_path / "log",
        0.5 if script == "slow" else 30,
    )
    assert found == {"why": WORDS[script], "failed": True, "rounds": []}


def test_sides_run_in_turns_and_a_failure_is_the_exit_code(tmp_path, monkeypatch, capsys):
    """The order is reversed every other round, and a side that failed gets no other turn."""
    log = tmp_path / "turns"
    device = {"platform": "cpu", "name": "cpu", "matmul_flops": 1e11, "dtype": "bfloat16"}
    line = json.dumps(answer() | device | {"flops_per_token": 1e9})
    good = f"import sys; open({str(log)!r}, 'a').write(sys.argv[0][-4] + ' '); print({line!r})"
    for name in ("matmul", "prepare", "a", "b", "c"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('it broke')" if name == "c" else good)
    monkeypatch.setattr(tool, "HOME", tmp_path / "home")
    monkeypatch.setattr(tool, "SCRIPTS", tmp_path)
    sides = {name: cases.Side(tmp_path / f"{name}.py", is_torch=name == "b") for name in "abc"}
    sides["d"] = cases.Side(tmp_path / "d.py", needs=("no_such_package",))
    monkeypatch.setattr(tool, "SIDES", sides)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "3", "--tokenizer", "words"])
    assert tool.main() == 1
    assert [turn for turn in log.read_text().split() if turn in "ab"] == ["a", "b", "b", "a", "a", "b"]
    printed = capsys.readouterr().out
    assert "0.1 TFLOP/s in a matmul alone, bfloat16" in printed
    assert "| c | failed: it broke |" in printed and "| d | not installed: no_such_package |" in printed
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "1", "--tokenizer", "words", "--sides", "a,b,d"])
    assert tool.main() == 0


@pytest.fixture
def spec(tiny_model, tmp_path):
    """A specification of conversations, with what jaxtune and prepare.py read beside it."""
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    model, lora = str(tiny_model("qwen2")), {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}
    data = {"path": str(tmp_path / "data.json"), "max_length": 64, "cache": str(tmp_path / "tokens")}
    train = {"output_dir": str(tmp_path / "run"), "batch_size": 2}
    config = {"model": {"path": model}, "tune": {"method": "lora", **lora}, "data": data, "train": train}
    write_config(tmp_path / "config.json", config | {"log": {"every": 1}})
    data |= {"path": str(tmp_path / "blocks"), "format": "megatron", "max_length": 16}
    write_config(tmp_path / "blocks.json", config | {"data": data})
    spec = {"model": model, "rows": str(tmp_path / "rows.json"), "method": "lora", "length": 64, "batch": 2}
    return spec | {"steps": 2, "warm": 1, "dtype": "float32", "lora": lora, "jaxtune": str(tmp_path / "config.json")}


def prepared(spec, blocks=False) -> tuple[dict, list[dict]]:
    """(what a case is prepared with, its rows)"""
    config = str(Path(spec["jaxtune"]).with_name("blocks.json")) if blocks else spec["jaxtune"]
    plan = {"shape": "0.5B", "words": spec["model"], "conversations": spec["jaxtune"] if blocks else None}
    found = prepare.prepare(plan | {"config": config, "rows": spec["rows"]})
    return found, json.loads(Path(spec["rows"]).read_text())


def test_the_rows_are_jaxtunes_own_and_flops_are_counted(spec):
    found, rows = prepared(spec)
    assert len(rows) == len(ROWS) == found["num_rows"]
    assert all(0 < sum(row["supervised"]) < len(row["input_ids"]) for row in rows)
    assert found["tokens_per_row"] == sum(len(row["input_ids"]) for row in rows) / len(rows)
    assert found["flops_per_token"] > 0


@pytest.mark.real
def test_a_random_model_is_made_with_the_tokenizer_of_a_gguf(smollm2, tiny_model, tmp_path, monkeypatch):
    """As where no other lies beside the checkout; transformers has a class of its own for the type of the model."""
    shape = json.loads((tiny_model("qwen2", vocab_size=49152) / "config.json").read_text())
    monkeypatch.setitem(prepare.SHAPES, "0.5B", shape)
    prepare.make_model("0.5B", smollm2.gguf, tmp_path / "model")
    ids, expected = (load_tokenizer(path)("I am 1234 old.")["input_ids"] for path in (tmp_path / "model", smollm2.gguf))
    assert ids == expected


def test_blocks_are_all_conversations_joined_and_cut(spec):
    """And jaxtune's are the very ones of the other sides: none is shorter."""
    conversations = prepared(spec)[1]
    found, blocks = prepared(spec, blocks=True)
    assert all(row["supervised"] == [0] + [1] * 15 for row in blocks)  # nothing stands before the first
    joined = [token for row in conversations for token in row["input_ids"]]
    assert [row["input_ids"] for row in blocks] == [joined[16 * n :][:16] for n in range(len(joined) // 16)]
    assert found["tokens_per_row"] == 16
    assert prepare.read_rows(load_config(Path(spec["jaxtune"]).with_name("blocks.json"))) == blocks


@pytest.mark.parametrize("name", ["ours.py", pytest.param("trainer.py", marks=pytest.mark.slow)])
def test_a_side_times_real_steps(spec, name, monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", child_environment()["XLA_FLAGS"])  # one device
    prepared(spec)
    found = tool.run(cases.SCRIPTS / name, write_config(tmp_path / "spec.json", spec))
    assert 0 < found["supervised"] < found["tokens"] and found["seconds"] > 0
    assert 0 < found["load_seconds"] < found["first_step_seconds"]
    vocabulary = json.loads((Path(spec["model"]) / "config.json").read_text())["vocab_size"]
    assert found["first_loss"] == pytest.approx(math.log(vocabulary), rel=0.2)
    if name == "ours.py":
        assert found["tokens"] <= spec["steps"] * spec["batch"] * spec["length"] and found["compile_seconds"] > 0
        assert not (tmp_path / "run" / "adapter").exists()  # it ends with the last step
    else:  # shorter steps, so more of them
        assert found["tokens"] > (spec["steps"] * spec["batch"] * spec["length"]) * 0.7
