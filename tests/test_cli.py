"""The commands: exit codes, one message and no traceback for what a person can put right, text alone on stdout."""

import contextlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import jaxtune
from jaxtune import cli, console
from jaxtune.data.report import check_positions
from jaxtune.errors import ConfigError, OutputError, SaveError
from jaxtune.models.config import Rope
from tests.conftest import child_environment
from tests.programs import CONFIG
from tests.runs import sections, write_config


@pytest.fixture(scope="module")
def asked(tiny_model):
    """The tiny model that the commands ask, loaded here for comparison."""
    return jaxtune.load_model(tiny_model("qwen2"))


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """The directory of a finished run with a system line."""
    home = tmp_path_factory.mktemp("cli")
    jaxtune.train(sections(tiny_model("qwen2"), home, steps=2, data={"system": "Count."}))
    return home / "run"


@pytest.fixture
def call(monkeypatch, capsys):
    """call(*arguments, input=None) -> (exit code, stdout, stderr) of the command, in this process."""
    import io

    def call(*arguments, input=""):
        monkeypatch.setattr(console.console, "stderr", False)
        stdin = io.TextIOWrapper(io.BytesIO(input), "utf-8") if isinstance(input, bytes) else io.StringIO(input)
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


def broken(tree, **changes):
    """The configuration with `section__key=value` changed, None taking a key away."""
    for name, value in changes.items():
        section, _, key = name.partition("__")
        tree[section][key] = value
    return tree


# What is wrong, how the configuration is broken or which override is given, what the message names.
WRONG = [
    ("unknown key", {"train__stepz": 3}, [], ["train.stepz", 'did you mean "steps"']),
    ("wrong type", {"train__steps": "three"}, [], ["train.steps", "'three'"]),
    ("missing model", {"model__path": "./no/model"}, [], ["./no/model", "no such"]),
    ("missing data", {"data__path": "no-data.json"}, [], ["no-data.json"]),
    ("wrong column", {"data__columns": {"output": "answer"}}, [], ['no column "answer"', "instruction, output"]),
    ("bad override", {}, ["steps=3"], ['"steps=3"', "section.key=value"]),
    ("override of no key", {}, ["optim.rate=1"], ["command line: optim.rate", "unknown key"]),
    ("override of a wrong type", {}, ["optim.lr=fast"], ["optim.lr", "'fast'"]),
    ("mesh", {"mesh": {"fsdp": 3}}, [], ["mesh", "3"]),
    ("batch", {}, ["train.micro_batches=3"], ["train.batch_size 8", "3"]),
    ("target", {"tune__targets": ["q_prj"]}, [], ["q_prj", "q_proj"]),
]


@pytest.mark.parametrize(("changes", "overrides", "named"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_input_ends_with_one_message_and_code_2_and_writes_nothing(
    call, tiny_model, tmp_path, changes, overrides, named
):
    tree = sections(tiny_model("qwen2"), tmp_path / "home")
    tree = {**tree, **changes} if "mesh" in changes else broken(tree, **changes)
    config = write_config(tmp_path / "config.yaml", tree)
    code, _, err = call("train", "--config", config, *overrides)
    assert code == 2
    for name in named:
        assert name in err
    assert "Traceback" not in err
    run = tmp_path / "home" / "run"
    assert not run.exists() or not (run / "ledger.jsonl").exists()


def test_a_wrong_target_is_told_before_the_data_is_read(call, tiny_model, tmp_path):
    tree = broken(sections(tiny_model("qwen2"), tmp_path), tune__targets=["q_prj"], data__path="none.json")
    code, out, err = call("train", "--config", write_config(tmp_path / "config.yaml", tree))
    assert code == 2 and "q_prj" in err
    assert "Reading the data" not in out + err


def test_what_is_odd_about_lengths_and_ranks_is_told_and_trained_all_the_same(call, tiny_model, tmp_path):
    tree = sections(tiny_model("qwen2"), tmp_path, steps=1, tune={"method": "lora", "rank": 97})
    config = write_config(tmp_path / "config.yaml", tree)
    positions = json.loads((tiny_model("qwen2") / "config.json").read_text())["max_position_embeddings"]
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "a", "output": "b c " * positions}] * 8))
    code, out, err = call("train", "--config", config, f"data.max_length={4 * positions}")
    assert code == 0, err
    assert "Warning: tune.rank or rank_pattern: a rank above both sides of a weight (97 on q_proj, of 64 and 64;" in out
    assert f"the model knows {positions} positions (max_position_embeddings)" in out
    code, out, err = call("train", "--config", config, f"train.output_dir={tmp_path / 'other'}", "tune.rank=64")
    assert code == 0 and "above both sides" not in out and "max_position_embeddings" not in out


