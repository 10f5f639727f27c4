"""A data set of the hub: which files make a split, by README and by names, and what the hub cannot give."""

import json
import shutil
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from jaxtune.config import DataSection, EvalSection, TrainSection, make_config
from jaxtune.data import build_data
from jaxtune.data.hub_files import choose, hub_files, is_hub_id
from jaxtune.data.locate import with_files
from jaxtune.errors import ConfigError, DataError
from tests.data.templates import word_tokenizer


def refusal(call, *arguments) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- which files ---


def chosen(names: list[str], split: str = "train", subset: str | None = None, readme=None) -> list[str]:
    return choose("o/n", sorted(names), readme, split, subset)


SHARDS = [f"data/{split}-0000{n}-of-00002.parquet" for split in ("train", "test", "train_sft") for n in range(2)]


@pytest.mark.parametrize("split", ["train", "test", "train_sft"])
def test_shards_are_told_by_their_names(split):
    assert chosen([*SHARDS, "README.md"], split) == [f"data/{split}-0000{n}-of-00002.parquet" for n in range(2)]


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["train.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["my-train-v2.csv.gz", "my_dev.csv.gz"], "train", ["my-train-v2.csv.gz"]),
        (["my-train-v2.csv.gz", "my_dev.csv.gz"], "validation", ["my_dev.csv.gz"]),
        (["training/a.json", "eval/b.json"], "test", ["eval/b.json"]),
        (["data/train/test_1.json", "data/test/train_1.json"], "train", ["data/train/test_1.json"]),
        (["default/train/0000.parquet", "default/validation/0000.parquet"], "train", ["default/train/0000.parquet"]),
        (["easy.jsonl", "hard.jsonl"], "hard", ["hard.jsonl"]),
        (["a.jsonl", "b.jsonl", "README.md", "LICENSE.txt"], "train", ["a.jsonl", "b.jsonl"]),
        (["strain.jsonl", "constrained.jsonl"], "train", ["constrained.jsonl", "strain.jsonl"]),  # no such word in them
        (["a.jsonl", "dataset_infos.json"], "train", ["a.jsonl"]),
    ],
)
def test_names_and_directories_tell_the_split(names, split, found):
    assert chosen(names, split) == found


def test_a_split_that_is_not_there_is_an_error_with_those_that_are():
    assert "o/n: no split validation; found test, train, train_sft" in refusal(chosen, SHARDS, "validation")
    assert "o/n: no split dev2; found test, train; set data.split" in refusal(chosen, ["train.csv", "test.csv"], "dev2")
    assert "none that a name tells of, so all is train" in refusal(chosen, ["a.csv"], "test")


def test_directories_that_are_no_splits_are_subsets():
    names = ["main/train.jsonl", "main/test.jsonl", "socratic/train.jsonl"]
    assert "o/n: several subsets; set data.subset to one of main, socratic" in refusal(chosen, names)
    assert chosen(names, "train", "main") == ["main/train.jsonl"]
    assert "o/n: no subset other; found main, socratic" in refusal(chosen, names, "train", "other")


README = {
    "configs": [
        {"config_name": "small", "data_files": [{"split": "train", "path": "s/*.jsonl"}]},
        {
            "config_name": "large",
            "default": True,
            "data_files": [
                {"split": "train", "path": ["l/**/part-*.jsonl", "l/extra.jsonl"]},
                {"split": "held", "path": "l/x?.jsonl"},
            ],
        },
    ]
}
LISTED = [
    "l/a/b/part-1.jsonl",
    "l/extra.jsonl",
    "l/part-2.jsonl",
    "l/x1.jsonl",
    "l/x12.jsonl",
    "s/a.jsonl",
    "s/d/b.jsonl",
]


@pytest.mark.parametrize(
    ("subset", "split", "found"),
    [
        (None, "train", LISTED[:3]),
        ("large", "held", ["l/x1.jsonl"]),
        ("small", "train", ["s/a.jsonl"]),
    ],
)
def test_the_readme_says_which_files_make_a_subset_and_a_split(subset, split, found):
    assert chosen(LISTED, split, subset, README) == found


def test_what_the_readme_does_not_list_is_an_error():
    assert "o/n: no subset tiny; set data.subset to one of small, large" in refusal(
        chosen, LISTED, "train", "tiny", README
    )
    assert "o/n: no split test; found train, held; set data.split" in refusal(chosen, LISTED, "test", None, README)
    assert "no file matches s/*.jsonl" in refusal(chosen, LISTED[:3], "train", "small", README)


