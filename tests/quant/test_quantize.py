"""`jaxtune quantize`: its checkpoints are read by others to the same numbers, and its perplexities are the models'.

The peers are transformers' Llama for the dequantised weights, transformers with bitsandbytes for bitsandbytes' files,
and for GPTQ's the reader of tests/quant/checkpoints.py, which reads what AutoGPTQ and GPTQModel packed.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxtune
from jaxtune.errors import ConfigError, ModelError
from jaxtune.quant import make as making
from jaxtune.quant.make import Calibration, quantize_model
from jaxtune.quant.makers import FourBitMaker, GroupedMaker, Int8Maker
from tests.peer import TEXT
from tests.quant.checkpoints import dequantised
from tests.quant.support import dequantized_logits
from tests.quant.test_grouped_checkpoints import copied

LENGTH = 32
TOKENS = np.random.default_rng(0).integers(0, 384, (2, 24))
MAKERS = {
    "gptq": GroupedMaker(4, 32, 0.01, act_order=True, symmetric=False),
    "rtn": GroupedMaker(3, -1, None, act_order=False, symmetric=True),
    "nf4": FourBitMaker(double=True),
    "int8": Int8Maker(),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts that are each longer than a row: (the file, their tokens)."""
    from tests.peer import tokenizer

    texts = [TEXT[i:] for i in range(0, 60, 6)]
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path), np.array([tokenizer()(text)["input_ids"][:LENGTH] for text in texts])


@pytest.fixture(scope="module")
def make(tiny_model, data, tmp_path_factory):
    """make(method) -> what was made of the tiny Llama, once."""
    made = {}

    def run(method: str):
        if method not in made:
            out = tmp_path_factory.mktemp("made") / method
            calibration = Calibration(data[0], eval=data[0], samples=10, length=LENGTH)
            made[method] = quantize_model(str(tiny_model("llama")), out, MAKERS[method], calibration)
        return made[method]

    return run


@pytest.fixture
def call(tiny_model, tmp_path, capsys):
    """call(*options) -> (exit code, stdout, stderr) of the command on the tiny Llama, without data."""
    from jaxtune import cli

    def call(*options):
        with pytest.raises(SystemExit) as left:
            cli.main(["quantize", "--model", str(tiny_model("llama")), "--out", str(tmp_path / "out"), *options])
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


def perplexity(path, tokens: np.ndarray) -> float:
    logits = jaxtune.load_model(path).logits(tokens)[:, :-1].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(np.exp(-np.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()))


@pytest.mark.parametrize("method", MAKERS)
def test_the_perplexities_are_those_of_the_model_and_of_what_was_written(make, tiny_model, data, method):
    made = make(method)
    expected = perplexity(tiny_model("llama"), data[1]), perplexity(made.directory, data[1])
    np.testing.assert_allclose(made.calibration, expected, rtol=1e-4)
    np.testing.assert_allclose(made.eval, expected, rtol=1e-4)
    assert not np.isclose(*expected, rtol=1e-4)


