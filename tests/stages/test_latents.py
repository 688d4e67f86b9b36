"""Latents by many processes: the same bytes whoever makes them, however often some are killed, and each shard once."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

sys.path.insert(0, str(Path(__file__).parent))
from latents_case import (
    FORMAT,
    IN_EACH,
    SHARDS,
    SIZE,
    contents,
    end_all,
    fill,
    joined,
    make,
    prepared,
    stall,
    started,
    write_images,
)

from ldmscale.data.latents.format import LatentManifest, read_latent
from ldmscale.data.latents.work_queue import Claims
from ldmscale.data.latents.writer import LatentShardWriter, finish_set, is_finished
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.skipped_samples import read_ledger
from ldmscale.data.loading.transforms import LatentItem
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.reader import Sample
from ldmscale.data.tokenizers.bert import Tokenizer
from ldmscale.models.first_stage import LatentScale
from ldmscale.stages.first_stage import FirstStage
from ldmscale.stages.latents import make_shards


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True, scope="module")
def none_is_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture(scope="module")
def straight(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A set made by one process without a break, and how long that took."""
    out = tmp_path_factory.mktemp("straight") / "set"
    began = time.monotonic()
    joined(started(make, images, out, out))
    return out, time.monotonic() - began


def test_twenty_killed_ranks_leave_the_set_of_a_straight_run(
    images: Path, straight: tuple[Path, float], tmp_path: Path
) -> None:
    expected, seconds = straight
    draws, kills, sets = random.Random(0), 0, 0
    while kills < 20:  # a fast machine finishes a set before the last kill: then the next one is begun
        out, sets, before = tmp_path / f"set_{sets}", sets + 1, kills
        ranks = [started(make, images, out, out) for _ in range(2)]
        deadline = time.monotonic() + 120
        while len(list(out.glob("0*.json"))) < 1:  # they are at work
            assert time.monotonic() < deadline, [rank.exitcode for rank in ranks]
            time.sleep(0.01)
        while kills < 20:
            time.sleep(draws.uniform(0, seconds / 40))
            victim = draws.randrange(2)
            if not ranks[victim].is_alive():
                break  # it had nothing left to do
            ranks[victim].kill()
            ranks[victim].join(60)
            kills += ranks[victim].exitcode == -signal.SIGKILL
            ranks[victim] = started(make, images, out, out)
        joined(*ranks)
        assert kills > before, f"set {sets} was finished before a single kill"
        assert contents(out) == contents(expected)


def test_processes_that_know_nothing_of_each_other_share_the_work(
    images: Path, straight: tuple[Path, float], tmp_path: Path
) -> None:
    for attempt in range(5):  # one may have made all before the other is there
        out = tmp_path / f"set{attempt}"
        joined(*[started(make, images, out, out, 3) for _ in range(2)])
        made = [path.read_text().count(" samples") for path in tmp_path.glob(f"{out.name}.*.log")]
        assert sum(made) == SHARDS and contents(out) == contents(straight[0])
        if min(made) > 0:
            break
    assert min(made) > 0
    joined(started(make, images, out, out))  # finds all finished
    again = [path.read_text().count(" samples") for path in tmp_path.glob(f"{out.name}.*.log")]
    assert sum(again) == SHARDS and contents(out) == contents(straight[0])


def test_bytes_do_not_depend_on_batch_workers_and_threads(
    images: Path, straight: tuple[Path, float], tmp_path: Path
) -> None:
    joined(started(make, images, tmp_path / "other", tmp_path / "other", 5, 1, 2))
    assert contents(tmp_path / "other") == contents(straight[0])
    manifest = LatentManifest.load(tmp_path / "other")
    assert manifest.samples == SHARDS * IN_EACH and manifest.skipped == 0