@pytest.mark.parametrize("files", ["d/*.csv", ["d/*.csv"], {"train": "d/*.csv"}, {"train": ["d/a.csv", "d/b.csv"]}])
def test_every_form_of_a_readmes_list_is_understood(files):
    readme = {"configs": [{"config_name": "x", "data_files": files}]}
    assert chosen(["d/a.csv", "d/b.csv", "e.csv"], readme=readme) == ["d/a.csv", "d/b.csv"]


def test_of_several_subsets_without_a_default_one_must_be_chosen():
    readme = {"configs": [{"config_name": name, "data_files": "*.csv"} for name in "ab"]}
    assert "several subsets; set data.subset to one of a, b" in refusal(chosen, ["a.csv"], "train", None, readme)
    readme["configs"].append({"config_name": "default", "data_files": "*.csv"})
    assert chosen(["a.csv"], readme=readme) == ["a.csv"]


@pytest.mark.parametrize("readme", [None, {}, [], "x", {"configs": None}, {"configs": [1]}, {"configs": [{"a": 1}]}])
def test_a_readme_without_lists_leaves_it_to_the_names(readme):
    assert chosen(["train.csv", "test.csv"], readme=readme) == ["train.csv"]


def test_a_script_is_refused_by_name():
    text = refusal(chosen, ["name.py", "README.md"])
    assert "only a script (name.py)" in text and "never run" in text and "data.revision: refs/convert/parquet" in text
    assert "found README.md" in refusal(chosen, ["README.md"])
    assert chosen(["name.py", "train.csv"]) == ["train.csv"]


def test_the_same_rows_in_two_kinds_are_read_once(capsys):
    names = ["train-1.parquet", "train-2.parquet", "train.csv"]
    assert chosen(names) == names[:2]
    assert "only its .parquet files are read, not train.csv" in capsys.readouterr().out


def test_a_missing_shard_is_an_error():
    assert "data/train-*-of-00002.parquet: only 1 of 2 files are there" in refusal(chosen, SHARDS[1:])


