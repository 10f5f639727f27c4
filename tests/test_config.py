"""A configuration says what it means, or one message says where it does not."""

import random
import re
from pathlib import Path

import pytest

from jaxtune.config import MAX_CONFIG_BYTES, Config, dump_config, load_config, make_config, parse_yaml
from jaxtune.elsewhere import ELSEWHERE, VALUES
from jaxtune.errors import ConfigError
from jaxtune.mistakes import Place
from jaxtune.tune import METHODS

SMALLEST = "model: {path: m}\ndata: {path: d.json}\n"
EMPTY = "is empty: name a file, a directory or the id of a data set"


def load(tmp_path, text, *overrides) -> Config:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, overrides)


def refused(tmp_path, text, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


def beside(text: str) -> str:
    """A whole configuration with this in it."""
    return "\n".join([*(line for line in SMALLEST.splitlines() if line[:5] != text[:5]), text])


def test_every_key_but_two_has_a_default_and_they_are_the_contract_s(tmp_path):
    config = load(tmp_path, SMALLEST)
    assert (config.tune.method, config.tune.rank, config.tune.targets) == ("lora", 8, ["q_proj", "v_proj"])
    assert (config.train.steps, config.train.epochs, config.train.batch_size) == (None, 3, 8)
    assert (config.optim.lr, config.optim.warmup, config.optim.clip_norm) == (1e-4, 0.03, 1.0)
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (1, -1, 1)
    assert (config.checkpoint.every, config.checkpoint.keep, config.checkpoint.resume) == (100, 2, "auto")


def test_what_is_written_reads_back_the_same(tmp_path):
    text = SMALLEST + "tune: {targets: all-linear, rank_pattern: {q_proj: 4}}\noptim: {lr: 3.0e-5, clip_norm: null}\n"
    config = load(tmp_path, text, "data.system=你好", "train.steps=7")
    assert load(tmp_path, dump_config(config)) == config


@pytest.mark.parametrize(("written", "number"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("2E+1", 20.0), ("1", 1.0)])
def test_numbers_are_numbers_however_they_are_written(tmp_path, written, number):
    assert load(tmp_path, SMALLEST + f"optim: {{lr: {written}}}").optim.lr == number
    assert load(tmp_path, SMALLEST, f"optim.lr={written}").optim.lr == number


@pytest.mark.parametrize("written", ["010", "0x10", "0b11", "1:30", "-07"])
def test_a_number_is_decimal_or_refused(tmp_path, written):
    for text, overrides in ((SMALLEST + f"train: {{steps: {written}}}", []), (SMALLEST, [f"train.steps={written}"])):
        message = refused(tmp_path, text, *overrides)
        assert f"train.steps: expected integer > 0 or null; found '{written}'" in message
        assert ("; write 10" in message) == (written == "010")


@pytest.mark.parametrize("text", ["You are agent #7 of 9", "# 1", "First line.\nSecond line.", "a\n\n  b", "10 # ten"])
def test_an_override_is_text_to_its_end(tmp_path, text):
    assert load(tmp_path, SMALLEST, f"data.system={text}").data.system == text


def test_an_override_has_no_comments(tmp_path):
    assert refused(tmp_path, SMALLEST, "train.steps=10 # a few").endswith("or null; found '10 # a few'")
    assert "found '[q_proj] # and k_proj'" in refused(tmp_path, SMALLEST, "eval.fraction=[q_proj] # and k_proj")
    config = load(tmp_path, SMALLEST, "tune.rank_pattern={'a #b': 4}", 'data.system="Agent #7"', "train.steps= 3 ")
    assert (config.tune.rank_pattern, config.data.system, config.train.steps) == ({"a #b": 4}, "Agent #7", 3)


def test_an_override_wins_over_the_file_and_makes_sections(tmp_path):
    config = load(tmp_path, SMALLEST + "train: {seed: 1}", "train.seed=2", "eval.fraction=0.1", "tune.targets=[k_proj]")
    assert (config.train.seed, config.eval.fraction, config.tune.targets) == (2, 0.1, ["k_proj"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tune: {rnk: 4}", ["tune.rnk: unknown key", 'did you mean "rank"']),
        ("tunes: {rank: 4}", ["tunes: unknown key", 'did you mean "tune"']),
        ("data: {path: x, columns: {outputt: y}}", ["data.columns.outputt", 'did you mean "output"']),
        ("tune: {zzz: 4}", ["tune.zzz: unknown key. Allowed here: method, adapter, targets"]),
        ("tune: {rank: '8'}", ["tune.rank", "integer", "'8'"]),
        ("tune: {rank: 0}", ["tune.rank", "greater than 0"]),
        ("train: {seed: 4294967296}", ["train.seed", "less than or equal to 2147483647"]),
        (f"train: {{steps: {'9' * 400}}}", ["train.steps", "less than or equal to 2147483647"]),
        (f"train: {{steps: {'9' * 9999}}}", ["not valid YAML"]),
        ("tune: " + "[" * 9999, ["not valid YAML"]),
        ("tune: {rank: true}", ["tune.rank: expected integer > 0; found true"]),
        ("tune: {method: lorra}", ["tune.method", 'did you mean "lora"? Allowed are full, freeze, lora']),
        ("optim: {lr: .nan}", ["optim.lr"]),
        ("optim: {lr: 1.0e-320}", ["optim.lr: is no number of float32: allowed are 0 and, in size, 1.18e-38 to"]),
        ("optim: {weight_decay: 1.0e300}", ["optim.weight_decay: is no number of float32", "found 1e+300"]),
        ("tune: {alpha_pattern: {q_proj: 1.0e300}}", ["tune.alpha_pattern: is no number of float32"]),
        (f"optim: {{eps: {'9' * 300}}}", ["optim.eps: is no number of float32"]),
        ('train: {output_dir: "a\\0b"}', ["train.output_dir: has a NUL character; take it out; found 'a\\x00b'"]),
        ('data: {path: [a, "b\\0"]}', ["data.path: has a NUL character"]),
        ("mesh: {tensor: 2147483648}", ["mesh.tensor", "less than or equal to 2147483647"]),
        ("checkpoint: {keep: 2147483648}", ["checkpoint.keep", "less than or equal to 2147483647"]),
        ("tune: {method: oft, num_cayley_neumann_terms: 2147483648}", ["less than or equal to 2147483647"]),
        ("tune: {method: lokr, decompose_factor: 2147483648}", ["allowed are 1 to 2147483647, or -1"]),
        ("optim: {lr: .inf}", ["optim.lr"]),
        ("optim: {beta1: 1.0}", ["optim.beta1", "less than 1"]),
        ("optim: {momentum: 0.9}", ["momentum belongs to sgd", "adamw"]),
        ("tune: {method: full, rank: 4}", ["rank: belongs to method lora", "with full"]),
        ("checkpoint: {keep: 1}", ["checkpoint.keep", "2"]),
        ("mesh: {data: -1, fsdp: -1}", ["at most one axis may be -1"]),
        ("mesh: {data: 0}", ["size 0"]),
        ("eval: {path: x, fraction: 0.1}", ["eval.path and eval.fraction are both set"]),
        ("train: [1, 2]", ["train"]),
        ("memory: {offload: optimizer}", ["memory.offload: it is a list: write [optimizer]"]),
        ("memory: {remat: blok}", ["memory.remat: allowed: none, dots, block, full, or", 'did you mean "block"?']),
        ("memory: {remat: [gat]}", ["a list of names of query, key", 'did you mean "gate"?']),
        ("memory: {remat: gate}", ["memory.remat: allowed", "write [gate]"]),
        ("tune: {rank: 4, rank: 8}", ['key "rank" stands twice']),
        ("tune: &a {rank: 4}\noptim: *a", ["aliases are not allowed"]),
        ("tune: !!python/object/apply:os.system [id]", ["not valid YAML"]),
        ("1: {rank: 4}", ["key 1 is not a string"]),
        ("tune: {rank: 4", ["not valid YAML"]),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(tmp_path, text, expected):
    message = refused(
        tmp_path, SMALLEST.split("\n")[0] + "\n" + ("" if "data:" in text else "data: {path: d}\n") + text
    )
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "train: [1, 2]",
            "train: expected a section, with keys such as output_dir, steps, epochs and 5 more; found [1, 2]",
        ),
        ("train:", "train: expected a section, with keys such as output_dir, steps, epochs and 5 more; found null"),
        (
            "data: {path: d, packing: inorder}",
            "data.packing: expected true, false or in_order; found 'inorder'; did you mean \"in_order\"?",
        ),
        ("data: {path: 3}", "data.path: expected text or list of text; found 3; put it in quotes to make it text"),
        ("data: {path: null}", "data.path: expected text or list of text; found null"),
        (
            "data: {path: d, train_roles: 'user, tool'}",
            "data.train_roles: expected list of assistant, user, system, tool; found 'user, tool'; "
            "write a list: [user, tool]",
        ),
        ("data: {sources: [{path: a, weight: x}]}", "data.sources.0.weight: expected number > 0 or null; found 'x'"),
        (
            "memory: {offload: [optimiser]}",
            "memory.offload: expected list of optimizer, activations, params; found ['optimiser']; "
            'did you mean "optimizer"?',
        ),
        (
            "model: {path: m, init: rand}",
            "model.init: allowed: pretrained, random; found 'rand'; did you mean \"random\"?",
        ),
        ("tune: {rank_pattern: {q_proj: x}}", "tune.rank_pattern.q_proj: expected integer > 0; found 'x'"),
        ("tune: {targets: [1]}", "tune.targets: expected list of text or text; found [1]"),
        ("tune:", "tune: expected a section with a method, found null"),
        ("optim: {lr: '2e-4'}", "optim.lr: expected number > 0; found '2e-4'; that is text: take the quotes off"),
        (
            "log: {tensorboard: 'true'}",
            "log.tensorboard: allowed: true, false; found 'true'; that is text: take the quotes off",
        ),
        ("train: {steps: 1e3}", "train.steps: expected integer > 0 or null; found 1000.0; write 1000"),
        ("mesh: {zero: true}", "mesh.zero: allowed: 0, 1, 2, 3; found true"),
        ("mesh: {zero: 2.0}", "mesh.zero: allowed: 0, 1, 2, 3; found 2.0; write 2"),
        ("tune: {method: loftq, loftq_bits: 8.0}", "tune.loftq_bits: allowed: 4, 8; found 8.0; write 8"),
        ("train: {steps: 1.5}", "train.steps: expected integer > 0 or null; found 1.5"),
        ("train: {epochs: 1e9}", "train.epochs: should be less than or equal to 100000; found 1000000000.0"),
        ("train: {seed: -1}", "train.seed: should be greater than or equal to 0; found -1"),
        (
            "optim: {name: sgd, beta1: 0.8}",
            "optim.beta1 belongs to adamw, adamw_8bit, adam, lion and would do nothing with sgd",
        ),
        (
            "model: {path: m, double_quant: true}",
            "model.double_quant belongs to quantize nf4 and fp4 and would do nothing without it",
        ),
        (
            "model: {path: m, overrides: {num_hidden_layers: 2}}",
            "model.overrides: the weights of a pretrained model fix its settings; set model.init: random",
        ),
        (
            "data: {path: d, format: text, template: x}",
            "data.template is for conversations and would do nothing with format text",
        ),
        ("eval: {path: x, fraction: 0.1}", "eval.path and eval.fraction are both set; keep one"),
        ("eval: {every: 9}", "eval.every would do nothing without held-out data; set eval.fraction or eval.path"),
        ("data: {path: ''}", f"data.path {EMPTY}"),
        ("data: {path: [a, '']}", f"data.path {EMPTY}"),
        ("data: {sources: [{path: ''}]}", f"data.sources.0.path {EMPTY}"),
        ("eval: {path: ''}", f"eval.path {EMPTY}, or leave it out"),
        ("eval: {path: []}", f"eval.path {EMPTY}, or leave it out"),
    ],
)
def test_a_value_is_refused_in_one_line_of_the_configurations_own_words(tmp_path, text, line):
    assert refused(tmp_path, beside(text)) == f"{tmp_path / 'run.yaml'}: {line}"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("model: {path: m}\n  data: x", "line 2, column 3", "same indentation"),
        ("model:\n\tpath: m", "line 2, column 1", "a tab; indent with spaces"),
        ("model: {path: m", "line 1, column 16", "but got the end; what it belongs to begins at line 1, column 8"),
        ("model: 'x", "line 1, column 10", "the text ends before the quotes do"),
        ("model:\n  path: b: c", "line 2, column 10", "needs quotes"),
        ("model: {<<: {path: m}}", "line 1, column 9", "<<, which merges one section into another, is not allowed"),
        ("model: !own x", "line 1, column 8", "a tag, which begins with !, is not allowed"),
        ("model:\n  path: \0", "line 2, column 9", "is not allowed"),
    ],
)
def test_yaml_that_cannot_be_read_is_shown_by_line_and_column(tmp_path, text, place, words):
    message = refused(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'run.yaml'}: not valid YAML: {place}: ") and words in message
    assert "^" not in message and "unicode string" not in message and "\n" not in message


