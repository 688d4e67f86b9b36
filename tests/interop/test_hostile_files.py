"""Files made to harm: an import keeps every value bit for bit or refuses by name, at once and in little memory."""

from __future__ import annotations

import os
import resource
import struct
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import FAMILIES, compvis_state

from ldmscale.cli import main
from ldmscale.errors import DataError
from ldmscale.interop.compvis_config import load_yaml, read_hints
from ldmscale.interop.lightning import read_lightning, storable, write_lightning
from ldmscale.interop.pickles import read_pickle
from ldmscale.interop.tensors import read_json, read_safetensors

WEIGHT = "model.diffusion_model.out.0.bias"


def memo_bomb() -> list:
    bomb: list = [1] * 10
    for _ in range(8):
        bomb = [bomb] * 10
    return bomb


def cycle() -> list:
    found: list = []
    found.append(found)
    return found


def nested(depth: int) -> list:
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


def sparse(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_sparse()


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 1.0, 0, torch.quint8)


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ({"hyper_parameters": {"x": memo_bomb()}}, "expands to more than 1,000,000 values"),
        ({"callbacks": memo_bomb()}, "expands to more than 1,000,000 values"),
        ({"callbacks": ["x" * 1_000_000] * 1000}, "expands to more than 1,000,000 values"),
        ({"callbacks": cycle()}, "holds itself"),
        ({"hyper_parameters": {"x": cycle()}}, "holds itself"),
        ({"callbacks": nested(400)}, "nested more than 64 deep"),
        ({"callbacks": [torch.zeros(1 << 20)] * 1000}, "its tensors take"),
    ],
    ids=[
        "memo bomb in settings",
        "memo bomb",
        "long text",
        "cycle",
        "cycle in settings",
        "deep",
        "many copies",
    ],
)
def test_shared_references_are_refused_within_a_second(beside: dict, told: str, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {WEIGHT: torch.zeros(4)}, **beside}, path)
    began = time.process_time()
    with pytest.raises(DataError, match=told):
        read_pickle(path)
    assert time.process_time() - began < 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (sparse, "is sparse_coo, expected a dense tensor"),
        (quantized, "has the dtype quint8"),
        (lambda t: t.to("meta"), "has no values: it is a meta tensor"),
        (lambda t: t.to(torch.complex64), "has the dtype complex64"),
        (lambda t: t.to(torch.int32), "has the dtype int32, expected floating point"),
        (lambda t: torch.zeros(1).expand(1 << 40), "has more elements than the file has for it"),
    ],
    ids=["sparse", "quantized", "meta", "complex", "int", "expanded"],
)
def test_tensors_that_cannot_be_kept_are_refused_by_name(change, told, tmp_path, capfd) -> None:
    state = compvis_state(FAMILIES["text2img"])
    state[WEIGHT] = change(state[WEIGHT])
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model", "unet.heads=8"]) == 2
    assert f"{WEIGHT} {told}" in capfd.readouterr().err.replace("[1099511627776] ", "")
    assert not (tmp_path / "model").exists()


def test_weights_that_are_not_finite_are_kept_and_reported(tmp_path, capfd) -> None:
    state = compvis_state(FAMILIES["text2img"])
    state[WEIGHT] = torch.full_like(state[WEIGHT], float("nan"))
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model", "unet.heads=8"]) == 0
    told = capfd.readouterr().err
    assert "unet: 1 of" in told and "not finite" in told
    assert main(["export", f"src={tmp_path}/model", f"dst={tmp_path}/back.ckpt", "format=compvis"]) == 0
    back = read_pickle(tmp_path / "back.ckpt")["state_dict"]
    assert back[WEIGHT].view(torch.int32).equal(state[WEIGHT].view(torch.int32))


def test_values_beside_the_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = {
        "bytes": b"\x00\xffabc", "bytearray": bytearray(b"xy"), "set": {1, "a", (2, 3)}, "complex": 1 - 2.5j,
        "half": "\ud83d", "large": 10**5000, "nan": [float("nan"), float("-inf"), -0.0], "tuple": {(1, 2): [3]},
        "alike": {1: torch.ones(1), "1": torch.zeros(1)}, "\x1b]0;X\x07": "\u202e", "none": None, "true": True,
    }  # fmt: skip
    kept = storable(values)
    write_lightning(kept, tmp_path)
    back = read_lightning(tmp_path)
    assert [type(value) for value in back.values()] == [type(value) for value in values.values()]
    for name in ("set", "large"):  # of no one order, and of more digits than Python writes
        assert back.pop(name) == values.pop(name)
    assert repr(back) == repr(values)


