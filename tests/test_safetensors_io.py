"""Safetensors files of every kind are read by range; damaged, foreign and hostile ones are refused by name."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.errors import ModelError
from jaxtune.safetensors_io import INDEX, SINGLE, SafetensorsSource

ARRAYS = {
    "model.norm.weight": np.arange(12, dtype=np.float32),
    "model.embed_tokens.weight": np.arange(60, dtype=np.float16).reshape(12, 5),
    "lm_head.weight": np.arange(60, dtype=np.float32).reshape(12, 5).astype(ml_dtypes.bfloat16),
}


def write(directory: Path, shards: dict[str, dict[str, np.ndarray]], weight_map: dict | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    for name, arrays in shards.items():
        save_file(arrays, directory / name)
    if weight_map is None:
        weight_map = {key: name for name, arrays in shards.items() for key in arrays}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def single(directory: Path) -> Path:
    save_file(ARRAYS, directory / SINGLE)
    return directory


def two(directory: Path, **changes: str) -> Path:
    """Two shards and their index, in which `changes` replaces file names."""
    head = {"lm_head.weight": ARRAYS["lm_head.weight"]}
    rest = {key: array for key, array in ARRAYS.items() if key not in head}
    shards = {"a.safetensors": rest, "b.safetensors": head}
    weight_map = {key: name for name, arrays in shards.items() for key in arrays}
    return write(directory, shards, {**weight_map, **changes})


def raw(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file byte by byte."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def refusal(directory: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_all(directory)
    return str(caught.value)


def read_all(directory: Path) -> None:
    source = SafetensorsSource(directory)
    for key, shape in source.shapes.items():
        source.read(key, tuple(slice(0, size) for size in shape))


@pytest.mark.parametrize("make", [single, two])
def test_ranges_of_each_dtype_are_the_arrays_own(tmp_path, make):
    source = SafetensorsSource(make(tmp_path))
    assert source.shapes == {key: array.shape for key, array in ARRAYS.items()}
    for key, array in ARRAYS.items():
        for rows in (slice(0, 12), slice(3, 7), slice(11, 12), slice(4, 4)):
            index = (rows, slice(1, 4)) if array.ndim == 2 else (rows,)
            part = source.read(key, index)
            np.testing.assert_array_equal(part, array[index])
            assert part.dtype == array.dtype


def test_the_keys_of_a_base_model_get_their_prefix(tmp_path):
    save_file({"embed_tokens.weight": np.ones((3, 2), np.float32)}, tmp_path / SINGLE)
    source = SafetensorsSource(tmp_path)
    assert list(source.shapes) == ["model.embed_tokens.weight"]
    assert source.read("model.embed_tokens.weight", (slice(0, 1), slice(0, 2))).shape == (1, 2)


def test_an_integer_weight_is_refused_with_its_dtype(tmp_path):
    save_file({"model.norm.weight": np.arange(3)}, tmp_path / SINGLE)
    assert "model.norm.weight is I64; supported: F32, F16, BF16" in refusal(tmp_path)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": b"",
    "no header": b"\x10",
    "header longer than the file": raw({"w": ONE}, bytes(8), length=10**6),
    "header of more than 100 MB": raw({"w": ONE}, bytes(8), length=2**40),
    "not JSON": raw(b"{'w'", bytes(8)),
    "not an object": raw(b"[]"),
    "truncated": raw({"w": ONE}, bytes(7)),
    "bytes left over": raw({"w": ONE}, bytes(12)),
    "a hole": raw({"w": ONE, "v": ONE | {"data_offsets": [12, 20]}}, bytes(20)),
    "overlap": raw({"w": ONE, "v": ONE | {"data_offsets": [4, 12]}}, bytes(12)),
    "shape and bytes differ": raw({"w": ONE | {"shape": [3]}}, bytes(8)),
    "a shape past 64 bits": raw({"w": ONE | {"shape": [2**62, 2**62]}}, bytes(8)),
    "a negative shape": raw({"w": ONE | {"shape": [-2]}}, bytes(8)),
    "an unknown dtype": raw({"w": ONE | {"dtype": "X9"}}, bytes(8)),
    "offsets turned round": raw({"w": ONE | {"data_offsets": [8, 0]}}, bytes(8)),
    "one name twice": raw(
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        bytes(16),
    ),
    "deep JSON": raw(b'{"w":' * 10_000 + b"1" + b"}" * 10_000),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_file_is_named(tmp_path, damage, sharded):
    if sharded:
        two(tmp_path)
    (tmp_path / ("b.safetensors" if sharded else SINGLE)).write_bytes(DAMAGED[damage])
    message = refusal(tmp_path)
    assert message.startswith(str(tmp_path / ("b.safetensors" if sharded else SINGLE)))
    assert "not a readable safetensors file" in message


def test_a_file_that_may_not_be_read_is_told_as_one(tmp_path, forbid):
    forbid(single(tmp_path) / SINGLE)
    assert refusal(tmp_path) == f"{tmp_path / SINGLE}: cannot be read: Permission denied"


def test_every_truncation_of_a_file_is_refused(tmp_path):
    whole = (single(tmp_path) / SINGLE).read_bytes()
    for length in range(0, len(whole), 13):
        (tmp_path / SINGLE).write_bytes(whole[:length])
        assert "not a readable safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "a\\b.safetensors", "x\0.safetensors"],
)
def test_an_index_that_points_outside_is_refused(tmp_path, name):
    outside = tmp_path / "x.safetensors"
    save_file({"lm_head.weight": ARRAYS["lm_head.weight"]}, outside)
    message = refusal(two(tmp_path / "model", **{"lm_head.weight": name}))
    assert INDEX in message
    assert "allowed: a" in message


def test_a_shard_that_is_a_link_to_outside_is_refused(tmp_path):
    model = two(tmp_path / "model")
    shutil.move(model / "b.safetensors", tmp_path / "b.safetensors")
    (model / "b.safetensors").symlink_to("../b.safetensors")
    assert "outside" in refusal(model)


def test_a_snapshot_of_the_hubs_cache_links_to_its_own_blobs(tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    two(snapshot)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    shutil.move(snapshot / "b.safetensors", blobs / "ff00")
    (snapshot / "b.safetensors").symlink_to("../../blobs/ff00")
    assert len(SafetensorsSource(snapshot).shapes) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": []}', "weight_map"),
        ('{"weight_map": {"w": 3}}', "w is in 3"),
        ('{"weight_map": {"w": "pytorch_model.bin"}}', "pytorch_model.bin"),
    ],
)
def test_an_index_that_is_none_is_named(tmp_path, content, says):
    two(tmp_path)
    (tmp_path / INDEX).write_text(content)
    message = refusal(tmp_path)
    assert INDEX in message
    assert says in message


def test_missing_shards_are_listed(tmp_path):
    (two(tmp_path) / "b.safetensors").unlink()
    assert "1 of 2 files missing: b.safetensors" in refusal(tmp_path)


def test_a_shard_that_lacks_a_key_of_the_index_is_named(tmp_path):
    two(tmp_path, **{"model.layers.9.x": "b.safetensors"})
    message = refusal(tmp_path)
    assert "b.safetensors" in message
    assert "missing: model.layers.9.x" in message


def test_a_key_in_a_shard_that_the_index_does_not_know_is_named(tmp_path):
    two(tmp_path)
    save_file({**load_file(tmp_path / "b.safetensors"), "more": np.ones(1, np.float32)}, tmp_path / "b.safetensors")
    assert "not in the index: more" in refusal(tmp_path)


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path):
    two(tmp_path)
    single(tmp_path)
    assert "remove the one that is old" in refusal(tmp_path)


def test_an_index_may_name_the_single_file(tmp_path):
    write(tmp_path, {SINGLE: ARRAYS})
    assert len(SafetensorsSource(tmp_path).shapes) == 3


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.pkl", "model.ckpt"])
def test_pickled_weights_are_refused_by_name_and_never_opened(tmp_path, name):
    marker = tmp_path / "marker"
    (tmp_path / name).write_bytes(pickle.dumps(Payload(marker)))
    message = refusal(tmp_path)
    assert name in message
    assert "never opened" in message
    assert not marker.exists()


def test_pickled_weights_beside_safetensors_are_left_alone(tmp_path):
    marker = tmp_path / "marker"
    (single(tmp_path) / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    assert len(SafetensorsSource(tmp_path).shapes) == 3
    assert not marker.exists()


def test_a_directory_without_weights_says_what_is_expected(tmp_path):
    assert "expected model.safetensors or model.safetensors.index.json; found no safetensors" in refusal(tmp_path)
    save_file(ARRAYS, tmp_path / "model-00001-of-00002.safetensors")
    assert "found model-00001-of-00002.safetensors" in refusal(tmp_path)