@pytest.mark.parametrize(
    ("longest", "kind", "told"), [(99, "default", True), (98, "default", False), (99, "yarn", False)]
)
def test_only_a_model_that_does_not_go_on_behind_its_positions_is_told_of(capsys, longest, kind, told):
    model = replace(CONFIG, max_positions=100, rope=Rope(type=kind))
    check_positions(SimpleNamespace(examples=SimpleNamespace(lengths=np.array([3, longest])), virtual=range(2)), model)
    assert ("has 101 tokens, and the model knows 100 positions" in capsys.readouterr().out) == told


def test_a_missing_config_is_named(call, tmp_path):
    code, _, err = call("train", "--config", tmp_path / "none.yaml")
    assert (code, err) == (2, f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory\n")


def test_the_module_prints_the_message_alone_and_no_traceback(run_cli, tmp_path):
    done = run_cli("--config", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert done.stderr == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["train", "--confg", "x.yaml"],
        ["fly"],
        ["generate", "--prompt", "x"],
        ["generate", "--model", "m", "--run", "r", "--prompt", "x"],
        ["generate", "--model", "m"],
        ["generate", "--model", "m", "--prompt", "x", "--message", "y"],
        ["generate", "--model", "m", "--prompt", "x", "--system", "y"],
        ["generate", "--model", "m", "--prompt", "x", "--max-new-tokens", "many"],
        ["export", "--run", "r", "--out", "o"],
        ["doctor", "x.yaml"],
        ["doctor", "optim.lr=1"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_code_2(call, arguments):
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert err.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "./no/model", "--prompt", "x"], "no such file"),
        (["generate", "--run", ".", "--prompt", "x"], "not a run"),
        (["generate", "--model", "MODEL", "--prompt", "x", "--temperature", "-1"], "temperature -1"),
        (["generate", "--model", "MODEL", "--prompt", "x", "--top-k", "5"], "temperature 0"),
        (["generate", "--model", "MODEL", "--prompt", ""], "no token"),
        (["generate", "--model", "MODEL", "--prompt", "x", "--dtype", "int4"], "int4"),
        (["generate", "--model", "MODEL", "--adapter", "none", "--prompt", "x"], "none"),
        (["export", "--run", "none", "--out", "o", "--format", "hf"], "not a run"),
        (["export", "--run", "none", "--out", "o", "--format", "zip"], "allowed: peft, hf"),
        (["chat", "--model", "MODEL", "--top-p", "2"], "top_p 2"),
        (["combine", "a", "b", "--weights", "0.7", "0.3", "--out", "o"], "a number; write --weights 0.7,0.3, without"),
        (["combine", "a", "b", "--out", "o", "--weights", "0.7,", ".3"], "a number; write --weights 0.7,.3, without"),
        (["combine", "a", "b", "--weights", "0.7;0.3", "--out", "o"], "--weights '0.7;0.3': expected numbers with"),
        (["combine", "a", "b", "--weights", "1", "--out", "o"], "2 adapters and 1 weights"),
    ],
)
def test_what_is_wrong_with_a_model_or_a_setting_is_said(call, tiny_model, arguments, message):
    arguments = [str(tiny_model("qwen2")) if argument == "MODEL" else argument for argument in arguments]
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_generate_writes_the_text_alone(call, tiny_model, asked):
    out = call("generate", "--model", tiny_model("qwen2"), "--prompt", "My name is", "--max-new-tokens", 20)
    assert out[:2] == (0, asked.generate("My name is", 20) + "\n")


