"""Several sources in one run, each with a format of its own."""

import json

import pytest

from jaxtune.config import DataSection, EvalSection, TrainSection, make_config
from jaxtune.data.loader import build_data
from jaxtune.errors import ConfigError
from tests.data.templates import word_tokenizer


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A section of two sources of different kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "a", "output": "b c"}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "d e f"}) + "\n")
    text = {"path": "b.jsonl", "format": "text", "columns": {"text": "body"}}
    return {"sources": [{"path": "a.jsonl"}, text], "max_length": 64}


def test_each_source_is_read_in_its_own_format(two):
    section = DataSection.model_validate(two)
    data = build_data(section, EvalSection(), TrainSection(steps=1, batch_size=2), word_tokenizer())
    assert [part.lengths.rows for part in data.sources] == [1, 1]
    assert len(data.train.examples) == 2
    (first, second) = data.train.examples.lengths
    apart = DataSection.model_validate(two["sources"][1] | {"max_length": 64})
    alone = build_data(apart, EvalSection(), TrainSection(steps=1), word_tokenizer()).train.examples
    assert alone.tokens.tolist() == data.train.examples.tokens[first : first + second].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "c.json"}, "data.path is for a single source; with sources, each has its own"),
        ({"tags": {"role": "r"}}, "data.tags is for a single source; with sources, each has its own"),
        ({"system": "Be brief."}, "data.system is for a single source; with sources, each has its own"),
        ({"sources": []}, "data.path is missing: name a file, several, sources with a path each, or a data"),
    ],
)
def test_files_are_named_in_one_way(two, change, message):
    with pytest.raises(ConfigError, match=message):
        make_config({"model": {"path": "m"}, "data": {**two, **change}})


def test_a_source_may_be_a_directory_or_a_pattern(two, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "more" / "a.jsonl")
    (tmp_path / "b.jsonl").rename(tmp_path / "b2.jsonl")
    two["sources"][0]["path"], two["sources"][1]["path"] = "more", "b*.jsonl"
    section = DataSection.model_validate(two)
    data = build_data(section, EvalSection(path="more/*"), TrainSection(steps=1, batch_size=2), word_tokenizer())
    assert [part.lengths.rows for part in data.sources] == [1, 1, 1]


@pytest.mark.parametrize(
    ("systems", "common"),
    [(["A"], "A"), (["A", "A"], "A"), (["A", "B"], None), (["A", None], None), ([None, None], None), ([], None)],
)
def test_a_system_line_is_common_where_all_sources_of_conversations_have_it(systems, common):
    talks = [{"path": f"{number}.jsonl", "system": system} for number, system in enumerate(systems)]
    text = {"path": "t.jsonl", "format": "text"}
    assert DataSection(sources=[*talks, text]).common_system == common


@pytest.mark.parametrize("where", [{"path": "a.jsonl"}, {"dataset": "a, b", "dataset_dir": "gone"}])
def test_a_single_source_and_a_data_folder_have_the_sections_system_line(where):
    assert [DataSection(**where, system=system).common_system for system in ("A", None)] == ["A", None]
