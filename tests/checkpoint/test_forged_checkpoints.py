"""Manifests, headers and training states that a forger wrote, with the right hash beside them: one CheckpointError each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from ldmscale.checkpoint.shards import Reader, state_of
from ldmscale.errors import CheckpointError

KEY = "denoiser/master/conv.weight"
Save = Callable[..., Path]


def forge(folder: Path, change: Callable[[dict[str, Any]], object] | str) -> None:
    """Change a checkpoint's manifest, or replace it by a text, and vouch for it."""
    file = folder / "manifest.json"
    if not isinstance(change, str):
        values = json.loads(file.read_text())
        change(values)
        change = json.dumps(values)
    file.write_text(change)
    (folder / "COMPLETE").write_text(xxhash.xxh3_128_hexdigest(change.encode()) + "\n")


def set_key(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values["keys"][KEY].update({name: value})


def set_file(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["files"][0].update(values)


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.pop(name)


def setting(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.update(changes)


def deep(levels: int) -> str:
    return '{"format": 1, "state": ' + "[" * levels + "]" * levels + "}"


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


FORGED: dict[str, tuple[Callable[[dict[str, Any]], object] | str, str]] = {
    "step is a text": (setting(step="four"), "step: found 'four'"),
    "step is below 0": (setting(step=-1), "step: found -1"),
    "step is true": (setting(step=True), "step: found True"),
    "step is a fraction": (setting(step=2.5), "step: found 2.5"),
    "images seen": (setting(images_seen="x"), "images_seen: found 'x'"),
    "world size": (setting(world_size=[8]), r"world_size: found \[8\]"),
    "libraries": (setting(libraries=5), "libraries: found 5"),
    "state is a list": (setting(state=[1]), r"state: found \[1\]"),
    "state is null": (setting(state=None), "state: found None"),
    "state is nested deep": (setting(state={"d": nested(500)}), "nested deeper than 100"),
    "nested beyond the parser": (deep(100_000), "nested deeper than 100"),
    "keys are a list": (setting(keys=[]), r"keys: found \[\]"),
    "a key without a network": (
        lambda values: values["keys"].update({"w": values["keys"][KEY]}), "the key 'w', expected NETWORK/KIND/NAME",
    ),
    "no keys": (without("keys"), "keys: .*Field required"),
    "no files": (setting(files=[]), r"files: found \[\]"),
    "a file's name is 5": (set_file(name=5), "names 5: expected rank_00000.safetensors"),
    "a file's size": (set_file(size="184"), "files.0.size: found '184'"),
    "a file's hash": (set_file(xxh3_128=7), "files.0.xxh3_128: found 7"),
    "a file twice": (lambda values: values["files"].append(values["files"][0]), "listed twice"),
    "dtype of torch's functions": (set_key("dtype", "load"), "dtype: found 'load'"),
    "dtype unknown": (set_key("dtype", "foo"), "dtype: found 'foo'"),
    "dtype a number": (set_key("dtype", 4), "dtype: found 4"),
    "shape of 2^40": (set_key("shape", [2**40]), "has pieces of 12 elements"),
    "shape and shard of 2^40": (
        lambda values: values["keys"][KEY].update(shape=[2**40], shards=[[0, 2**40, 0]]),
        "is to hold 4398046511[0-9]* bytes of tensors and has",
    ),
    "shape below 0": (set_key("shape", [-4]), "shape.0: found -4"),
    "shape a text": (set_key("shape", "ab"), "shape: found 'ab'"),
    "shape of another count": (set_key("shape", [3, 5]), r"of shape \[3, 5\] has pieces of 12"),
    "shape of 100 sides": (set_key("shape", [1] * 100), "shape: found"),
    "file number 99": (set_key("shards", [[0, 12, 99]]), "file number 99 of 1"),
    "file number -1": (set_key("shards", [[0, 12, -1]]), "shards.0.2: found -1"),
    "offset below 0": (set_key("shards", [[-4, 12, 0]]), "shards.0.0: found -4"),
    "a hole": (set_key("shards", [[0, 4, 0], [8, 4, 0]]), "piece at element 8, expected one at 4"),
    "an overlap": (set_key("shards", [[0, 12, 0], [4, 8, 0]]), "piece at element 4, expected one at 12"),
    "no shard": (set_key("shards", []), r"shards: found \[\]"),
    "a shard of 2 numbers": (set_key("shards", [[0, 12]]), "shards.0.2: .*Field required"),
    "format": (setting(format=[1]), r"has format \[1\], this version reads 1"),
    "a list": ("[1]", r"found \[1\], expected an object"),
    "no JSON": ("{", "is damaged .*take an older checkpoint"),
    "a number of 5000 digits": ('{"format": 1, "step": ' + "9" * 5000 + "}", "is damaged"),
    "not a number": ('{"format": 1, "step": NaN}', "step: found nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_manifest_is_refused_by_name(save: Save, tmp_path: Path, name: str) -> None:
    folder = save(4)
    change, words = FORGED[name]
    forge(folder, change)
    with pytest.raises(CheckpointError, match=words) as error:
        Reader(folder)
    assert "manifest.json" in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_manifest_that_is_only_written_anew_is_read(save: Save, tmp_path: Path) -> None:
    folder = save(4)
    forge(folder, lambda values: None)
    reader = Reader(folder)
    assert reader.tensor(KEY).tolist() == (400.0 + reader.tensor(KEY) - reader.tensor(KEY)[0, 0]).tolist()


@pytest.mark.parametrize(
    ("name", "words"), [("manifest.json", "manifest.json is missing"), ("COMPLETE", "has no file COMPLETE")]
)
def test_a_pipe_in_place_of_a_file_does_not_make_the_reader_wait(
    save: Save, tmp_path: Path, name: str, words: str
) -> None:
    folder = save(4)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    found: list[str] = []

    def read() -> None:
        try:
            Reader(folder)
        except CheckpointError as error:
            found.append(str(error))

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(10)
    assert len(found) == 1 and words in found[0]


def test_a_long_complete_is_not_read_whole(save: Save, tmp_path: Path) -> None:
    folder = save(4)
    os.truncate(folder / "COMPLETE", 1 << 40)  # sparse: of no bytes on the disk
    with pytest.raises(CheckpointError, match="COMPLETE says"):
        Reader(folder)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "dtype": (lambda header: header[KEY].update(dtype="X9"), "dtype: found 'X9'"),
    "shape": (lambda header: header[KEY].update(shape=[-1]), "shape.0: found -1"),
    "offsets": (lambda header: header[KEY].update(data_offsets=[0, 10**12]), "lies in bytes 0 to 10000"),
    "offsets swapped": (lambda header: header[KEY].update(data_offsets=[48, 0]), "lies in bytes 48 to 0"),
    "beyond the end": (
        lambda header: header[KEY].update(data_offsets=[10**6, 10**6 + 48]), "lies in bytes 1000000 to",
    ),
    "no object": (lambda header: header.update({KEY: 5}), "found 5"),
    "no tensor": (lambda header: header.pop(KEY), "has no tensor"),
    "fewer elements": (
        lambda header: header[KEY].update(shape=[2], data_offsets=[0, 8]), "fewer elements of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_forged_header_of_a_file_of_tensors_is_refused_by_name(
    save: Save, tmp_path: Path, name: str
) -> None:
    folder = save(4)
    file = folder / "rank_00000.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change, words = HEADERS[name]
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    forge(folder, set_file(size=file.stat().st_size))
    with pytest.raises(CheckpointError, match=words):
        Reader(folder).tensor(KEY)


def test_a_torn_header_is_named_and_nothing_else_is_printed(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 8)
    code = (
        "from pathlib import Path; from ldmscale.checkpoint.tensors import TensorFile\n"
        "from ldmscale.errors import CheckpointError\n"
        "try: TensorFile(Path('x.safetensors'))\n"
        "except CheckpointError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "is no whole safetensors file (found a header of 0 bytes" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "state", [{}, {"step": "four"}, {"step": None}, {"step": [1]}, {"step": float("inf")}]
)
def test_a_state_that_cannot_be_taken_apart_is_a_checkpoint_error(
    tmp_path: Path, state: dict[str, Any]
) -> None:
    with (
        pytest.raises(CheckpointError, match=re.escape(f"the training state in {tmp_path} does not fit")),
        state_of(tmp_path),
    ):
        int(state["step"])
