"""Streams of samples beside webdataset's documented pipeline and beside the bare work: one core, interleaved rounds.

    python -m benchmarks.data_streams [--rounds 5] [--samples 1024]

Images (320x288 JPEGs of about 25 KB to 256 px squares, uint8): ours with both decoders; webdataset with Pillow; decode
and resize alone, with bytes that are in memory. Latents (moments [8,32,32] fp16, 64 a batch): ours; webdataset;
reading the files from end to end; reading the samples' bytes alone in our shuffled order.
Before any clock runs, both give the same set of keys, pixels within the filters' rounding, and equal latents. Ratios are
taken within a round, so that a load that comes and goes meets all; the median over rounds is printed, one JSON line each.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from ldmscale.data.budget import next_for_all
from ldmscale.data.decode import decode_image
from ldmscale.data.index import ShardIndex
from ldmscale.data.items import ImageItem, LatentItem
from ldmscale.data.latent_shards import LatentShardWriter
from ldmscale.data.latents import LatentFormat
from ldmscale.data.loader import Loader
from ldmscale.data.sequence import Sequence

SIZE, BATCH, SHARDS = 256, 16, 4
LATENT_BATCH = 64  # latents are small: a rank takes many at a time
FORMAT = LatentFormat("bench", "moments", "float16", (4, 32, 32), {"size": SIZE})

Work = Callable[[], Iterator[tuple[str, np.ndarray]]]


def write_images(folder: Path, samples: int) -> None:
    draws = np.random.default_rng(0)
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as tar:
            for number in range(samples // SHARDS):
                small = draws.integers(0, 256, (18, 20, 3), dtype=np.uint8)
                smooth = np.asarray(
                    Image.fromarray(small).resize((320, 288), Image.Resampling.BICUBIC), dtype=np.int16
                )
                noisy = np.clip(smooth + draws.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
                key = f"{shard:02d}{number:05d}"
                tar.write(
                    {"__key__": key, "jpg": buffer.getvalue(), "txt": f"caption {key}", "json": {"key": key}}
                )


def write_latents(folder: Path, samples: int) -> None:
    draws = np.random.default_rng(0)
    for shard in range(SHARDS):
        with LatentShardWriter(folder, f"{shard:05d}.tar", FORMAT) as writer:
            for number in range(samples // SHARDS):
                key = f"{shard:02d}{number:05d}"
                writer.write(key, draws.standard_normal(FORMAT.stored_shape), f"caption {key}", {"key": key})


def pillow(data: bytes) -> np.ndarray:
    """What users of webdataset write: decode, resize the short side, crop the centre. uint8 [3, SIZE, SIZE]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SIZE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    array = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def ours(folder: Path, item: ImageItem | LatentItem, name: str, samples: int, size: int = BATCH) -> Work:
    index = ShardIndex.open(sorted(map(str, folder.glob("*.tar"))), build_missing=True)

    def work() -> Iterator[tuple[str, np.ndarray]]:
        loader = Loader(index, item, seed=0, rank=0, world=1, global_batch=size, rank_micro_batch=size)
        for _ in range(samples // size):
            batch = next_for_all(loader)
            yield from zip(batch["key"], batch[name].numpy(), strict=True)

    return work


def peer(folder: Path, extension: str, decode: Callable[[bytes], np.ndarray], size: int = BATCH) -> Work:
    shards = sorted(map(str, folder.glob("*.tar")))

    def collate(rows: list[tuple[str, np.ndarray, str]]) -> tuple[list[str], torch.Tensor]:
        return [row[0] for row in rows], torch.from_numpy(np.stack([row[1] for row in rows]))

    def work() -> Iterator[tuple[str, np.ndarray]]:
        data = webdataset.WebDataset(shards, shardshuffle=SHARDS, seed=0).shuffle(1000)
        data = data.to_tuple("__key__", extension, "txt").map_tuple(str, decode, bytes.decode)
        for keys, batch in data.batched(size, collation_fn=collate):
            yield from zip(keys, batch.numpy(), strict=True)

    return work


def spans(folder: Path, samples: int) -> Work:
    """The reads alone that a shuffled order asks for."""
    index = ShardIndex.open(sorted(map(str, folder.glob("*.tar"))), build_missing=True)
    sequence = Sequence(index, 0)

    def work() -> Iterator[tuple[str, np.ndarray]]:
        files = [os.open(path, os.O_RDONLY) for path in index.shards]
        for first in range(0, samples, LATENT_BATCH):
            shards, indices = sequence.places(0, first, LATENT_BATCH)
            offsets, sizes = index.spans(shards, indices)
            for shard, offset, size in zip(shards.tolist(), offsets.tolist(), sizes.tolist(), strict=True):
                yield "", np.frombuffer(os.pread(files[shard], size, offset), dtype=np.uint8)
        for handle in files:
            os.close(handle)

    return work


def contest(name: str, works: dict[str, Work], rounds: int, samples: int) -> None:
    rates: dict[str, list[float]] = {each: [] for each in works}
    order = list(works)
    for number in range(rounds):
        for each in order if number % 2 == 0 else reversed(order):
            began = time.process_time()
            count = sum(1 for _ in works[each]())
            assert count == samples, (each, count)
            rates[each].append(samples / (time.process_time() - began))
    first = rates[order[0]]
    for each, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(first, found, strict=True))
        row = {
            "stream": name,
            "of": each,
            "per_second": round(statistics.median(found)),
            "ours_over_it": round(ratio, 2),
        }
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1024)
    chosen = parser.parse_args()
    samples = max(1, chosen.samples // (SHARDS * LATENT_BATCH)) * SHARDS * LATENT_BATCH
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        images, latents = Path(scratch, "images"), Path(scratch, "latents")
        images.mkdir()
        write_images(images, samples)
        many = 4 * samples  # latents
        write_latents(latents, many)
        held = {key: data for key, data in _members(images, "jpg")}

        def alone() -> Iterator[tuple[str, np.ndarray]]:
            for key, data in held.items():
                yield key, decode_image(data, size=SIZE, decoder="turbo")

        works = {
            "ours, turbo": ours(
                images, ImageItem(SIZE, 0, decoder="turbo", caption_source="txt"), "image", samples
            ),
            "ours, pillow": ours(images, ImageItem(SIZE, 0, caption_source="txt"), "image", samples),
            "webdataset with Pillow": peer(images, "jpg", pillow),
            "decode and resize alone, turbo": alone,
        }
        wanted = dict(works["webdataset with Pillow"]())
        for name in ("ours, turbo", "ours, pillow"):
            found = dict(works[name]())
            assert found.keys() == wanted.keys()
            worst = max(
                float(np.abs(found[key].astype(int) - wanted[key]).mean())
                for key in itertools.islice(wanted, 64)
            )
            assert worst < 3.0, worst  # they crop before they scale, or after: half a pixel here and there
        contest("images", works, chosen.rounds, samples)

        def raw() -> Iterator[tuple[str, np.ndarray]]:
            for path in sorted(latents.glob("*.tar")):
                with open(path, "rb") as stream:
                    part = path.stat().st_size * SHARDS // many
                    for _ in range(many // SHARDS):
                        yield "", np.frombuffer(stream.read(part), dtype=np.uint8)

        works = {
            "ours": ours(latents, LatentItem(FORMAT), "latent", many, LATENT_BATCH),
            "webdataset": peer(latents, "latent.npy", lambda data: np.load(io.BytesIO(data)), LATENT_BATCH),
            "reading the files from end to end": raw,
            "reading the samples' bytes in our order": spans(latents, many),
        }
        mine, theirs = dict(works["ours"]()), dict(works["webdataset"]())
        assert mine.keys() == theirs.keys() and all(np.array_equal(mine[key], theirs[key]) for key in mine)
        contest("latents", works, chosen.rounds, many)


def _members(folder: Path, extension: str) -> Iterator[tuple[str, bytes]]:
    for sample in webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False):
        yield sample["__key__"], sample[extension]


if __name__ == "__main__":
    main()