def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(tmp_path):
    file = f"{tmp_path / 'run.yaml'}"
    text = SMALLEST + "optim: {beta1: 0.8}\ntune: {rnk: 4}"
    assert refused(tmp_path, SMALLEST, "tune.rnak=8").startswith("command line: tune.rnak: unknown key")
    assert refused(tmp_path, SMALLEST, "optim.lr=abc").startswith("command line: optim.lr: expected number")
    assert refused(tmp_path, SMALLEST, "data.columns={a: b}").startswith("command line: data.columns.a: unknown")
    assert refused(tmp_path, SMALLEST, "tune.method=lorra").startswith("command line: tune.method: no method")
    assert refused(tmp_path, SMALLEST, "model.double_quant=true").startswith("command line: model.double_quant")
    assert [line.split(": ")[0] for line in refused(tmp_path, text, "optim.name=sgd", "train.seed=x").splitlines()] == [
        file,
        "command line",
        f"{file} with optim.name=sgd",
    ]
    assert refused(tmp_path, SMALLEST + "log: {zzz: 1}", "tune.method=full").startswith(f"{file}: log.zzz: unknown key")
    full = refused(tmp_path, SMALLEST + "tune: {rank: 4}", "tune.method=full")
    assert full.startswith(f"{file} with tune.method=full: tune.rank: belongs to method lora")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {learning_rate: 1}", ["optim.learning_rate: unknown key; jaxtune calls it optim.lr"]),
        ("learning-rate: 1", ["learning-rate: unknown key; jaxtune calls it optim.lr"]),
        ("tune: {r: 8}", ["tune.r: unknown key; jaxtune calls it tune.rank"]),
        ("model: {path: m, load_in_4bit: true}", ["jaxtune calls it model.quantize: nf4"]),
        ("train: {micro_batch_size: 1}", ["jaxtune calls it train.batch_size (sequences of a whole step"]),
        ("tune: {method: full, r: 8}", ["tune.rank, which belongs to method lora or", "do nothing with full"]),
        ("data: {path: d, weight_decay: 0.1}", ['; did you mean "optim.weight_decay"? Allowed here: path']),
        ("output_dir: x", ['output_dir: unknown key; did you mean "train.output_dir"?']),
        ("eval: {steps: 50}", ["eval.steps: unknown key; jaxtune calls it eval.every"]),
        ("checkpoint: {steps: 50}", ["checkpoint.steps: unknown key; jaxtune calls it checkpoint.every"]),
        ("log: {steps: 50}", ["log.steps: unknown key; jaxtune calls it log.every"]),
        ("optim: {steps: 50}", ['; did you mean "train.steps"?']),
        ("model: {name: m}", ["model.name: unknown key; jaxtune calls it model.path"]),
        ("train: {name: m}", ["train.name: unknown key. Allowed here: output_dir"]),
        ("eval: {batch_size: 2}", ["eval.batch_size: unknown key; held-out data comes in batches of train.batch_size"]),
        ("log: {level: info}", ["log.level: unknown key; how much is printed cannot be chosen"]),
        ("train: {overwrite_output_dir: true}", ["no run is written over: the same train.output_dir goes on"]),
        ("mesh: {dp: 2}", ["mesh.dp: unknown key; jaxtune calls it mesh.data"]),
        ("tune: {init_lora_weights: pissa}", ["calls it tune.init (pissa and loftq are values of tune.method)"]),
        ("tune: {freeze_trainable_layers: 2}", ["calls it tune.freeze_first or", "which belongs to method freeze"]),
        ("data: {path: d, train_on_eos: turn}", ["jaxtune calls it data.turn_end"]),
        ("optim: {name: adamw_torch}", ["found 'adamw_torch'; write adamw"]),
        ("optim: {schedule: constant_with_warmup}", ["found 'constant_with_warmup'; write constant with optim.warmup"]),
        ("data: {path: d, format: openai}", ["data.format", "found 'openai'; write messages"]),
        ("data: {sources: [{path: d, format: completion}]}", ["data.sources.0.format", "'completion'; write text"]),
        ("data: {sources: [{path: d, type: alpaca}]}", ["sources.0.type: unknown key; jaxtune calls it data.format"]),
        ("data: {path: d, type: alpaca}", ["data.type: unknown key; jaxtune calls it data.format"]),
        ("overwrite_cache: true", ["overwrite_cache: unknown key; rows are tokenised by all cores and kept"]),
        ("do_train: true", ["do_train: unknown key; what is done is the command's to say"]),
        ("tune: {method: qlora}", ["no method 'qlora'; write lora with model.quantize: nf4. Allowed are full"]),
        ("mesh: {tensor_model_parallel_size: 2}", ["jaxtune calls it mesh.tensor"]),
        ("zero_optimization: {stage: 2}", ["zero_optimization: unknown key; jaxtune calls it mesh.zero"]),
        ("tune: {add_tokens: [a]}", ["calls it tune.new_tokens, which belongs to method trainable_tokens"]),
        ("train: {save_strategy: epoch}", ["unknown key; counted in steps alone, by checkpoint.every"]),
        ("deepspeed: ds.json", ["deepspeed: unknown key; what it would say is in the sections mesh"]),
        ("tune: {method: [lora]}", ["no method ['lora']", "Allowed are full"]),
    ],
)
def test_a_name_from_elsewhere_is_answered_with_ours(tmp_path, text, expected):
    message = refused(tmp_path, beside(text))
    assert all(part in message for part in expected), message


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_names_from_elsewhere_are_answered_with_is_there(name):
    path, value = re.match(r"([\w.]+)(?:: (.*))?", ELSEWHERE[name]).groups()
    section, key = path.split(".")[:2]
    places = [path, name if "." in name else f"{section}.{name}"]
    ours, theirs = ({Place.of(at.split("."), Config, method).kind for method in METHODS} for at in places)
    assert ours != {None} and theirs == {None}
    if value is not None:
        tree = {"model": {"path": "m"}, "data": {"path": "d"}}
        make_config({**tree, section: {**tree.get(section, {}), key: parse_yaml(value, "")}})


