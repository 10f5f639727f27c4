"""A configuration says what it means, or one message says where it does not."""

import random

import pytest

from jaxtune.config import MAX_CONFIG_BYTES, Config, dump_config, load_config, make_config, parse_yaml
from jaxtune.errors import ConfigError

SMALLEST = "model: {path: m}\ndata: {path: d.json}\n"


def load(tmp_path, text, *overrides) -> Config:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, overrides)


def refused(tmp_path, text, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


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
        ("tune: {rank: true}", ["tune.rank", "True"]),
        ("tune: {method: lorra}", ["tune.method", 'did you mean "lora"? Allowed are full, freeze, lora']),
        ("optim: {lr: .nan}", ["optim.lr"]),
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
    ("text", "place", "words"),
    [
        ("model: {path: m}\n  data: x", "line 2, column 3", "same indentation"),
        ("model:\n\tpath: m", "line 2, column 1", "a tab; indent with spaces"),
        ("model: {path: m", "line 1, column 16", "but got the end; what it belongs to begins at line 1, column 8"),
        ("model: 'x", "line 1, column 10", "the text ends before the quotes do"),
        ("model:\n  path: b: c", "line 2, column 10", "needs quotes"),
        ("model: !own x", "line 1, column 8", "a tag, which begins with !, is not allowed"),
        ("model:\n  path: \0", "line 2, column 9", "is not allowed"),
    ],
)
def test_yaml_that_cannot_be_read_is_shown_by_line_and_column(tmp_path, text, place, words):
    message = refused(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'run.yaml'}: not valid YAML: {place}: ") and words in message
    assert "^" not in message and "unicode string" not in message and "\n" not in message


def test_every_mistake_is_told_at_once(tmp_path):
    message = refused(tmp_path, SMALLEST + "tune: {rnk: 4}\noptim: {lr: -1}")
    assert len(message.splitlines()) == 2


def test_missing_sections_are_named(tmp_path):
    assert "data: missing" in refused(tmp_path, "model: {path: m}")
    assert "model.path: missing" in refused(tmp_path, "model: {}\ndata: {path: d}")


@pytest.mark.parametrize("override", ["train.steps", "steps=3", "=3", "train.=3", "--train.steps=3", "model.path.x=1"])
def test_an_override_that_is_none_is_refused(tmp_path, override):
    assert f'override "{override}"' in refused(tmp_path, SMALLEST, override)


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
    assert "expected sections" in refused(tmp_path, "")


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


def test_a_dict_serves_in_place_of_a_file():
    assert make_config({"model": {"path": "m"}, "data": {"path": "d"}}).model.path == "m"


def test_a_configuration_cannot_be_changed():
    config = make_config({"model": {"path": "m"}, "data": {"path": "d"}})
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3