def test_stored_latents_are_those_of_the_images_and_their_mirror_images(images: Path, tmp_path: Path) -> None:
    work, claims = prepared(images, tmp_path, flips=True, tokenizer="", dtype="bfloat16")
    assert make_shards(work, claims, lambda: False)
    tokenizer = Tokenizer.load(images / "tokenizer", 8)
    rows = list(webdataset.WebDataset(str(tmp_path / "00003.tar"), shardshuffle=False).decode())
    item = LatentItem(work.format, tokenizer=tokenizer, flip=True, seed=5)
    online = replace(work.item, flip=True, seed=5)
    flips = 0
    for at, row in enumerate(rows):
        assert row["__key__"] == f"03_{at}" and row["json"] == {"k": f"03_{at}"}
        assert row["latent.npy"].dtype == np.uint16  # bfloat16, as the manifest says
        source = work.reader.read(3, at)
        members = {name: npy(row[name]) for name in ("latent.npy", "latent_flipped.npy")}
        stored = item(Sample(row["__key__"], "", members | {"txt": row["txt"].encode()}), at)
        image = np.asarray(online(source, at)["image"])  # mirrored where the position says so
        flips += not np.array_equal(image, np.asarray(work.item(source, at)["image"]))
        expected = work.first_stage.moments(torch.from_numpy(image)[None])[0]
        assert torch.equal(
            torch.from_numpy(np.asarray(stored["latent"])), expected.to(torch.bfloat16).float()
        )
        assert row["tokens.npy"].dtype == np.int32 and np.array_equal(stored["tokens"], row["tokens.npy"])
        assert np.array_equal(np.asarray(stored["tokens"]), tokenizer.encode([f"caption 03_{at}"])[0])
    assert 0 < flips < IN_EACH


