"""Latents by forked processes: what tests of folders and of stores share."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from ldmscale.data.latents.format import LatentFormat, LatentManifest
from ldmscale.data.latents.store import LatentStore, place_of
from ldmscale.data.latents.work_queue import Claims
from ldmscale.data.latents.writer import LatentShardWriter, finish_set, is_finished
from ldmscale.data.loading.skipped_samples import Ledger
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.reader import SampleReader
from ldmscale.data.tokenizers.bert import Tokenizer, train_wordpiece
from ldmscale.errors import DataError
from ldmscale.models.autoencoder import KLAutoencoder
from ldmscale.models.first_stage import LatentScale, digest
from ldmscale.stages.first_stage import FirstStage
from ldmscale.stages.latents import LatentsWork, make_shards
from ldmscale.storage.lease import LeaseLostError
from ldmscale.storage.object_store import Storage

SHARDS, IN_EACH, SIZE = 24, 7, 32
FORK = multiprocessing.get_context("fork")
# Clients of stores have threads of their own, which do not survive a fork.
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["latents_case"])


def write_images(folder: Path) -> Path:
    """Shards of images in a folder, and a tokenizer."""
    folder.mkdir(exist_ok=True)
    draws = np.random.default_rng(0)
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as tar:
            for number in range(IN_EACH):
                picture = io.BytesIO()
                Image.fromarray(draws.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(picture, "PNG")
                key = f"{shard:02d}_{number}"
                tar.write(
                    {"__key__": key, "png": picture.getvalue(), "txt": f"caption {key}", "json": {"k": key}}
                )
    train_wordpiece([f"caption {number}" for number in range(50)], 60, folder / "tokenizer")
    return folder


def prepared(
    images: Path,
    out: Path | LatentStore,
    batch: int = 4,
    workers: int = 0,
    broken: bool = False,
    **format: object,
) -> tuple[LatentsWork, Claims]:
    """What a rank works by. The ledger of a set in a store is beside the images."""
    place = place_of(out)
    ledger = Ledger((images if isinstance(out, LatentStore) else out) / "data_ledger.jsonl")
    index = ShardIndex.open([str(images / f"{n:05d}.tar") for n in range(SHARDS)], build_missing=True)
    torch.manual_seed(0)
    network = KLAutoencoder(latent_channels=4, channels=32, channel_mult=(1, 2), blocks_per_level=1)
    if broken:
        with torch.no_grad():
            next(network.parameters()).fill_(float("nan"))
    tokenizer = Tokenizer.load(images / "tokenizer", 8) if "tokenizer" in format else None
    form = LatentFormat(digest(network), "moments", "float32", (4, SIZE // 2, SIZE // 2), {"size": SIZE})
    form = replace(form, **{**format, **({"tokenizer": tokenizer.fingerprint} if tokenizer else {})})
    scale = LatentScale(torch.zeros(4), torch.ones(4))
    sources = [{"name": f"{n:05d}.tar", "size": 1} for n in range(SHARDS)]
    work = LatentsWork(
        reader=SampleReader(index),
        item=ImageItem(SIZE, 0, caption_source="txt", tokenizer=tokenizer),
        first_stage=FirstStage(network, scale, torch.device("cpu")),
        format=form,
        sources=sources,
        ledger=ledger,
        batch=batch,
        workers=workers,
    )
    names = [f"{n:05d}.tar" for n in range(SHARDS)]
    return work, Claims(
        place, names, lambda n: is_finished(place, names[n], form, sources[n]), timeout_seconds=30.0
    )


def make(
    images: Path,
    out: Path | LatentStore,
    told: Path,
    batch: int = 4,
    workers: int = 0,
    threads: int = 1,
    **format: object,
) -> None:
    """What a rank does, from the index to the set's manifest. `told`: its log begins so."""
    torch.set_num_threads(threads)
    handler = logging.FileHandler(told.with_name(f"{told.name}.{os.getpid()}.log"))
    logging.getLogger("ldmscale.stages.latents").addHandler(handler)
    logging.getLogger("ldmscale.stages.latents").setLevel(logging.INFO)
    work, claims = prepared(images, out, batch, workers, **format)
    assert make_shards(work, claims, lambda: False)

    def done() -> bool:
        try:
            return LatentManifest.load(str(claims.place), storage_of(out)).samples > 0
        except DataError:
            return False

    claims.once(done, lambda: finish_set(claims.place, claims.names, work.format) and None)


def make_in_store(images: Path, url: str, storage: Storage, told: Path) -> None:
    make(images, LatentStore(url, storage), told)


def stall_in_store(url: str, storage: Storage) -> None:
    stall(LatentStore(url, storage), 3.0)


def stall(place: Path | LatentStore, timeout_seconds: float) -> None:
    """Claims the first shard, and stops itself when it has written it but not published."""
    claims = Claims(place, ["00000.tar"], lambda n: False, timeout_seconds=timeout_seconds)
    claim = claims.next(lambda n: None)
    assert claim is not None
    try:
        with LatentShardWriter(place, "00000.tar", FORMAT, None, claim.lease.check) as writer:
            fill(writer, 1.0)
            os.kill(os.getpid(), signal.SIGSTOP)
    except LeaseLostError:
        os._exit(7)


def storage_of(out: Path | LatentStore) -> Storage | None:
    return out.store.storage if isinstance(out, LatentStore) else None


STARTED: list[multiprocessing.process.BaseProcess] = []


def started(
    function: Callable[..., None], *arguments: object, clean: bool = False
) -> multiprocessing.process.BaseProcess:
    process = (CLEAN if clean else FORK).Process(target=function, args=arguments)
    process.start()
    STARTED.append(process)
    return process


def end_all() -> None:
    """Python waits at its end for processes that a failed test left behind, a stopped one for instance."""
    for process in STARTED:
        process.kill()
        process.join(60)


def joined(*processes: multiprocessing.process.BaseProcess) -> None:
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


FORMAT = LatentFormat("a" * 16, "latent", "float32", (2, 3, 3), {"size": 6})


def fill(writer: LatentShardWriter, value: float) -> None:
    writer.write("key", np.full((2, 3, 3), value), "caption", {})