def test_generate_puts_a_message_through_the_template_with_its_system_line(call, tiny_model, asked):
    arguments = [
        "--message",
        "Hello",
        "--system",
        "Be brief.",
        "--max-new-tokens",
        20,
        "--temperature",
        "1",
        "--seed",
        5,
    ]
    code, out, _ = call("generate", "--model", tiny_model("qwen2"), *arguments)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (code, out) == (0, asked.generate(messages, 20, temperature=1.0, seed=5) + "\n")


def test_generate_asks_a_run_with_the_system_line_of_its_data(call, run):
    code, out, _ = call("generate", "--run", run, "--message", "What is 3?", "--max-new-tokens", 20)
    assert (code, out) == (0, jaxtune.load_model(run).generate([{"role": "user", "content": "What is 3?"}], 20) + "\n")


def test_generate_takes_an_adapter(call, run, tiny_model):
    base, adapter = tiny_model("qwen2"), run / "adapter"
    out = call("generate", "--model", base, "--adapter", adapter, "--prompt", "My", "--max-new-tokens", 20)
    assert out[:2] == (0, jaxtune.load_model(base, adapter=adapter).generate("My", 20) + "\n")


def test_chat_remembers_the_turns_until_it_is_reset(call, tiny_model, asked):
    said = "Who are you?\nAnd I?\n/nonsense\n\n/reset\nAnd I?\n/exit\nnever asked\n"
    code, out, err = call("chat", "--model", tiny_model("qwen2"), "--max-new-tokens", 10, input=said)
    first = [{"role": "user", "content": "Who are you?"}]
    one = asked.generate(first, 10)
    two = asked.generate([*first, {"role": "assistant", "content": one}, {"role": "user", "content": "And I?"}], 10)
    three = asked.generate([{"role": "user", "content": "And I?"}], 10)
    assert code == 0
    assert out == f"{one}\n{two}\n{three}\n"
    assert "There is no /nonsense" in err
    assert two != three


def test_chat_goes_on_after_a_question_that_is_too_long(call, tiny_model, asked):
    said = "word " * 300 + "\nHello\n"
    code, out, err = call("chat", "--model", tiny_model("qwen2"), "--max-new-tokens", 10, input=said)
    assert code == 0
    assert "256 positions" in err
    assert out == asked.generate([{"role": "user", "content": "Hello"}], 10) + "\n"


def test_chat_goes_on_after_what_is_not_utf8(call, tiny_model, asked):
    said = b"caf\xe9\nHello\n"
    code, out, err = call("chat", "--model", tiny_model("qwen2"), "--max-new-tokens", 10, input=said)
    assert code == 0
    assert "the text is not UTF-8: 'caf\\udce9'\n" in err
    assert out == asked.generate([{"role": "user", "content": "Hello"}], 10) + "\n"


def test_export_says_how_far_the_files_are_from_the_run(call, run, tmp_path):
    code, out, _ = call("export", "--run", run, "--out", tmp_path / "out", "--format", "hf")
    assert code == 0
    assert re.search(r"largest logit difference against the run is \d\.\d\de-\d\d \(allowed: 0\.001", out)
    assert (tmp_path / "out" / "config.json").exists()


def test_train_runs_and_the_same_command_again_has_nothing_to_do(call, tiny_model, tmp_path):
    config = write_config(tmp_path / "c.yaml", sections(tiny_model("qwen2"), tmp_path))
    code, out, _ = call("train", "--config", config, "train.steps=2")
    assert code == 0
    assert "step 2/2" in out
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    code, out, _ = call("train", "--config", config, "train.steps=2")
    assert code == 0
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before


def test_a_run_whose_only_step_has_no_learning_rate_is_told(call, tiny_model, tmp_path):
    config = write_config(tmp_path / "c.yaml", sections(tiny_model("qwen2"), tmp_path, steps=1))
    told = [
        " ".join(
            call("train", "--config", config, f"optim.warmup={n}", f"train.output_dir={tmp_path / str(n)}")[1].split()
        )
        for n in (1, 0)
    ]
    assert ["learning rate of 0 and changes nothing" in out for out in told] == [True, False]


