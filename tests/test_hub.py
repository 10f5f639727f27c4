"""A model's path is a directory, a .gguf or a hub id, and what cannot be found says what to do."""

from functools import partial
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from jaxtune.data.hub_files import hub_files
from jaxtune.errors import DataError, ModelError
from jaxtune.hub import IGNORED, PATTERNS, resolve_model


def files(directory, *names):
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_text("{}")
    return directory


def refusal(*arguments) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model(*arguments)
    return str(caught.value)


def test_a_model_directory_is_itself(tmp_path):
    assert resolve_model(str(files(tmp_path, "config.json", "model.safetensors"))) == tmp_path
    assert resolve_model(str(files(tmp_path, "a.gguf"))) == tmp_path


def test_a_directory_for_a_model_from_scratch_needs_no_weights(tmp_path):
    assert resolve_model(str(files(tmp_path, "config.json"))) == tmp_path


def test_a_tokenizers_directory_is_itself(tmp_path):
    assert resolve_model(str(files(tmp_path, "tokenizer.json", "tokenizer_config.json"))) == tmp_path


def test_a_gguf_file_and_a_directory_of_one_are_the_file(tmp_path):
    gguf = files(tmp_path, "m.gguf", "config.json", "README.md") / "m.gguf"
    assert resolve_model(str(gguf)) == gguf
    assert resolve_model(str(tmp_path)) == gguf


def test_of_several_gguf_files_one_must_be_chosen(tmp_path):
    assert "2 .gguf files (a.gguf, b.gguf); give the path of one" in refusal(str(files(tmp_path, "a.gguf", "b.gguf")))


def test_an_adapter_is_no_model(tmp_path):
    directory = files(tmp_path, "adapter_config.json", "adapter_model.safetensors")
    assert "a PEFT adapter, not a model" in refusal(str(directory))
    files(directory, "config.json", "training_args.bin")
    assert "a PEFT adapter, not a model" in refusal(str(directory))
    assert resolve_model(str(directory), weights=False) == directory
    assert resolve_model(str(files(directory, "model.safetensors"))) == directory


def test_other_files_and_empty_directories_are_refused(tmp_path):
    assert "found nothing" in refusal(str(files(tmp_path)))
    assert "found notes.txt" in refusal(str(files(tmp_path, "notes.txt")))
    assert "not a model" in refusal(str(tmp_path / "notes.txt"))


def test_a_directory_that_may_not_be_read_is_told(tmp_path, forbid):
    directory = files(tmp_path / "model", "config.json", "model.safetensors")
    forbid(directory)
    assert refusal(str(directory)) == f"{directory}: cannot be read: Permission denied"
    assert refusal(str(directory / "below")) == f"{directory / 'below'}: cannot be read: Permission denied"


def test_a_name_that_is_too_long_is_told():
    assert refusal("n" * 300) == f"{'n' * 300}: cannot be read: File name too long"


def test_a_revision_of_a_local_path_is_refused(tmp_path):
    assert "is a local path" in refusal(str(files(tmp_path, "config.json")), "main")


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "a/b/c", "../x/y", "~nobody/x", "~no-such-user/x", ""])
def test_a_path_that_cannot_be_a_hub_id_never_reaches_the_hub(path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    if path:
        assert "no such file or directory" in refusal(path)


def hub(monkeypatch, result):
    """Put a hub in place that returns or raises `result`; gives the arguments of its calls."""
    calls = []

    def download(*arguments, **options):
        calls.append((arguments, options))
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_of_a_hub_id_only_safetensors_settings_and_tokenizer_are_fetched(tmp_path, monkeypatch):
    calls = hub(monkeypatch, files(tmp_path, "config.json"))
    assert resolve_model("owner/name", "v1") == tmp_path
    (arguments, options) = calls[0]
    assert arguments == ("owner/name",)
    assert options == {"revision": "v1", "allow_patterns": PATTERNS, "ignore_patterns": IGNORED}


@pytest.mark.parametrize("weights", [True, False])
def test_what_is_fetched_can_run_no_code_and_is_not_fetched_twice(weights, monkeypatch, tmp_path):
    calls = hub(monkeypatch, files(tmp_path, "config.json"))
    resolve_model("owner/name", weights=weights)
    options = calls[0][1]
    repository = [
        *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"),
        *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "README.md"),
        *("pytorch_model.bin", "x.pt", "modeling_x.py", "consolidated.safetensors", "onnx/config.json", "a.gguf"),
        *("4bit/model.safetensors", "original/params.json", "original/tokenizer.model"),
    ]
    more = "additional_chat_templates/rag.jinja"
    kept = list(
        huggingface_hub.utils.filter_repo_objects(
            [*repository, more], allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
        )
    )
    assert kept == [*repository[0 if weights else 2 : 9], more]