@pytest.mark.parametrize(
    ("kind", "size", "told"),
    [
        ("deflated", 1 << 28, "is compressed"),
        ("stored", 0, "claims"),
        ("stored", 1 << 26, "data.pkl of more than"),
    ],
    ids=["deflated to a thousandth", "a size beyond the file", "too large"],
)
def test_archives_that_expand_are_refused_in_little_memory(kind, size, told, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    how = zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED
    block = b"K\x010" * (1 << 20)
    with zipfile.ZipFile(path, "w", how, compresslevel=1) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.write(b"\x80\x02K\x01.")
        archive.writestr("archive/version", "3\n")
    if not size:  # the directory at the end says 2 GiB of the first member
        data = bytearray(path.read_bytes())
        entry = data.index(b"PK\x01\x02")
        data[entry + 20 : entry + 28] = struct.pack("<II", 1 << 31, 1 << 31)
        path.write_bytes(data)
    with little_more(1 << 27), pytest.raises(DataError, match=told):
        began = time.process_time()
        read_pickle(path)
    assert time.process_time() - began < 1


@contextmanager
def little_more(nbytes: int) -> Iterator[None]:
    """Lets this process take so many bytes beyond what it has."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, now + nbytes):
        yield


@contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


ANCHORS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (ANCHORS, "expands to more than"),
        (ANCHORS + "model: {params: {unet_config: {params: {num_heads: *j}}}}\n", "expands to more than"),
        ("a: &a {x: 1}\n" + "b: [" + "*a," * 200 + "]\n", "more than 100 aliases"),
        ("a: &a {x: 1}\nb:\n  <<: *a\n", "merges mappings"),
        ("[" * 5000, "nested more than 64 deep"),
        ("model: !!python/object/apply:os.system ['true']\n", "cannot be read as a configuration"),
        ("a: " + "x" * (1 << 20), "more than 1,048,576 bytes"),
    ],
    ids=["aliases", "aliases in a setting", "many aliases", "merge", "deep", "object", "large"],
)
def test_yaml_that_expands_is_refused_within_a_second(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(DataError, match=told):
        load_yaml(path)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"timesteps": 10**9}, "timesteps=1000000000: expected a whole number from 1 to 100000"),
        ({"timesteps": "many"}, "timesteps='many'"),
        ({"beta_schedule": ["a"]}, "beta_schedule=a list"),
        ({"parameterization": {}}, "parameterization=a dict"),
        ({"linear_start": float("nan")}, "linear_start=nan"),
        ({"scale_factor": True}, "scale_factor=True"),
        ({"unet_config": {"params": {"num_heads": 0}}}, "num_heads=0"),
        ({"unet_config": {"params": {"dims": memo_bomb()}}}, "dims=a list"),
        ({"unet_config": {"params": {"dropout": "\x1b[2J"}}}, "dropout="),
        ({"cond_stage_config": {"params": {"heads": [8]}}}, "heads=a list"),
    ],
)
def test_settings_of_wrong_types_are_named(params: dict, told: str) -> None:
    whole = {"unet_config": {"params": {}}} | params
    with pytest.raises(DataError) as error:
        read_hints({"params": whole}, "hyper_parameters")
    assert told in str(error.value) and len(str(error.value)) < 300 and "\x1b" not in str(error.value)


def test_pytorchs_advice_and_escape_codes_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02ctorch.serialization\nload\nX\x02\x00\x00\x00/x\x85R.")
        archive.writestr("archive/version", "3\n")
    with pytest.raises(DataError, match=r"torch\.serialization\.load") as error:
        read_pickle(path)
    assert "\x1b" not in error.value.faults[0] and "weights_only" not in error.value.faults[0]


@pytest.mark.parametrize(
    "pickled",
    [b"\x80\x02.", b"\x80\x02\x86.", b"\x80\x02ccollections\nOrderedDict\nR.", b"\x80\x02h\x09.",
     b"\x80\x02}](K\x01e]s.", b"\x80\x02K\x01K\x02K\x03s."],
    ids=["empty stack", "tuple of nothing", "call of nothing", "unknown memo", "unhashable", "item of a number"],
)  # fmt: skip
def test_pickles_that_make_no_sense_are_refused(pickled: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(DataError, match="cannot be read as weights only"):
        read_pickle(path)


@pytest.mark.parametrize(
    ("length", "size", "told"),
    [(1 << 30, 10, "no whole"), (1 << 63, 10, "no whole"), (1 << 26, 1 << 27, "claims a header of")],
    ids=["1 GiB that is not there", "2^63", "64 MiB"],
)
def test_a_header_beyond_all_reason_is_refused(length: int, size: int, told: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    os.truncate(path, size)
    with pytest.raises(DataError, match=told):
        read_safetensors(path)


def test_json_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_json(tmp_path / "config.json")


def test_a_name_of_a_tensor_cannot_forge_a_line(tmp_path: Path, capfd) -> None:
    state = compvis_state(FAMILIES["text2img"])
    state["\x1b[2J\x1b]0;HACK\x07\n18:00:00 ERROR all is lost \u202e" + "k" * 60_000] = torch.zeros(1)
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    assert main(["import", f"src={tmp_path}/model.ckpt", f"dst={tmp_path}/model", "unet.heads=8"]) == 2
    told = capfd.readouterr().err
    assert "\x1b" not in told and "\u202e" not in told and len(told) < 3000
    assert not any(line.startswith("18:00:00 ERROR") for line in told.splitlines())


def test_a_disk_that_is_full_is_no_traceback_and_leaves_nothing(tmp_path: Path, capfd) -> None:
    state = compvis_state(FAMILIES["text2img"])
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    room = (tmp_path / "model.ckpt").stat().st_size // 4
    src, dst = f"src={tmp_path}/model.ckpt", tmp_path / "model"
    with limited(resource.RLIMIT_FSIZE, room):
        assert main(["import", src, f"dst={dst}", "unet.heads=8"]) == 1
    assert "free room there" in capfd.readouterr().err and not dst.exists()
    assert main(["import", src, f"dst={dst}", "unet.heads=8"]) == 0
    with limited(resource.RLIMIT_FSIZE, room):
        assert main(["export", f"src={dst}", f"dst={tmp_path}/back.ckpt", "format=compvis"]) == 1
    assert "free room there" in capfd.readouterr().err and not list(tmp_path.glob("*back*"))