# --- from the hub ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the data set o/n: hub.files is a directory, hub.calls what was asked, hub.problem is raised if set."""
    monkeypatch.chdir(tmp_path)
    hub = MagicMock(files=tmp_path / "repository", cache=tmp_path / "cache", calls=[], problem=None, offline=None)
    hub.files.mkdir()

    def names(root):
        return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())

    def snapshot_download(path, *, repo_type, revision, allow_patterns):
        hub.calls.append((path, repo_type, revision, allow_patterns))
        if hub.problem is not None:
            raise hub.problem
        if hub.offline and not hub.cache.is_dir():
            raise hub.offline
        for name in filter_repo_objects(names(hub.files), allow_patterns=allow_patterns) if not hub.offline else ():
            (hub.cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub.files / name, hub.cache / name)
        hub.cache.mkdir(exist_ok=True)
        return str(hub.cache)

    def list_repo_files(path, *, repo_type, revision):
        if hub.offline:
            raise hub.offline
        return [*names(hub.files), "../../escaped.jsonl", ".hidden/x.jsonl"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    return hub


def put(hub, name: str, *rows: dict) -> None:
    file = hub.files / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


ROW = {"instruction": "a", "output": "b"}


def test_only_the_files_of_the_split_are_fetched(hub):
    for name in ("train-[1].jsonl", "train1.jsonl", "test.jsonl", "name.py", "README.md"):
        put(hub, name, ROW)
    shutil.move(hub.files / "train1.jsonl", hub.files / "valid1.jsonl")
    assert hub_files("o/n", "train", revision="v1") == [str(hub.cache / "train-[1].jsonl")]
    assert {call[:3] for call in hub.calls} == {("o/n", "dataset", "v1")}
    assert sorted(path.name for path in hub.cache.iterdir()) == ["README.md", "train-[1].jsonl"]


def test_the_head_of_the_readme_is_read(hub):
    put(hub, "x/rows.jsonl", ROW)
    put(hub, "other.jsonl", ROW)
    head = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: x/*\n"
    (hub.files / "README.md").write_text(f"---\nlicense: mit\n{head}---\n# A page\n")
    assert hub_files("o/n", "train") == [str(hub.cache / "x/rows.jsonl")]


@pytest.mark.parametrize("page", ["# no head", "---\nnot: [yaml\n---\n", "---\n- a list\n---\n", "---\nno end"])
def test_a_page_without_a_useful_head_is_a_page(hub, page):
    put(hub, "train.jsonl", ROW)
    (hub.files / "README.md").write_text(page)
    assert hub_files("o/n", "train") == [str(hub.cache / "train.jsonl")]


def test_without_a_connection_what_was_fetched_before_is_used(hub, capsys):
    for n in range(2):
        put(hub, f"data/train-0000{n}-of-00002.jsonl", ROW)
    found = hub_files("o/n", "train")
    hub.offline = errors.OfflineModeIsEnabled("offline")
    assert hub_files("o/n", "train") == found
    assert "o/n: the hub cannot be reached; only what was fetched before is seen" in capsys.readouterr().out
    Path(found[0]).unlink()
    assert "only 1 of 2 files are there" in refusal(hub_files, "o/n", "train")


def answer(kind, status):
    return kind("the server's text", response=MagicMock(headers={}, status_code=status))


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (lambda: answer(errors.RepositoryNotFoundError, 404), "no such data set on the hub"),
        (lambda: answer(errors.GatedRepoError, 403), "this data set is gated; accept its licence"),
        (lambda: answer(errors.RevisionNotFoundError, 404), "no revision v9; check data.revision"),
        (lambda: answer(errors.HfHubHTTPError, 500), "the hub cannot be used (the server's text)"),
        (lambda: errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (lambda: OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_what_the_hub_answers_becomes_one_message(hub, problem, says):
    hub.problem = problem()
    text = refusal(hub_files, "o/n", "train", None, "v9")
    assert text.startswith("o/n: ") and says in text


@pytest.mark.parametrize(
    ("path", "is_id"),
    [("o/n", True), ("o/n.v1-2", True), ("data/x.jsonl", False), ("n", False), ("./o", False), ("a/b/c", False)],
)
def test_an_id_is_told_from_a_path(path, is_id):
    assert is_hub_id(path) is is_id


def test_a_directory_of_that_name_wins(hub):
    Path("o/n").mkdir(parents=True)
    Path("o/n/a.jsonl").write_text("")
    assert with_files(DataSection(path="o/n")).paths == ["o/n/a.jsonl"]
    assert hub.calls == []


def test_a_path_that_is_no_file_and_no_id_never_reaches_the_hub(hub):
    for path in ("nothing", "./no/where", "/no/where", "a/b/c"):
        text = refusal(with_files, DataSection(path=path))
        assert text.startswith(f"data.path {path}: no such file or directory, and not the id of a data set")
    assert hub.calls == []


@pytest.mark.parametrize("name", ["split", "subset", "revision"])
def test_what_is_of_the_hub_is_refused_beside_a_local_path(name):
    text = refusal(with_files, DataSection(path="a.jsonl", **{name: "x"}))
    assert text == f"data.path a.jsonl: {name} is of a data set on the hub (owner/name), and this is a local path"


def test_a_run_trains_on_one_split_and_is_judged_by_another(hub):
    put(hub, "train.jsonl", ROW, ROW, ROW)
    put(hub, "validation.jsonl", ROW)
    put(hub, "test.jsonl", ROW, ROW)

    def rows(split: str | None) -> list[int]:
        section = DataSection(path="o/n", max_length=64, revision="v1")
        data = build_data(section, EvalSection(path="o/n", split=split), TrainSection(steps=1), word_tokenizer())
        assert {call[2] for call in hub.calls} == {"v1"}
        return [part.lengths.rows for part in data.sources]

    assert rows(None) == [3, 1]
    assert rows("test") == [3, 2]


def test_another_data_set_to_judge_by_has_a_revision_of_its_own(hub):
    put(hub, "train.jsonl", ROW)
    Path("mine.jsonl").write_text(json.dumps(ROW))
    section = DataSection(path="o/n", max_length=64, revision="v1")
    build_data(section, EvalSection(path="mine.jsonl"), TrainSection(steps=1), word_tokenizer())


def test_a_split_without_a_path_to_judge_by_is_refused():
    with pytest.raises(ConfigError, match="split belongs to path and would do nothing without it"):
        make_config({"model": {"path": "m"}, "data": {"path": "a.jsonl"}, "eval": {"split": "test"}})