def test_a_repository_without_a_config_is_refused(tmp_path, monkeypatch):
    hub(monkeypatch, files(tmp_path, "README.md"))
    assert "no config.json" in refusal("owner/name-gguf")


def answer(kind, status):
    return kind("the server's text", response=MagicMock(headers={}, status_code=status))


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (lambda: answer(errors.RepositoryNotFoundError, 404), "no such model on the hub"),
        (lambda: answer(errors.GatedRepoError, 403), "accept its licence"),
        (lambda: answer(errors.RevisionNotFoundError, 404), "no revision v9"),
        (lambda: answer(errors.HfHubHTTPError, 500), "the hub cannot be used (the server's text)"),
        (lambda: errors.LocalEntryNotFoundError("Got: ConnectError\nmore lines"), "(Got: ConnectError)"),
        (lambda: errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (lambda: errors.HFValidationError("Repo id"), "Repo id"),
        (lambda: OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_what_the_hub_answers_becomes_one_message(monkeypatch, problem, says):
    hub(monkeypatch, problem())
    message = refusal("owner/name", "v9")
    assert message.startswith("owner/name: ")
    assert says in message
    assert "\n" not in message and "{" not in message


@pytest.mark.parametrize("kind", ["model", "data set"])
def test_a_hub_id_where_no_home_can_be_found_says_what_to_set(monkeypatch, kind):
    """As for a user without an entry in the password file, where HOME is not set."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    ask, error = (resolve_model, ModelError) if kind == "model" else (partial(hub_files, split="train"), DataError)
    with pytest.raises(error, match=r"^owner/name: .*your home directory cannot be found; set HOME, or HF_HOME to a"):
        ask("owner/name")


UNREACHABLE = """
from jaxtune.errors import ModelError
from jaxtune.hub import resolve_model
try:
    resolve_model("owner/name")
except ModelError as error:
    print(error)
"""


def test_a_hub_that_cannot_be_reached_is_said_at_once(run_python, tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = run_python(UNREACHABLE, env=env, timeout=60)
    assert "owner/name: no such directory here, and the hub cannot be used" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["qwen2.5-0.6b", "./qwen2.5-0.6b"])
def test_a_mistyped_directory_is_answered_with_the_one_beside_it(tmp_path, monkeypatch, name):
    files(tmp_path / "qwen2.5-0.5b", "config.json")
    monkeypatch.chdir(tmp_path)
    assert refusal(name).endswith('; did you mean "qwen2.5-0.5b"?')
    assert "did you mean" not in refusal(str(tmp_path / "llama"))
    files(tmp_path, "llama2.txt")
    assert "did you mean" not in refusal(str(tmp_path / "llama"))
    (tmp_path / "llama2.gguf").write_bytes(b"")
    assert refusal(str(tmp_path / "llama")).endswith('; did you mean "llama2.gguf"?')


def test_a_directory_that_may_not_be_listed_has_no_neighbours(tmp_path, monkeypatch):
    def deny(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", deny)
    assert "no such file or directory" in refusal(str(tmp_path / "llama"))
