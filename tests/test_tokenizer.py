"""Tokenizers are loaded without running anybody's code, and must fit the model's embedding."""

import json
import os
import shutil

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxtune.errors import ModelError
from jaxtune.tokenizer import (
    PROBES,
    check_tokenizer,
    first_difference,
    is_tokenizer_print,
    load_as_transformers,
    load_tokenizer,
    pad_id,
    save_tokenizer,
    stop_ids,
    tokenizer_print,
    vocabulary_size,
)


@pytest.fixture
def directory(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    """A warning that is printed once per process is printed once per test, whichever ran before."""
    monkeypatch.setattr("jaxtune.tokenizer._TOLD", set())


def edit(directory, name="tokenizer_config.json", drop=(), **fields):
    path = directory / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in {**values, **fields}.items() if k not in drop}))
    return directory


def test_a_directory_gives_the_tokenizer_that_transformers_gives(directory):
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    text = "<|im_start|>user\nWhat is 42?  小主\n<|im_end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize(
    ("model_type", "kind", "parts"),
    [
        ("llama", "GPT2Tokenizer", {"pre_tokenizer": pre_tokenizers.Digits(individual_digits=True)}),  # as SmolLM2's
        ("qwen2", "PreTrainedTokenizerFast", {"normalizer": normalizers.Lowercase()}),  # qwen2's class takes its place
        ("qwen2", "Qwen2Tokenizer", {"ignore_merges": True}),
    ],
)
def test_a_tokenizer_json_decides_where_transformers_goes_by_the_class(directory, capsys, model_type, kind, parts):
    file = directory / "tokenizer.json"
    core = Tokenizer.from_file(str(file))
    for name, part in parts.items():
        if name == "pre_tokenizer":
            part = pre_tokenizers.Sequence([part, core.pre_tokenizer])
        setattr(core.model if name == "ignore_merges" else core, name, part)
    core.save(str(file))
    edit(edit(directory, tokenizer_class=kind), "config.json", model_type=model_type)
    text = "<|im_start|>User\n\n12  34 It's\n\n1. a<|im_end|>"
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert ours(text)["input_ids"] == core.encode(text).ids
    assert (ours.special_tokens_map, ours.chat_template) == (theirs.special_tokens_map, theirs.chat_template)
    odd = first_difference(ours, theirs)
    assert (odd is None) == (tokenizer_print(ours) == tokenizer_print(theirs))
    told = f"reads it as {type(theirs).__name__}, which cuts some otherwise, such as" in " ".join(
        capsys.readouterr().out.split()
    )
    assert told == (odd is not None)
    assert load_tokenizer(directory).is_fast and not capsys.readouterr().out  # it is said once


def test_a_run_that_learnt_the_cut_of_a_class_keeps_it(directory, capsys):
    edit(edit(directory, tokenizer_class="Qwen2Tokenizer"), "config.json", model_type="qwen2")
    ours, theirs = load_tokenizer(directory), load_as_transformers(directory)
    text = first_difference(ours, theirs)
    assert text is not None
    for noted in (tokenizer_print(theirs), tokenizer_print(theirs, PROBES)):  # of now, and of earlier versions
        capsys.readouterr()
        assert load_tokenizer(directory, noted=noted)(text)["input_ids"] == theirs(text)["input_ids"]
        assert "read as Qwen2Tokenizer, as when the run began" in " ".join(capsys.readouterr().out.split())
    assert load_tokenizer(directory) and not capsys.readouterr().out  # what differs has been said
    for noted in (None, tokenizer_print(ours), "of another"):
        assert load_tokenizer(directory, noted=noted)(text)["input_ids"] == ours(text)["input_ids"]


def test_a_config_that_transformers_does_not_take_is_named(directory):
    edit(directory, "config.json", model_type="qwen2", use_cache=None)
    with pytest.raises(ModelError, match=r"words/config\.json: transformers, .*use_cache.*; put it right"):
        load_tokenizer(directory)
    (directory / "tokenizer.json").write_text("{")
    edit(directory, "config.json", use_cache=True)
    with pytest.raises(ModelError, match="words: the tokenizer cannot be loaded"):
        load_tokenizer(directory)