def test_stored_samples_are_what_online_encoding_draws_of_the_same_seed(
    images: Path, straight: tuple[Path, float], tmp_path: Path
) -> None:
    work, claims = prepared(images, tmp_path, kind="latent")  # latents.kind=sample
    assert make_shards(work, claims, lambda: False)
    names = [f"{number:05d}.tar" for number in range(SHARDS)]
    manifest = finish_set(tmp_path, names, work.format)
    # As training takes them: of images it encodes and draws, of such a set it scales what is there.
    scale = LatentScale(torch.tensor(manifest.channel_mean), torch.full((4,), manifest.scale_factor))
    stage = FirstStage(work.first_stage.autoencoder, scale, torch.device("cpu"))
    index = ShardIndex.open([str(tmp_path / each) for each in names], build_missing=True)
    loader = Loader(
        index, LatentItem(work.format), seed=0, rank=0, world=1, global_batch=7, rank_micro_batch=7
    )
    seen = set()
    for _ in range(SHARDS):
        batch_of_set = next(loader)
        found = stage.batch_latents(batch_of_set, seed=9)  # draws nothing any more
        for key, latent in zip(batch_of_set["key"], found, strict=True):
            seen.add(key)
            shard, at = map(int, key.split("_"))
            if shard >= 5:
                continue
            image = np.asarray(work.item(work.reader.read(shard, at), 0)["image"])
            moments = stage.moments(torch.from_numpy(image)[None])
            assert torch.equal(stage.latents(moments, [(shard << 32) + at], seed=0)[0], latent)
    assert len(seen) == SHARDS * IN_EACH
    # The whole set has the moments' statistics, to 5 standard errors of its draws.
    exact, values = LatentManifest.load(straight[0]), SHARDS * IN_EACH * (SIZE // 2) ** 2
    for drawn, wanted, deviation in zip(
        manifest.channel_mean, exact.channel_mean, exact.channel_std, strict=True
    ):
        assert abs(drawn - wanted) < 5 * deviation / values**0.5
    assert manifest.channel_std == pytest.approx(exact.channel_std, rel=5 / (2 * values) ** 0.5)
    assert manifest.scale_factor == pytest.approx(exact.scale_factor, rel=0.02)


def test_latents_that_are_not_finite_are_refused_by_key(images: Path, tmp_path: Path) -> None:
    work, claims = prepared(images, tmp_path, broken=True)
    assert make_shards(work, claims, lambda: False)  # seven of a shard are below the free faults
    entries = read_ledger(tmp_path / "data_ledger.jsonl")
    assert len(entries) == SHARDS * IN_EACH and "not finite" in entries[0]["reason"]
    assert {entry["key"] for entry in entries} == {
        f"{s:02d}_{n}" for s in range(SHARDS) for n in range(IN_EACH)
    }


def test_a_sample_whose_record_cannot_be_parsed_is_skipped_by_key(images: Path, tmp_path: Path) -> None:
    given, out = tmp_path / "given", tmp_path / "out"
    shutil.copytree(images, given, ignore=shutil.ignore_patterns(".ldmscale_index"))
    out.mkdir()
    refused = {"00_1": b"[" * 200_000, "00_2": b'{"a": ' * 900 + b"1" + b"}" * 900, "00_3": b'\xff{"k": 1}'}
    records = refused | {"00_4": b'{"note": "\\ud83d"}'}  # half a surrogate pair, which UTF-8 cannot write
    with tarfile.open(images / "00000.tar") as old, tarfile.open(given / "00000.tar", "w") as new:
        for member in old:
            key, _, extension = member.name.partition(".")
            file = old.extractfile(member)
            assert file is not None
            data = records[key] if extension == "json" and key in records else file.read()
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    work, claims = prepared(given, out)
    assert make_shards(work, claims, lambda: False)
    entries = read_ledger(out / "data_ledger.jsonl")
    assert {entry["key"] for entry in entries} == set(refused)
    assert all("no valid json" in entry["reason"] for entry in entries)
    with tarfile.open(out / "00000.tar") as made:
        kept = {
            name: made.extractfile(name).read()
            for name in made.getnames()
            if name.endswith(".json") and "sample" not in name
        }  # type: ignore[union-attr]
    assert sorted(kept) == ["00_0.json", "00_4.json", "00_5.json", "00_6.json"]
    assert json.loads(kept["00_4.json"]) == {"note": "\ud83d"}


def test_a_stopped_process_leaves_its_shard_to_others(images: Path, tmp_path: Path) -> None:
    work, claims = prepared(images, tmp_path)
    assert not make_shards(work, claims, lambda: (tmp_path / "00002.json").exists())
    assert not list(tmp_path.glob(".0*")) and not (tmp_path / "00005.json").exists()
    again = prepared(images, tmp_path)[1]
    claim = again.next(lambda number: None)
    assert claim is not None and not (tmp_path / claim.name).exists()
    claim.lease.release()


def test_a_process_that_wakes_too_late_cannot_publish(tmp_path: Path) -> None:
    late = started(stall, tmp_path, 0.6)
    assert late.pid is not None
    deadline = time.monotonic() + 60
    while os.waitpid(late.pid, os.WUNTRACED | os.WNOHANG) == (0, 0):
        assert time.monotonic() < deadline, "it has not come to the place where it stops itself"
        time.sleep(0.01)
    claims = Claims(
        tmp_path, ["00000.tar"], lambda n: is_finished(tmp_path, "00000.tar", FORMAT), timeout_seconds=0.6
    )
    while (claim := claims.next(lambda n: None)) is None:
        assert time.monotonic() < deadline, "the claim of a stopped process was not taken over"
        time.sleep(0.05)
    with LatentShardWriter(tmp_path, "00000.tar", FORMAT, None, claim.lease.check) as writer:
        fill(writer, 2.0)
    before = contents(tmp_path)
    os.kill(late.pid, signal.SIGCONT)
    late.join(30)
    assert late.exitcode == 7
    assert contents(tmp_path) == before and set(before) == {"00000.tar", "00000.json"}


def test_one_that_wakes_behind_its_last_check_cannot_publish_either(tmp_path: Path) -> None:
    with LatentShardWriter(tmp_path, "00000.tar", FORMAT) as late:
        fill(late, 1.0)
        with LatentShardWriter(tmp_path, "00000.tar", FORMAT) as fast:
            fill(fast, 2.0)
        before = contents(tmp_path)
    assert contents(tmp_path) == before and set(before) == {"00000.tar", "00000.json"}
    members = {
        "latent.npy": next(iter(webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False)))[
            "latent.npy"
        ]
    }
    assert (read_latent(members, FORMAT) == 2.0).all()


def test_a_death_between_commit_and_move_loses_nothing(tmp_path: Path) -> None:
    with LatentShardWriter(tmp_path, "00000.tar", FORMAT) as writer:
        fill(writer, 1.0)
    before = contents(tmp_path)
    checksum = json.loads(before["00000.json"])["sha256"]
    (tmp_path / "00000.tar").rename(tmp_path / f".00000.tar.{checksum}.part")
    assert is_finished(tmp_path, "00000.tar", FORMAT) and contents(tmp_path) == before
    (tmp_path / "00000.tar").unlink()  # by hand: it is made again
    assert not is_finished(tmp_path, "00000.tar", FORMAT)
    with LatentShardWriter(tmp_path, "00000.tar", FORMAT) as writer:
        fill(writer, 1.0)
    assert contents(tmp_path) == before


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    source = {"name": "a.tar", "size": 10, "version": "1"}
    with LatentShardWriter(tmp_path, "00000.tar", FORMAT, source) as writer:
        fill(writer, 1.0)
    assert is_finished(tmp_path, "00000.tar", FORMAT, source)
    with pytest.raises(Exception, match=r"made of other images \(size: 10 there, 11 now\)"):
        is_finished(tmp_path, "00000.tar", FORMAT, source | {"size": 11})


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
