"""Streams of samples beside peers and beside the bare work: one core each, processor time, interleaved rounds.

    python -m benchmarks.data_streams images|latents [--rounds 5] [--samples 1024] [--peers] [--quick]

Images (320x288 JPEGs of about 25 KB to 256 px squares, uint8): ours with both decoders; webdataset's documented pipeline
with Pillow; decode and resize alone by each decoder, of bytes in memory. Latents (moments [8,32,32] fp16, 64 a batch): ours;
webdataset; reading the files from end to end; reading the samples' bytes alone in our shuffled order. megatron-energon and
mosaicml-streaming take part where `--peers` has made their environments (`peers`).
Before any clock runs all give the same set of keys, pixels within the filters' rounding, and equal latents. Ratios are
taken within a round, so that a load that comes and goes meets all; the median over rounds is printed.
"""

from __future__ import annotations

import argparse
import io
import itertools
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

from benchmarks.peer_streams import SIZE, array, checksum, pillow
from benchmarks.peers import PEERS, Peer, python_of
from ldmscale.data.images.decode import decode_image
from ldmscale.data.latents.format import LatentFormat
from ldmscale.data.latents.writer import LatentShardWriter
from ldmscale.data.loading.loader import Loader
from ldmscale.data.loading.training_data import next_for_all
from ldmscale.data.loading.transforms import ImageItem, LatentItem
from ldmscale.data.order.sequence import Sequence
from ldmscale.data.shards.index import ShardIndex

BATCH, SHARDS = 16, 4
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


def timed(work: Work) -> Callable[[], float]:
    """Processor time of one pass."""

    def seconds() -> float:
        began = time.process_time()
        for _ in work():
            pass
        return time.process_time() - began

    return seconds


def contest(works: dict[str, Callable[[], float]], rounds: int, samples: int, of: str) -> None:
    """Prints how often each goes through the samples a second, and ours over it. `of`: names of ours."""
    rates: dict[str, list[float]] = {each: [] for each in works}
    for number in range(rounds):
        for each in works if number % 2 == 0 else reversed(works):
            rates[each].append(samples / works[each]())
    mine = [each for each in works if each.startswith(of)]
    print(f"| | samples/s | {' | '.join(f'{each}, ratio' for each in mine)} |")
    print(f"|---|---:|{'---:|' * len(mine)}")
    for each, found in rates.items():
        ratios = [statistics.median(a / b for a, b in zip(rates[ours], found, strict=True)) for ours in mine]
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {each} | {statistics.median(found):,.0f} | {cells} |", flush=True)


def peers(kind: str, folder: Path, samples: int, batch: int, *, make: bool) -> list[Peer]:
    """The peers that are there, each with shards of its own."""
    found = []
    for name in PEERS:
        python = python_of(name, make=make)
        if python is None:
            print(f"({name} takes no part: --peers makes its environment)")
            continue
        own = folder.with_name(f"{folder.name}_{name}")
        own.mkdir()
        for path in folder.glob("*.tar"):
            os.link(path, own / path.name)
        found.append(Peer(python, name, kind, own, samples, batch))
    return found


def images(scratch: Path, samples: int, rounds: int, make_peers: bool) -> None:
    folder = scratch / "images"
    folder.mkdir()
    write_images(folder, samples)
    held = dict(_members(folder, "jpg"))

    def alone(decoder: str) -> Work:
        def work() -> Iterator[tuple[str, np.ndarray]]:
            for key, data in held.items():
                yield key, decode_image(data, size=SIZE, decoder=decoder)

        return work

    works = {
        f"ours, {decoder}": ours(
            folder, ImageItem(SIZE, 0, decoder=decoder, caption_source="txt"), "image", samples
        )
        for decoder in ("turbo", "pillow")
    }
    works["webdataset, Pillow"] = peer(folder, "jpg", pillow)
    works |= {f"decode and resize alone, {decoder}": alone(decoder) for decoder in ("turbo", "pillow")}
    wanted = dict(works["webdataset, Pillow"]())
    assert len(wanted) == samples
    for name in ("ours, turbo", "ours, pillow"):
        found = dict(works[name]())
        assert found.keys() == wanted.keys()
        worst = max(
            float(np.abs(found[key].astype(int) - wanted[key]).mean()) for key in itertools.islice(wanted, 64)
        )
        assert worst < 3.0, worst  # they crop before they scale, or after: half a pixel here and there
    others = peers("images", folder, samples, BATCH, make=make_peers)
    _compete(works, others, {key: checksum(pixels) for key, pixels in wanted.items()}, rounds, samples)


def latents(scratch: Path, samples: int, rounds: int, make_peers: bool) -> None:
    folder = scratch / "latents"
    write_latents(folder, samples)

    def raw() -> Iterator[tuple[str, np.ndarray]]:
        for path in sorted(folder.glob("*.tar")):
            with open(path, "rb") as stream:
                part = path.stat().st_size * SHARDS // samples
                for _ in range(samples // SHARDS):
                    yield "", np.frombuffer(stream.read(part), dtype=np.uint8)

    works = {
        "ours": ours(folder, LatentItem(FORMAT), "latent", samples, LATENT_BATCH),
        "webdataset": peer(folder, "latent.npy", array, LATENT_BATCH),
        "reading the files from end to end": raw,
        "reading the samples' bytes in our order": spans(folder, samples),
    }
    mine, theirs = dict(works["ours"]()), dict(works["webdataset"]())
    assert len(mine) == samples and mine.keys() == theirs.keys()
    assert all(np.array_equal(mine[key], theirs[key]) for key in mine)
    others = peers("latents", folder, samples, LATENT_BATCH, make=make_peers)
    _compete(works, others, {key: checksum(values) for key, values in theirs.items()}, rounds, samples)


def _compete(
    works: dict[str, Work], others: list[Peer], wanted: dict[str, str], rounds: int, samples: int
) -> None:
    for other in others:
        assert other.sums() == wanted, f"{other.name} gives other samples"
    all_of_them = {each: timed(work) for each, work in works.items()}
    all_of_them |= {other.name: other.seconds for other in others}
    contest(all_of_them, rounds, samples, "ours")
    for other in others:
        other.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("images", "latents"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1024, help="four times as many latents")
    parser.add_argument("--peers", action="store_true", help="make the environments of peers")
    parser.add_argument("--quick", action="store_true", help="few samples, one round: does it work?")
    chosen = parser.parse_args()
    many = 64 if chosen.quick else max(1, chosen.samples // (SHARDS * LATENT_BATCH)) * SHARDS * LATENT_BATCH
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rounds = 1 if chosen.quick else chosen.rounds
        if chosen.kind == "images":
            images(Path(scratch), many, rounds, chosen.peers)
        else:
            latents(Path(scratch), 4 * many, rounds, chosen.peers)


def _members(folder: Path, extension: str) -> Iterator[tuple[str, bytes]]:
    for sample in webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False):
        yield sample["__key__"], sample[extension]


if __name__ == "__main__":
    main()