def test_the_kind_of_merging_is_the_files_and_no_token_is_invented(tmp_path):
    core = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁ab", -1.0), ("a", -3.0), ("b", -3.0)], 0)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(tmp_path)
    for kind, model_type in (("LlamaTokenizer", "llama"), ("Qwen2Tokenizer", "qwen2")):
        edit(edit(tmp_path, tokenizer_class=kind, legacy=False), "config.json", model_type=model_type)
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer("ab ab", add_special_tokens=False)["input_ids"] == core.encode("ab ab").ids == [3, 3]
        assert vocabulary_size(tokenizer) == 6


def test_a_template_file_takes_the_place_of_the_tokenizers_own(directory, tmp_path):
    for start in ("", "\ufeff"):  # a byte order mark is no part of it
        (tmp_path / "t.jinja").write_text(start + "{{ messages[0].content }}!", encoding="utf-8")
        tokenizer = load_tokenizer(directory, str(tmp_path / "t.jinja"))
        assert tokenizer.apply_chat_template([{"role": "user", "content": "Ho"}], tokenize=False) == "Ho!"


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"x" * (2 << 20)])
def test_a_template_that_cannot_be_read_is_named(directory, tmp_path, content):
    if content is not None:
        (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(ModelError, match=r"data\.template .*t\.jinja"):
        load_tokenizer(directory, str(tmp_path / "t.jinja"))


def test_a_template_s_name_elsewhere_is_said_to_be_no_file(directory):
    with pytest.raises(ModelError, match=r"^data\.template chatml: no such file; .* not a template's name: leave"):
        load_tokenizer(directory, "chatml")


@pytest.mark.parametrize("template", [5, ["x"], {"default": 5}, [{"name": "default", "template": 5}]], ids=str)
def test_a_template_that_is_no_text_is_one_message(directory, template):
    (directory / "chat_template.jinja").unlink()
    edit(directory, chat_template=template)
    with pytest.raises(ModelError, match=r"words: .*(chat_template of tokenizer_config\.json is|cannot be loaded)"):
        load_tokenizer(directory)


def test_a_template_that_is_no_text_does_no_harm_behind_another(directory, tmp_path):
    (directory / "chat_template.jinja").unlink()
    edit(directory, chat_template=5)
    (tmp_path / "t.jinja").write_text("mine")
    assert load_tokenizer(directory, str(tmp_path / "t.jinja")).chat_template == "mine"


def test_several_templates_have_names(directory):
    (directory / "chat_template.jinja").unlink()
    edit(directory, chat_template=[{"name": "default", "template": "{{ 1 }}"}, {"name": "rag", "template": "{{ 2 }}"}])
    assert load_tokenizer(directory).chat_template == {"default": "{{ 1 }}", "rag": "{{ 2 }}"}


def test_a_directory_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.json .* set model\.tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "None"}}', '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_one_message(directory, content):
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="cannot be loaded") as refusal:
        load_tokenizer(directory)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_without_an_end_is_refused(directory):
    edit(directory, drop=("eos_token",))
    (directory / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ModelError, match="no end-of-sequence token; set eos_token"):
        load_tokenizer(directory)


MARKING = "open({marker!r}, 'w')\nclass Own:\n    pass\n"


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_code_in_a_repository_is_never_run(directory, tmp_path, where, monkeypatch):
    marker = tmp_path / "marker"
    for name in ("tokenization_own", "configuration_own", "modeling_own"):
        (directory / f"{name}.py").write_text(MARKING.format(marker=str(marker)))
    own = {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"], "AutoConfig": "configuration_own.Own"}
    fields = {"tokenizer_class": "Own"} if where == "tokenizer_config.json" else {"model_type": "own"}
    edit(directory, where, auto_map=own, **fields)
    monkeypatch.chdir(directory)
    try:
        load_tokenizer(directory)
    except ModelError as refusal:
        assert "code of its own" in str(refusal)  # noqa: PT017 - loading it without the code is as good
    assert not marker.exists()


def test_the_embedding_must_have_a_row_for_every_token(tiny_tokenizer):
    size = vocabulary_size(tiny_tokenizer)
    check_tokenizer(tiny_tokenizer, size)
    check_tokenizer(tiny_tokenizer, size + 64)
    with pytest.raises(ModelError) as refusal:
        check_tokenizer(tiny_tokenizer, size - 1)
    token = tiny_tokenizer.convert_ids_to_tokens(size - 1)
    assert f"ids up to {size - 1}, the model's embedding has {size - 1} rows" in str(refusal.value)
    assert repr(token) in str(refusal.value)


def test_tokenizers_that_cut_otherwise_differ_on_some_text(tiny_tokenizer, directory):
    assert first_difference(tiny_tokenizer, load_tokenizer(directory)) is None
    edit(directory, "config.json", model_type="qwen2")  # transformers has a cut of its own for it
    theirs = load_as_transformers(directory)
    text = first_difference(tiny_tokenizer, theirs)
    assert tiny_tokenizer(text)["input_ids"] != theirs(text)["input_ids"]
    own = json.loads(theirs.backend_tokenizer.to_str())
    own["model"] |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}  # written otherwise, not other
    same = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(own)))
    assert first_difference(theirs, same) is None
    same.add_tokens(["<new>"])
    assert first_difference(theirs, same) == "<new>"