@pytest.mark.slow
def test_sigterm_ends_a_run_with_143_after_a_save(tiny_model, tmp_path):
    config = write_config(tmp_path / "c.yaml", sections(tiny_model("qwen2"), tmp_path, steps=100_000))
    command = [sys.executable, "-m", "jaxtune.train", "--config", str(config), "checkpoint.every=100000"]
    ledger = tmp_path / "run" / "ledger.jsonl"
    process = subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 240
        while not (ledger.exists() and ledger.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert b"Traceback" not in err
    steps = [json.loads(line)["step"] for line in ledger.read_text().splitlines()]
    assert [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()] == steps[-1:]


@pytest.mark.parametrize(("is_terminal", "written"), [(True, "a[2Jb\n\tc😀"), (False, "a\x1b[2J\x07b\n\tc😀")])
def test_a_models_text_does_not_steer_the_terminal(monkeypatch, is_terminal, written):
    import io

    stdout = io.StringIO()
    stdout.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", stdout)
    cli._write("a\x1b[2J\x07b\n\tc😀")
    assert stdout.getvalue() == written


def code_and_message(error, capsys):
    with pytest.raises(SystemExit) as left, cli._one_line_errors():
        raise error
    return left.value.code, capsys.readouterr().err


def test_each_kind_of_ending_has_its_code(capsys):
    class JaxRuntimeError(RuntimeError):
        pass

    assert code_and_message(ConfigError("what is wrong"), capsys) == (2, "what is wrong\n")
    assert code_and_message(SaveError("the disk is full"), capsys) == (1, "the disk is full\n")
    assert code_and_message(KeyboardInterrupt(), capsys) == (130, "Stopped by Ctrl-C.\n")
    assert code_and_message(SystemExit(143), capsys) == (143, "")
    code, message = code_and_message(JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), capsys)
    assert code == 1
    assert message.startswith("Out of memory: RESOURCE_EXHAUSTED")
    assert "train.batch_size" in message
    assert code_and_message(MemoryError(), capsys)[0] == 1


ASSERTS = compile("def backends(): assert None is not None", "jax/_src/xla_bridge.py", "exec")


def test_devices_that_the_environment_asks_for_and_that_are_not_here_are_told(monkeypatch, capsys):
    text = "Unable to initialize backend 'tpu': no libtpu.so (os error 2) (set JAX_PLATFORMS='' to choose)"
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="Unable to initialize"):
        code_and_message(RuntimeError(text), capsys)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    code, message = code_and_message(RuntimeError(text), capsys)
    assert code == 2 and message.startswith("JAX_PLATFORMS=tpu: JAX cannot start: Unable to initialize backend 'tpu': ")
    assert "no libtpu.so (os error 2); unset what does not fit this machine" in message
    names = {}
    exec(ASSERTS, names)
    with pytest.raises(AssertionError) as caught:  # as of JAX_PLATFORMS=cuda where there is no GPU
        names["backends"]()
    assert (
        "JAX_PLATFORMS=tpu: JAX cannot start: no such device is here; unset"
        in code_and_message(caught.value, capsys)[1]
    )
    with pytest.raises(AssertionError):  # our own
        code_and_message(AssertionError(), capsys)


def test_a_platform_that_jax_does_not_know_is_told_without_a_traceback(run_cli, tiny_model):
    asked = "--model", tiny_model("qwen2"), "--prompt", "x"
    done = run_cli("generate", *asked, module="jaxtune", env={"JAX_PLATFORMS": "tpux"})
    told = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and told.startswith("JAX_PLATFORMS=tpux") and ": JAX cannot start: Unable to" in told
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_a_library_is_imported_is_ctrl_c(capsys):
    error = ImportError("Encountered an error while initializing the extension.")
    error.__cause__ = KeyboardInterrupt()
    assert code_and_message(error, capsys) == (130, "Stopped by Ctrl-C.\n")


IMPORTS = """
import os, signal, sys
class Pressed:
    def find_spec(self, name, *_):
        if name == "jaxtune.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Pressed())
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from jaxtune.__main__ import main
main(["--version"])
"""