@pytest.mark.parametrize("name", VALUES)
def test_what_values_from_elsewhere_are_answered_with_is_there(tmp_path, name):
    texts = [f"optim: {{name: {name}}}", f"optim: {{schedule: {name}}}", f"data: {{path: d, format: {name}}}"]
    hints = [hint for text in texts for hint in [refused(tmp_path, beside(text)).partition("; write ")[2]] if hint]
    assert hints == [VALUES[name]]


def test_every_mistake_is_told_at_once(tmp_path):
    message = refused(tmp_path, SMALLEST + "tune: {rnk: 4}\noptim: {lr: -1}")
    assert len(message.splitlines()) == 2


def test_missing_sections_are_named(tmp_path):
    assert "data: missing" in refused(tmp_path, "model: {path: m}")
    assert "model.path: missing" in refused(tmp_path, "model: {}\ndata: {path: d}")


@pytest.mark.parametrize("override", ["train.steps", "steps=3", "=3", "train.=3", "--train.steps=3", "model.path.x=1"])
def test_an_override_that_is_none_is_refused(tmp_path, override):
    assert f'override "{override}"' in refused(tmp_path, SMALLEST, override)


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(SMALLEST)
    assert load_config("~/run.yaml").model.path == "m"


def test_files_that_cannot_be_a_configuration(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match="at most"):
        load_config(tmp_path / "huge.yaml")
    assert "expected sections" in refused(tmp_path, "- 1\n- 2")
    empty = refused(tmp_path, "")
    assert "expected sections" in empty and "found nothing" in empty