def test_a_tokenizer_is_what_it_does_and_not_how_it_is_written_down(tiny_tokenizer, tmp_path):
    before = tokenizer_print(tiny_tokenizer)
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found, indent=3, sort_keys=True))
    again = load_tokenizer(tmp_path)
    again.chat_template = "another"
    assert tokenizer_print(again) == before
    assert is_tokenizer_print(before, again)
    assert is_tokenizer_print(tokenizer_print(tiny_tokenizer, PROBES), again)  # as earlier versions noted it
    again.add_tokens(["<new>"])
    assert tokenizer_print(again) != before
    path.write_text(json.dumps({**found, "normalizer": {"type": "Lowercase"}}))
    assert tokenizer_print(load_tokenizer(tmp_path)) != before


def test_an_added_token_past_the_end_counts(tiny_tokenizer, directory):
    tokenizer = load_tokenizer(directory)
    size = vocabulary_size(tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match="<new>"):
        check_tokenizer(tokenizer, size)


def test_without_a_padding_token_the_end_fills_up(directory):
    assert pad_id(load_tokenizer(directory)) == 0
    edit(directory, drop=("pad_token",))
    tokenizer = load_tokenizer(directory)
    assert pad_id(tokenizer) == tokenizer.eos_token_id


def test_a_reply_ends_at_the_tokenizers_end_the_configs_ends_and_the_templates_end_of_turn(directory):
    tokenizer = load_tokenizer(directory)
    assert stop_ids(tokenizer) == (2,)
    edit(directory, "generation_config.json", eos_token_id=[0, 2, 7])
    assert stop_ids(tokenizer, directory) == (0, 2, 7)
    edit(directory, "generation_config.json", eos_token_id=9)
    assert stop_ids(tokenizer, directory) == (2, 9)
    edit(directory, eos_token="<|endoftext|>")
    assert stop_ids(load_tokenizer(directory)) == (0, 2)


def test_an_end_of_turn_that_the_template_does_not_use_is_none(directory):
    edit(directory, eos_token="<|endoftext|>")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert stop_ids(load_tokenizer(directory)) == (0,)


@pytest.mark.parametrize("ids", ["2", [1, "2"], -1, 2**31, 2.5, True])
def test_ends_that_are_no_ids_are_refused(directory, ids):
    edit(directory, "generation_config.json", eos_token_id=ids)
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id"):
        stop_ids(load_tokenizer(directory), directory)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])  # the library's in Rust, transformers'
def test_a_full_disk_is_an_os_error_for_whichever_file(tiny_tokenizer, tmp_path, name):
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        save_tokenizer(tiny_tokenizer, tmp_path)


@pytest.mark.real
def test_the_tokenizer_of_qwen2_5_loads_and_ends_its_turns(shared, tmp_path):
    shutil.copytree(shared / "assets" / "qwen2.5-tokenizer", tmp_path / "qwen")
    tokenizer = load_tokenizer(tmp_path / "qwen")
    assert stop_ids(tokenizer) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert tokenizer.decode(pad_id(tokenizer)) == "<|endoftext|>"
    check_tokenizer(tokenizer, 151936)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from pathlib import Path
from jaxtune.tokenizer import load_tokenizer
print(load_tokenizer(Path(sys.argv[1]))("hello")["input_ids"])
"""


def test_no_torch_is_needed(directory, run_python):
    done = run_python(WITHOUT_TORCH, directory)
    assert done.stdout.strip() == str(load_tokenizer(directory)("hello")["input_ids"]), done.stderr