def test_a_gptq_checkpoint_has_the_same_weights_elsewhere(make, tiny_model):
    """The reference's weights in transformers' Llama give the logits of the checkpoint in jaxtune."""
    import torch
    from transformers import LlamaForCausalLM

    directory = make("gptq").directory
    found = load_file(directory / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    replaced = 0
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight")
        own = {
            part: found[f"{module}.{part}"]
            for part in ("qweight", "qzeros", "scales", "g_idx")
            if f"{module}.{part}" in found
        }
        if own:
            weight.data = torch.tensor(dequantised(own, 4, 1))
            replaced += 1
    assert replaced == 14
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(jaxtune.load_model(directory).logits(TOKENS), expected, atol=1e-4)


def test_the_settings_are_those_that_transformers_and_gptq_tools_read(make):
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils.quantization_config import GPTQConfig

    directory = make("gptq").directory
    config = GPTQConfig.from_dict(AutoConfig.from_pretrained(directory).quantization_config)
    assert (config.bits, config.group_size, config.desc_act, config.sym, config.format) == (4, 32, True, False, "gptq")
    assert json.loads((directory / "quantize_config.json").read_text())["damp_percent"] == 0.01
    assert AutoTokenizer.from_pretrained(directory)("one, two")["input_ids"]
    groups = load_file(directory / "model.safetensors")["model.layers.0.mlp.down_proj.g_idx"]
    assert sorted(groups) == sorted(np.arange(96) // 32)
    assert not np.array_equal(groups, np.arange(96) // 32)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_bitsandbytes_reads_its_checkpoints_to_the_same_logits(make, method):
    directory = make(method).directory
    expected = dequantized_logits(directory, TOKENS)
    # transformers dequantises int8 through the model's own type, float32 here.
    np.testing.assert_allclose(jaxtune.load_model(directory).logits(TOKENS), expected, atol=1e-4)


def test_gptq_moves_the_outputs_less_than_rounding_to_the_same_grid(tiny_model, data, tmp_path):
    """Logits on the calibration data: the perplexity of a random model may fall as well as rise."""
    expected = jaxtune.load_model(tiny_model("llama")).logits(data[1])
    moved = {}
    for name, damp in (("gptq", 0.01), ("rtn", None)):
        maker = GroupedMaker(3, 32, damp, act_order=True, symmetric=False)
        quantize_model(
            str(tiny_model("llama")), tmp_path / name, maker, Calibration(data[0], samples=10, length=LENGTH)
        )
        moved[name] = np.square(jaxtune.load_model(tmp_path / name).logits(data[1]) - expected).mean()
    assert moved["gptq"] < 0.8 * moved["rtn"], moved


def test_a_config_that_says_null_of_its_quantisation_is_that_of_a_plain_model(tiny_model, tmp_path):
    model = copied(tiny_model("llama"), tmp_path / "model")
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**fields, "quantization_config": None}))
    quantize_model(str(model), tmp_path / "out", MAKERS["int8"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["load_in_8bit"]


def test_what_cannot_be_made_is_refused_and_leaves_nothing(make, tiny_model, data, tmp_path):
    def run(maker, model=None, calibration=None):
        quantize_model(str(model or tiny_model("llama")), tmp_path / "out", maker, calibration or Calibration(data[0]))

    with pytest.raises(
        ConfigError, match=r"--group-size 48 does not divide the 64 inputs of .*allowed: -1, 16, 32, 64"
    ):
        run(GroupedMaker(4, 48, 0.01, False, True))
    with pytest.raises(ConfigError, match="needs calibration data"):
        quantize_model(str(tiny_model("llama")), tmp_path / "out", MAKERS["gptq"])
    with pytest.raises(ModelError, match="is quantised already"):
        run(MAKERS["gptq"], make("int8").directory)
    name = "model.layers.1.mlp.down_proj.weight"
    broken = copied(tiny_model("llama"), tmp_path / "nan", **{name: np.full((64, 96), np.nan, np.float32)})
    with pytest.raises(ModelError, match=f"{name} has numbers that are not finite"):
        run(MAKERS["rtn"], broken)
    assert [entry.name for entry in tmp_path.iterdir()] == ["nan"]


def test_a_model_that_is_there_is_not_replaced(make, tiny_model):
    directory = make("int8").directory
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    for model in (tiny_model("llama"), directory):
        with pytest.raises(ModelError, match="int8: is there already; give a new directory"):
            quantize_model(str(model), directory, MAKERS["nf4"])
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_of_two_that_write_one_directory_the_second_is_refused(make, tiny_model, tmp_path, monkeypatch):
    def meanwhile(*arguments):
        monkeypatch.undo()
        with pytest.raises(ModelError, match="out: another process writes it"):
            quantize_model(str(tiny_model("llama")), tmp_path / "out", MAKERS["nf4"])
        copy(*arguments)

    copy = making._copy
    monkeypatch.setattr(making, "_copy", meanwhile)
    quantize_model(str(tiny_model("llama")), tmp_path / "out", MAKERS["int8"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    written, expected = (load_file(place / "model.safetensors") for place in (tmp_path / "out", make("int8").directory))
    assert written.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name], array)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gtpq"], "--method 'gtpq'; allowed: gptq, rtn, nf4, int8; did you mean \"gptq\"?"),
        (["--method", "rtn", "--desc-act"], "--desc-act is of gptq and would do nothing with --method rtn"),
        (["--method", "nf4", "--bits", "4"], "--bits is of gptq, rtn and would do nothing with --method nf4"),
        (["--method", "gptq", "--bits", "5"], "--bits 5; allowed: 2, 3, 4, 8"),
        (["--method", "gptq", "--damp", "0"], "--damp 0.0; allowed: between 0 and 1"),
        (["--method", "gptq", "--group-size", "0"], "--group-size 0; allowed: -1, or 1 and more"),
        (["--method", "gptq", "--format", "jsonl"], "--format 'jsonl'; allowed: text, alpaca, messages, sharegpt"),
        (["--method", "int8", "--data", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--method", "rtn", "--format", "jsonl"], "--format 'jsonl'; allowed: text, alpaca, messages, sharegpt"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(tiny_model, data, tmp_path, capsys, options, message):
    from jaxtune import cli

    common = ["--model", str(tiny_model("llama")), "--out", str(tmp_path / "out"), "--data", data[0]]
    with pytest.raises(SystemExit) as left:
        cli.main(["quantize", *common, *options])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gptq"], "--method gptq needs --data, rows to quantise for; rtn, nf4 and int8 do without"),
        (["--method", "nf4", "--eval", "e", "--length", "8"], "--eval, --length would do nothing without --data"),
    ],
)
def test_what_needs_data_says_so(call, tmp_path, options, message):
    code, _, err = call(*options)
    assert code == 2 and message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["rtn", "nf4", "int8"])
def test_without_data_the_checkpoint_is_the_same_and_nothing_is_compared(make, call, tiny_model, tmp_path, method):
    made = quantize_model(str(tiny_model("llama")), tmp_path / "alone", MAKERS[method])
    assert made.calibration is None and made.eval is None
    alone, compared = (load_file(path / "model.safetensors") for path in (made.directory, make(method).directory))
    assert alone.keys() == compared.keys()
    for name, array in alone.items():
        np.testing.assert_array_equal(array, compared[name])
    if method == "int8":
        code, out, _ = call("--method", method)
        assert code == 0 and "\nLayer 2 of 2\n" in out and "Perplexity" not in out


def test_rows_that_are_longer_than_the_model_knows_positions_are_told(call, tmp_path):
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"text": TEXT * 4}) + "\n")
    code, out, _ = call("--method", "int8", "--data", str(rows))
    assert code == 0 and "Warning: --length: the longest example has 512 tokens, and the model knows 256" in out
    assert "lower --length to 256" in out


def test_the_command_prints_perplexities(tiny_model, data, tmp_path, capsys):
    from jaxtune import cli

    common = ["--model", str(tiny_model("llama")), "--out", str(tmp_path / "out"), "--data", data[0]]
    with pytest.raises(SystemExit) as left:
        cli.main(["quantize", *common, "--method", "int8", "--samples", "10", "--length", str(LENGTH)])
    assert not left.value.code
    out = capsys.readouterr().out
    assert "Layer 2 of 2: outputs off by" in out
    assert "Perplexity on the calibration data: " in out
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == np.int8
