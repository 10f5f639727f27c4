"""What a run may change when it goes on, decided for every field; and fingerprints that see every edit."""

import pytest
from pydantic import BaseModel

from jaxtune import drift
from jaxtune.config import Config, make_config
from jaxtune.drift import ALLOW, LOG, REFUSE, RULES, changes, fingerprint, is_print_of
from jaxtune.errors import CheckpointError

BASE = {"model": {"path": "m"}, "data": {"path": "d.json"}}


def config(**sections):
    return make_config({**BASE, **{name: {**BASE.get(name, {}), **fields} for name, fields in sections.items()}})


def fields_of_the_schema():
    for section, field in Config.model_fields.items():
        assert issubclass(field.annotation, BaseModel)
        if section == "tune":
            yield section  # all that a method is told
            continue
        for name in field.annotation.model_fields:
            yield f"{section}.{name}"


def test_every_field_of_the_configuration_has_chosen_and_no_other_has():
    assert sorted(RULES) == sorted(fields_of_the_schema())
    assert set(RULES.values()) == {REFUSE, LOG, ALLOW}


def test_what_makes_the_tree_or_the_data_is_refused():
    for key, rule in RULES.items():
        if key.split(".")[0] in ("model", "tune", "data") and key != "data.cache":
            assert rule == REFUSE, key
    for key in ("train.seed", "train.batch_size", "optim.name", "precision.params", "eval.fraction"):
        assert RULES[key] == REFUSE


def test_equal_configurations_have_no_changes():
    assert changes(config(), config(train={"epochs": 3.0})) == []


@pytest.mark.parametrize(
    ("sections", "line", "rule"),
    [
        ({"train": {"seed": 7}}, "train.seed: was 0, now 7", REFUSE),
        ({"model": {"path": "other"}}, "model.path: was m, now other", REFUSE),
        ({"data": {"path": ["a", "ü"]}}, 'data.path: was d.json, now ["a", "ü"]', REFUSE),
        ({"data": {"columns": {"output": "answer"}}}, "data.columns.output: was output, now answer", REFUSE),
        ({"tune": {"rank_pattern": {"q_proj": 4}}}, "tune.rank_pattern.q_proj: was absent, now 4", REFUSE),
        (
            {"tune": {"alpha_pattern": {"k_proj": 2, "q_proj": 1}}},
            'tune.alpha_pattern, in order: was ["q_proj", "k_proj"], now ["k_proj", "q_proj"]',
            REFUSE,
        ),
        ({"optim": {"lr": 2e-4}}, "optim.lr: was 0.0001, now 0.0002", LOG),
        ({"train": {"steps": 50}}, "train.steps: was null, now 50", LOG),
        ({"mesh": {"data": 2}}, "mesh.data: was 1, now 2", ALLOW),
        ({"train": {"output_dir": "moved"}}, "train.output_dir: was runs/default, now moved", ALLOW),
    ],
)
def test_a_change_is_told_as_a_line_and_has_its_fields_rule(sections, line, rule):
    was = {"tune": {"alpha_pattern": {"q_proj": 1, "k_proj": 2}}} if "alpha_pattern" in str(sections) else {}
    (change,) = changes(config(**was), config(**sections))
    assert (str(change), change.rule) == (line, rule)


def test_rows_that_error_let_pass_may_be_left_out_from_now_on_and_no_others():
    old = config(data={"on_bad_line": "error", "too_long": "error"})
    (bad,) = changes(old, config(data={"on_bad_line": "skip", "too_long": "error"}))
    (long,) = changes(old, config(data={"on_bad_line": "error", "too_long": "drop"}))
    assert (bad.rule, long.rule) == (LOG, LOG)
    (back,) = changes(config(data={"on_bad_line": "skip"}), config(data={"on_bad_line": "error"}))
    (other,) = changes(config(data={"too_long": "drop"}), config(data={"too_long": "truncate"}))
    assert (back.rule, other.rule) == (REFUSE, REFUSE)


