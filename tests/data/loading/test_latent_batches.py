"""Latents read by the batch are those of the careful way, whatever is wrong with the shards."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from ldmscale.data.conditions.annotations import ClassLabels
from ldmscale.data.conditions.boxes import LayoutTokens
from ldmscale.data.latents.format import LatentFormat, TextFormat
from ldmscale.data.latents.writer import LatentShardWriter
from ldmscale.data.loading.fetch import Fetcher, Run
from ldmscale.data.loading.latent_batches import LatentReader
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.skipped_samples import Ledger, read_ledger
from ldmscale.data.loading.transforms import LatentItem
from ldmscale.data.order.sequence import Sequence
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.tokenizers.bert import Tokenizer, train_wordpiece

FORMAT = LatentFormat("b" * 16, "moments", "float16", (4, 8, 8), {"size": 64})
COUNTS = (40, 30)
MEMBERS = ("__key__", "json", "latent.npy", "txt")
TOTAL = sum(COUNTS)


def write(folder: Path, format: LatentFormat = FORMAT, boxes: bool = False) -> list[str]:
    draws, paths = np.random.default_rng(7), []
    for shard, count in enumerate(COUNTS):
        with LatentShardWriter(folder, f"{shard:05d}.tar", format) as writer:
            for number in range(count):
                # Every size class of texts: within a block, one block exactly, several.
                caption = "word " * (number % 5 * 60) + f"caption {number} ü"
                metadata: dict[str, Any] = {"number": number, "url": "x" * (450 * (number % 3))}
                if boxes:  # every eighth is outside of the image
                    box = [0.1, 0.2, 0.31 + number % 8 / 10, 0.7]
                    metadata |= {"boxes": [{"class": 1, "box": box}], "width": 80 + number, "height": 64}
                key = f"{'folder/' if number % 7 == 0 else ''}{shard}{number:04d}"
                text = None if format.text is None else draws.standard_normal((3, 5))
                captions = {"txt": caption, "blip.txt": f"a picture of {number} ü"} if number % 9 else {}
                latent = draws.standard_normal(format.stored_shape)
                writer.write(key, latent, caption, metadata, text=text, captions=captions)
        paths.append(str(folder / f"{shard:05d}.tar"))
    return paths


def both(paths: list[str], item: LatentItem, folder: Path) -> tuple[LatentReader, list[Any], list[Any]]:
    """(reader, batches of the reader, items of the careful way for the same positions)."""
    index = ShardIndex.open(paths, build_missing=True)
    ways = [
        Fetcher(index, Sequence(index, 3, 2), item, seed=3, ledger=Ledger(folder / f"{name}.jsonl"))
        for name in ("batch", "careful")
    ]
    reader = LatentReader(ways[0], item)
    runs = [Run(start, 0, start, 10) for start in range(0, 2 * TOTAL, 10)]
    batches = [reader.read(run) for run in runs]
    return reader, batches, [ways[1].fetch(run.ticket(row)) for run in runs for row in range(run.samples)]


def assert_equal(batches: list[dict[str, Any]], wanted: list[Any], folder: Path) -> None:
    rows = [(batch, row) for batch in batches for row in range(len(batch["key"]))]
    for (batch, row), each in zip(rows, wanted, strict=True):
        assert (batch["key"][row], int(batch["skipped"][row])) == (each.key, each.skipped)
        assert batch["caption"][row] == each.item["caption"]
        found, wanted_latent = batch["latent"][row], torch.from_numpy(np.array(each.item["latent"]))
        assert torch.equal(found.to(wanted_latent.dtype), wanted_latent)
        if "text" in batch:
            assert torch.equal(
                batch["text"][row].float(), torch.from_numpy(np.array(each.item["text"], dtype=np.float32))
            )
        if "tokens" in batch:
            assert np.array_equal(batch["tokens"][row].numpy(), each.item["tokens"])
    told = [
        [(entry["shard"], entry["key"], entry["reason"], entry["position"]) for entry in read_ledger(path)]
        for path in (folder / "batch.jsonl", folder / "careful.jsonl")
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "format",
    [
        FORMAT,
        replace(FORMAT, dtype="float32"),
        replace(FORMAT, dtype="bfloat16"),
        replace(FORMAT, kind="latent"),
    ],
)
def test_whole_shards_are_read_by_the_batch(tmp_path: Path, format: LatentFormat) -> None:
    train_wordpiece(["caption word"], 60, tmp_path / "tokenizer")
    item = LatentItem(format, tokenizer=Tokenizer.load(tmp_path / "tokenizer", 6))
    reader, batches, wanted = both(write(tmp_path, format), item, tmp_path)
    assert reader.careful == 0 and batches[0]["latent"].dtype == getattr(torch, format.dtype)
    assert_equal(batches, wanted, tmp_path)
    assert read_ledger(tmp_path / "batch.jsonl") == []


def test_any_caption_of_the_source_is_read_by_the_batch(tmp_path: Path) -> None:
    paths = write(tmp_path)
    _, batches, wanted = both(paths, LatentItem(FORMAT, caption_source="captions:blip.txt"), tmp_path)
    assert_equal(batches, wanted, tmp_path)
    found = {
        key: caption
        for batch in batches
        for key, caption, skipped in zip(
            batch["key"], batch["caption"], batch["skipped"].tolist(), strict=True
        )
        if not skipped
    }
    assert len(found) > 50 and all(
        caption == f"a picture of {int(key[-4:])} ü" for key, caption in found.items()
    )
    # Every ninth sample lacks it, and is replaced.
    assert {int(entry["key"][-4:]) % 9 for entry in read_ledger(tmp_path / "batch.jsonl")} == {0}


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_stored_text_is_read_by_the_batch_and_its_damage_noticed(tmp_path: Path, dtype: str) -> None:
    form = TextFormat("e" * 16, "t" * 16, 3, 5, dtype)
    paths = write(tmp_path, replace(FORMAT, text=form))
    item = LatentItem(replace(FORMAT, text=form), text=form)
    reader, batches, wanted = both(paths, item, tmp_path)
    assert reader.careful == 0 and batches[0]["text"].dtype == getattr(torch, dtype)
    assert batches[0]["text"].shape == (10, 3, 5)
    assert_equal(batches, wanted, tmp_path)
    data, status = bytearray(Path(paths[1]).read_bytes()), os.stat(paths[1])
    start = data.index(b"10003.text.npy\0") // 512 * 512 + 512 + 128
    data[start : start + 4] = b"\xff\xff\xff\xff"  # not a number, in each of them
    Path(paths[1]).write_bytes(bytes(data))
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    reader, batches, wanted = both(paths, item, tmp_path)
    assert_equal(batches, wanted, tmp_path)
    (reason,) = {entry["reason"] for entry in read_ledger(tmp_path / "batch.jsonl")}
    assert reason == "its text.npy is no array of finite floats" and reader.careful == 2


def test_boxes_are_read_by_the_batch_in_the_view_of_their_latent(tmp_path: Path) -> None:
    layout = LayoutTokens(ClassLabels("json:boxes", 2), 8, 401)
    paths = write(tmp_path, FORMAT, boxes=True)
    item = LatentItem(FORMAT, seed=3, layout=layout)
    reader, batches, wanted = both(paths, item, tmp_path)
    assert_equal(batches, wanted, tmp_path)
    assert len({tuple(row) for batch in batches for row in batch["tokens"].tolist()}) > 15
    assert 0 < reader.careful < TOTAL
    assert "is outside of the image" in read_ledger(tmp_path / "batch.jsonl")[0]["reason"]


def test_shards_with_texts_before_the_arrays_are_read_by_the_batch(tmp_path: Path) -> None:
    """As webdataset writes them, which sorts members: json of several lengths, then the latent, then the caption."""
    (tmp_path / "sorted").mkdir()
    paths = []
    for path in write(tmp_path):
        paths.append(str(tmp_path / "sorted" / Path(path).name))
        with webdataset.TarWriter(paths[-1], mtime=0, encoder=False) as tar:
            for sample in webdataset.WebDataset(path, shardshuffle=False):
                tar.write({name: value for name, value in sample.items() if name in MEMBERS})
    reader, batches, wanted = both(paths, LatentItem(FORMAT), tmp_path)
    assert reader.careful == 0
    assert_equal(batches, wanted, tmp_path)


def flip_byte(data: bytearray, offset: int) -> None:
    data[offset] ^= 0x11


DAMAGE = {
    "name": 3, "mode": 103, "size": 130, "mtime": 140, "checksum": 150, "type": 156, "magic": 258, "owner": 270,
    "prefix": 400,
}  # fmt: skip


@pytest.mark.parametrize("where", list(DAMAGE))
@pytest.mark.parametrize("member", ["json", "latent.npy", "txt"])
def test_damaged_headers_are_noticed_as_the_careful_way_does(tmp_path: Path, where: str, member: str) -> None:
    paths = write(tmp_path)
    ShardIndex.open(paths, build_missing=True)
    data = bytearray(Path(paths[0]).read_bytes())
    status = os.stat(paths[0])
    for key in (b"00003.", b"00017.", b"00021."):
        flip_byte(data, data.index(key + member.encode() + b"\0") // 512 * 512 + DAMAGE[where])
    Path(paths[0]).write_bytes(bytes(data))
    os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # the index still stands
    reader, batches, wanted = both(paths, LatentItem(FORMAT), tmp_path)
    assert_equal(batches, wanted, tmp_path)
    assert len(read_ledger(tmp_path / "batch.jsonl")) >= 6 and 6 <= reader.careful < TOTAL


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_damaged_values_captions_and_cut_shards_are_noticed_as_the_careful_way_does(
    tmp_path: Path, write_tar: Callable[..., str], dtype: str
) -> None:
    format = replace(FORMAT, dtype=dtype)
    infinity, minus_nan = {
        "float16": (b"\x00\x7c", b"\x01\xfe"),
        "bfloat16": (b"\x80\x7f", b"\x81\xff"),
        "float32": (b"\x00\x00\x80\x7f", b"\x01\x00\x80\xff"),
    }[dtype]
    paths = write(tmp_path, format)
    ShardIndex.open(paths, build_missing=True)
    data = bytearray(Path(paths[1]).read_bytes())
    status = os.stat(paths[1])

    def at(name: bytes) -> int:
        return data.index(name + b"\0") // 512 * 512 + 512

    wide = len(infinity)
    data[at(b"10003.latent.npy") + 128 : at(b"10003.latent.npy") + 128 + wide] = infinity
    data[at(b"10004.latent.npy") + 400 : at(b"10004.latent.npy") + 400 + wide] = minus_nan
    data[at(b"10005.latent.npy") + 20] ^= 1  # the head of the array
    data[at(b"10006.txt")] = 0xFF  # no UTF-8
    Path(paths[1]).write_bytes(bytes(data))
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    other = write_tar(  # members that the layout does not know, in an order of their own
        tmp_path / "other.tar",
        [
            ("a.txt", b"a"),
            ("a.latent.npy", bytes(data[at(b"10008.latent.npy") :][: 128 + 512 * wide])),
            ("a.cls", b"1"),
        ],
    )
    reader, batches, wanted = both([*paths, other], LatentItem(format), tmp_path)
    assert_equal(batches, wanted, tmp_path)
    reasons = {entry["key"]: entry["reason"] for entry in read_ledger(tmp_path / "batch.jsonl")}
    assert {"10003", "10004", "10005", "10006"} == reasons.keys() and reader.careful < TOTAL
    assert "finite" in reasons["10003"] and "finite" in reasons["10004"] and "UTF-8" in reasons["10006"]


def test_workers_and_ranks_change_nothing(tmp_path: Path) -> None:
    index = ShardIndex.open(write(tmp_path), build_missing=True)

    def stream(rank: int, world: int, workers: int) -> list[tuple[str, bytes]]:
        loader = Loader(
            index, LatentItem(FORMAT), seed=1, rank=rank, world=world, global_batch=12, rank_micro_batch=3,
            workers=workers,
        )  # fmt: skip
        found = []
        for batch in itertools.islice(loader, 12 * loader.accumulation):
            found += [
                (key, latent.numpy().tobytes())
                for key, latent in zip(batch["key"], batch["latent"], strict=True)
            ]
        loader.close()
        return found

    alone = stream(0, 1, 0)
    assert stream(0, 1, 2) == alone
    halves = [stream(rank, 2, 0) for rank in (0, 1)]
    assert [row for step in range(12) for half in halves for row in half[6 * step : 6 * step + 6]] == alone


def test_memory_is_used_again_only_when_nobody_looks_at_it(tmp_path: Path) -> None:
    index = ShardIndex.open(write(tmp_path), build_missing=True)

    def loader() -> Loader:
        return Loader(index, LatentItem(FORMAT), seed=1, rank=0, world=1, global_batch=5, rank_micro_batch=5)

    stream = loader()
    # Held in every way: the batch, a view of a row, an array of one; and not at all.
    kept: list[Any] = []
    wanted = []
    for number, batch in enumerate(itertools.islice(stream, 40)):
        latent = batch["latent"]
        held = (latent, latent[2:4], latent.numpy()[1], latent.view(torch.int16)[0])[number % 4]
        if number % 8 < 4:
            kept.append(held)
            wanted.append(held.tolist())
        del batch, latent, held
    assert [each.tolist() for each in kept] == wanted
    kept.clear()
    places = {batch["latent"].data_ptr() for batch in itertools.islice(loader(), 40)}
    assert len(places) <= 4