WHOLE = """model: {path: m, init: random, overrides: {num_hidden_layers: 2}}
data: {path: [a.json, b.jsonl], max_length: 128, columns: {output: answer}}
tune: {method: lora, rank: 8, targets: [q_proj], dropout: 0.1}
train: {steps: 10, seed: 3, skip_spikes: 6.0}
memory: {remat: full, offload: [optimizer]}
precision: {compute: float16, loss_scale: {initial: 8.0}}
"""
PIECES = ["{", "}", "[", "]", ":", ": ", ",", "-", "&a ", "*a", "!!python/name:os.system", "!!binary ", "null", ".inf"]
PIECES += [
    "1e999",
    "-1",
    "true",
    "~",
    "'",
    '"',
    "|",
    ">",
    "#",
    "%",
    "@",
    "\0",
    "\t",
    "\n",
    "\ufeff",
    "\ud800",
    "9" * 30,
]


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_gives_a_configuration_or_one_message(tmp_path, seed):
    draw = random.Random(seed)
    for _ in range(100):
        text = WHOLE
        for _ in range(draw.randint(1, 3)):
            start = draw.randrange(len(text))
            text = text[:start] + draw.choice(PIECES) * draw.randint(0, 2) + text[start + draw.randint(0, 4) :]
        (tmp_path / "c.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            config = load_config(tmp_path / "c.yaml")
        except ConfigError:
            continue
        assert make_config(parse_yaml(dump_config(config), "again")) == config


@pytest.mark.parametrize(
    "text", ["1e-4", "1E5", "010", "0x10", "1:30", "1_000", ".5", "+.inf", "yes", "~", "# 7", "a\n b"]
)
def test_text_that_looks_like_something_else_is_read_back_from_a_run_as_text(text):
    config = make_config({"model": {"path": "m"}, "data": {"path": "d", "system": text}})
    assert make_config(parse_yaml(dump_config(config), "again")) == config


def test_a_dict_serves_in_place_of_a_file():
    assert make_config({"model": {"path": "m"}, "data": {"path": "d"}}).model.path == "m"


def test_a_path_in_a_dict_may_be_a_path(tmp_path):
    tree = {"model": {"path": tmp_path / "m"}, "data": {"sources": [{"path": [tmp_path / "a.json", "b.json"]}]}}
    tree["tune"] = {"adapter": tmp_path / "adapter"}
    config = make_config(tree)
    assert (config.model.path, config.tune.adapter) == (f"{tmp_path / 'm'}", f"{tmp_path / 'adapter'}")
    assert config.data.sources[0].path == [f"{tmp_path / 'a.json'}", "b.json"]
    assert make_config(parse_yaml(dump_config(config), "again")) == config
    with pytest.raises(ConfigError, match=r"^config: train.steps: expected integer > 0 or null; found '/3'$"):
        make_config({**tree, "train": {"steps": Path("/3")}})


def test_a_configuration_cannot_be_changed():
    config = make_config({"model": {"path": "m"}, "data": {"path": "d"}})
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3