def test_what_changed_in_a_source_is_told_by_its_key():
    def of(**second):
        return make_config({**BASE, "data": {"sources": [{"path": "a.json"}, {"path": "b.json", **second}]}})

    (change,) = changes(of(on_bad_line="error"), of(on_bad_line="skip"))
    assert (str(change), change.rule) == ("data.sources.1.on_bad_line: was error, now skip", LOG)
    (change,) = changes(of(), of(system="Count."))
    assert (str(change), change.rule) == ("data.sources.1.system: was null, now Count.", REFUSE)


def test_an_entry_that_is_null_is_not_an_entry_that_is_absent():
    old, new = (config(model={"init": "random", "overrides": overrides}) for overrides in ({}, {"rope": None}))
    assert [str(change) for change in changes(old, new)] == ["model.overrides.rope: was absent, now null"]


@pytest.fixture
def model(tmp_path):
    home = tmp_path / "model"
    home.mkdir()
    (home / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    (home / "config.json").write_text("{}")
    (home / "tokenizer.json").write_text("{}")
    return home


def test_a_copy_elsewhere_is_the_same_model(model, tmp_path):
    before = fingerprint(model)
    model.rename(tmp_path / "moved")
    (tmp_path / "moved" / "model.safetensors").touch()
    (tmp_path / "moved" / "README.md").write_text("about")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / "moved" / name).write_text("another")
    assert fingerprint(tmp_path / "moved") == before


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_a_fingerprint_by_the_rule_of_before_is_still_its_models(model):
    (model / "tokenizer_config.json").write_text("{}")
    before = fingerprint(model, settings=(), endings=(".safetensors", ".safetensors.index.json", "config.json"))
    assert before != fingerprint(model)
    assert is_print_of(before, model) and is_print_of(fingerprint(model), model)
    flip(model / "model.safetensors", 9000)
    assert not is_print_of(before, model)


@pytest.mark.parametrize(
    "edit",
    [
        lambda home: flip(home / "model.safetensors", -1),
        lambda home: flip(home / "model.safetensors", 9000),
        lambda home: (home / "config.json").write_text('{"rope_theta": 5}'),
        lambda home: (home / "quantize_config.json").write_text("{}"),
        lambda home: (home / "adapter_config.json").write_text("{}"),
        lambda home: (home / "model.safetensors").rename(home / "model-1.safetensors"),
        lambda home: (home / "more.safetensors").write_bytes(b""),
        lambda home: (home / "config.json").unlink(),
    ],
)
def test_any_edit_of_weights_or_settings_is_another_model(model, edit):
    before = fingerprint(model)
    edit(model)
    assert fingerprint(model) != before


def test_a_large_file_is_sampled_all_over(model, monkeypatch):
    monkeypatch.setattr(drift, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(drift, "BLOCK", 4)
    monkeypatch.setattr(drift, "STRIDE", 1024)
    before = fingerprint(model)
    flip(model / "model.safetensors", 15 * 1024 + 3)
    assert fingerprint(model) != before
    flip(model / "model.safetensors", 15 * 1024 + 3)
    flip(model / "model.safetensors", 15 * 1024 + 5)  # between two blocks: what a sample cannot see
    assert fingerprint(model) == before


def test_a_gguf_file_is_its_bytes_whatever_its_name(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF and more")
    (tmp_path / "b.gguf").write_bytes(b"GGUF and more")
    assert fingerprint(tmp_path / "a.gguf") == fingerprint(tmp_path / "b.gguf")
    flip(tmp_path / "b.gguf", 7)
    assert fingerprint(tmp_path / "a.gguf") != fingerprint(tmp_path / "b.gguf")


def test_a_file_that_cannot_be_read_is_named(model):
    (model / "gone.safetensors").symlink_to(model / "nowhere")
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: cannot be read: No such file"):
        fingerprint(model)