def test_ctrl_c_before_the_command_has_begun_ends_it_without_a_traceback(run_python):
    done = run_python(IMPORTS)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


COLLECTED = """
import gc, os, signal, time
from jaxtune import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
def press(phase, info):
    gc.callbacks.remove(press)
    os.kill(os.getpid(), signal.SIGINT)
with cli._one_line_errors():
    gc.callbacks.append(press)
    gc.collect()
    time.sleep(60)
"""


def test_ctrl_c_while_python_collects_garbage_is_not_lost(run_python):
    done = run_python(COLLECTED)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Stopped by Ctrl-C.\n")


def test_our_own_mistakes_keep_their_traceback(call, monkeypatch):
    def fails(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr("jaxtune.config.load_config", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.app(["train", "--config", "x"], standalone_mode=True)


def test_the_version_and_the_help_answer_at_once(call, run_python):
    assert call("--version")[:2] == (0, f"jaxtune {jaxtune.__version__}\n")
    code = "import sys, jaxtune.cli; print([m for m in ('jax', 'numpy', 'pydantic', 'rich') if m in sys.modules])"
    assert "jax" not in run_python(code).stdout.replace("jaxtune", "")
    start = time.monotonic()
    done = run_python("from jaxtune.cli import main; main(['--help'])")
    assert time.monotonic() - start < 10
    for name in ("train", "generate", "chat", "export"):
        assert f" {name} " in done.stdout


def test_a_reader_that_leaves_early_is_no_failure_to_report(tiny_model):
    command = [sys.executable, "-m", "jaxtune", "generate", "--model", str(tiny_model("qwen2")), "--prompt", "x"]
    process = subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 1
    assert b"Traceback" not in said
    assert b"BrokenPipe" not in said


needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is Linux's")


@needs_dev_full
def test_an_answer_that_a_full_disk_does_not_take_ends_with_one_message_and_code_1(tiny_model):
    command = [sys.executable, "-m", "jaxtune", "generate", "--model", str(tiny_model("qwen3")), "--prompt", "x"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=child_environment(), stdout=full, stderr=subprocess.PIPE, check=False)
    told = done.stderr.decode().splitlines()
    assert (done.returncode, told[-1]) == (1, "the output cannot be written: No space left on device")
    assert len(told) == 2 and told[0].startswith("Loading ")


@needs_dev_full
def test_a_run_goes_on_where_its_words_find_no_room_and_others_do_not(tiny_model, tmp_path, monkeypatch, capsys):
    model = tiny_model("qwen2")  # with bars of transformers', which flush stdout
    monkeypatch.setattr(console.console, "goes_on", False)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OutputError, match="the output cannot be written"):
            console.say("an answer")
        rows = jaxtune.train(sections(model, tmp_path, steps=2, log={"every": 1}))
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert [row["step"] for row in rows] == [1, 2]
    assert capsys.readouterr().err.count("cannot be written: No space left on device; the work goes on without it") == 1


def test_streams_that_were_closed_are_taken_for_empty_ones(tiny_model):
    command = [sys.executable, "-m", "jaxtune", "chat", "--model", str(tiny_model("qwen2")), "--max-new-tokens", "3"]
    shell = ["sh", "-c", f"{shlex.join(command)} <&- >&-"]
    done = subprocess.run(shell, env=child_environment(), stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_what_a_terminal_has_no_bytes_for_is_escaped(tiny_model, tmp_path):
    row = '{"instruction": "a", "output": "\u5b6b", "half \\ud83d": 1}\n'
    (tmp_path / "data.jsonl").write_text(row, encoding="utf-8")
    tree = {"model": {"path": str(tiny_model("qwen2"))}, "data": {"path": "data.jsonl", "format": "alpaca"}}
    write_config(tmp_path / "c.yaml", tree)
    command = [sys.executable, "-m", "jaxtune", "preview", "--config", "c.yaml"]
    environment = {**child_environment(), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb'"half \ud83d" (in 1 rows)' in done.stdout
    assert rb"\u5b6b" in done.stdout
