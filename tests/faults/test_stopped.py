"""SIGTERM at awkward moments of a run: a step that is under way is finished and saved, and the exit code is 143."""

import os
import signal
import time

import pytest

import jaxtune.loop as loop
from jaxtune.checkpoint import Checkpointer, latest_valid
from jaxtune.config import make_config
from tests.peer import read_jsonl
from tests.runs import sections, stopped_after, unfinish


def terminated_in(function):
    """The function, in whose first call this process is sent SIGTERM, and heard of it when it goes on."""
    numbers = [signal.SIGTERM]  # a second one would stop the process at once

    def run(*arguments):
        while numbers:
            os.kill(os.getpid(), numbers.pop())
            time.sleep(0.2)
        return function(*arguments)

    return run


@pytest.mark.parametrize(
    ("owner", "name", "saved"),
    [(Checkpointer, "_finish", 3), (loop, "evaluate", 2)],
    ids=["in a save", "in an evaluation"],
)
def test_the_step_is_finished_and_saved(tiny_model, tmp_path, monkeypatch, owner, name, saved):
    tree = sections(tiny_model("qwen2"), tmp_path, steps=50, eval={"fraction": 0.1, "every": 2})
    monkeypatch.setattr(owner, name, terminated_in(getattr(owner, name)))
    with pytest.raises(SystemExit) as left:
        loop.train(make_config(tree))
    assert left.value.code == 143
    newest = latest_valid(tmp_path / "run" / "checkpoints")
    steps = (tmp_path / "run" / "ledger.jsonl").read_bytes().count(b"\n")
    assert newest == steps and saved <= newest < 50


@pytest.mark.parametrize("every", [1, 100])
def test_a_run_that_ends_where_it_was_stopped_is_evaluated(tiny_model, tmp_path, every):
    log = {"every": every, "tensorboard": True}
    tree = sections(tiny_model("qwen2"), tmp_path, steps=9, eval={"fraction": 0.2}, log=log)
    with pytest.raises(SystemExit):
        stopped_after(3, make_config(tree))
    done = latest_valid(tmp_path / "run" / "checkpoints")
    tree["train"]["steps"] = done
    for _ in range(2):
        last = loop.train(make_config(tree))[-1]
        ledger = read_jsonl(tmp_path / "run" / "ledger.jsonl")[-1]
        assert last["step"] == ledger["step"] == done and last["loss"] == float.fromhex(ledger["loss"])
        assert last["eval_loss"] > 0 and (last["lr"] is None) == (every == 100)
        assert (tmp_path / "run" / "metrics.jsonl").read_text().count("eval_loss") == 1
        unfinish(tmp_path / "run")  # as if it had been killed as it wrote its result


def test_what_a_longer_run_leaves_out_is_told(tiny_model, tmp_path, capsys):
    """20 rows in steps of 8: the last step of an epoch has 4."""
    tree = sections(tiny_model("qwen2"), tmp_path, steps=None, data={"packing": False})
    tree["train"]["epochs"] = 1
    loop.train(make_config(tree))
    tree["train"]["epochs"] = 2
    loop.train(make_config(tree))
    words = " ".join(capsys.readouterr().out.split())
    assert "the run ended at step 3, of 4 rows; the next 4, which would have filled it, are left out" in words
    assert words.count("are left out") == 1


@pytest.mark.parametrize("name", ["_compile", "build_data"])
def test_before_the_first_step_nothing_is_waited_for(tiny_model, tmp_path, monkeypatch, capsys, name):
    tree = sections(tiny_model("qwen2"), tmp_path, steps=2)
    with monkeypatch.context() as patched:
        patched.setattr(loop, name, terminated_in(getattr(loop, name)))
        with pytest.raises(SystemExit) as left:
            loop.train(make_config(tree))
    assert left.value.code == 143
    words = " ".join(capsys.readouterr().out.split())
    assert "SIGTERM: stopping before the first step; once more stops at once" in words
    assert not (tmp_path / "run" / "ledger.jsonl").exists() and latest_valid(tmp_path / "run" / "checkpoints") is None
    assert ("Compiling" in words) == (name == "_compile")
    assert len(loop.train(make_config(tree))) == 2
