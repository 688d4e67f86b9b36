"""`ldmscale latents` beside its encoder alone: wall-clock, the same threads, interleaved rounds.

    python -m benchmarks.data_encoding [--rounds 5] [--samples 64] [--size 128] [--channels 64] [--workers 0 1] [--quick]

The job reads 320x288 JPEGs from tars, decodes, resizes, encodes and writes shards of moments in float32 to this disk. The
encoder alone gets the same images from memory and throws its moments away: as the job calls it (image by image, one thread
each), and in batches with PyTorch's own threads. Before any clock runs all give the same moments, to what batches change
in float32, and runs of the job the same bytes. Ratios are taken within a round, in alternating order; the median over
rounds is printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.data_streams import SHARDS, write_images
from ldmscale.data.latents.format import LatentFormat, read_latent
from ldmscale.data.latents.work_queue import Claims
from ldmscale.data.latents.writer import is_finished
from ldmscale.data.loading.skipped_samples import Ledger
from ldmscale.data.loading.transforms import ImageItem
from ldmscale.data.shards.index import ShardIndex
from ldmscale.data.shards.reader import SampleReader
from ldmscale.models.autoencoder import KLAutoencoder
from ldmscale.models.first_stage import LatentScale
from ldmscale.stages.first_stage import FirstStage
from ldmscale.stages.latents import Encoder, LatentsWork, make_shards

BATCH = 16


def job(index: ShardIndex, item: ImageItem, first_stage: FirstStage, out: Path, workers: int) -> LatentFormat:
    """One whole run of the job into an empty folder."""
    network = first_stage.autoencoder
    assert network is not None
    side = item.size // network.downsampling
    form = LatentFormat(
        "bench", "moments", "float32", (network.latent_channels, side, side), {"size": item.size}
    )
    sources = [{"name": url} for url in index.shards]
    ledger = Ledger(out / "data_ledger.jsonl")
    work = LatentsWork(
                reader=SampleReader(index), item=item, first_stage=first_stage, format=form, sources=sources,
                ledger=ledger, batch=BATCH, workers=workers,
            )  # fmt: skip
    names = [f"{number:05d}.tar" for number in range(len(sources))]
    assert make_shards(work, Claims(out, names, lambda n: is_finished(out, names[n], form)), lambda: False)
    return form


def check(out: Path, form: LatentFormat, alone: torch.Tensor) -> None:
    """What the job wrote is what the encoder makes alone."""
    written = ShardIndex.open(sorted(map(str, out.glob("*.tar"))), build_missing=True)
    reader, found = SampleReader(written), []
    for shard, count in enumerate(written.counts.tolist()):
        found += [read_latent(reader.read(shard, at).members, form) for at in range(count)]
    torch.testing.assert_close(torch.from_numpy(np.stack(found)), alone, rtol=1e-4, atol=1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=64, help="of the encoder; the published have 128")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a small network, one round: does it work?")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds, chosen.samples, chosen.size, chosen.channels = 1, 8, 64, 32
        chosen.workers = [0]
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    network = KLAutoencoder(
        latent_channels=4, channels=chosen.channels, channel_mult=(1, 2, 4, 4), blocks_per_level=2
    )
    first_stage = FirstStage(network, LatentScale(torch.zeros(4), torch.ones(4)), torch.device("cpu"))
    samples = max(1, chosen.samples // SHARDS) * SHARDS
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "images")
        source.mkdir()
        write_images(source, samples)
        index = ShardIndex.open(sorted(map(str, source.glob("*.tar"))), build_missing=True)
        item, reader = ImageItem(chosen.size, 0, caption_source="txt"), SampleReader(index)
        images = torch.from_numpy(
            np.stack(
                [
                    np.asarray(item(reader.read(shard, at), 0)["image"])
                    for shard, count in enumerate(index.counts.tolist())
                    for at in range(count)
                ]
            )
        )

        encoder = Encoder(first_stage, BATCH)

        def alone() -> torch.Tensor:
            return torch.cat([encoder(batch) for batch in torch.split(images, BATCH)])

        def batches() -> torch.Tensor:
            return torch.cat([first_stage.moments(batch) for batch in torch.split(images, BATCH)])

        runs = 0

        def run(workers: int) -> Path:
            nonlocal runs
            runs += 1
            out = Path(scratch, f"set_{runs}")
            check_form.append(job(index, item, first_stage, out, workers))
            return out

        check_form: list[LatentFormat] = []
        expected, kept = batches(), [run(workers) for workers in chosen.workers]
        check(kept[0], check_form[0], expected)
        check(kept[0], check_form[0], alone())
        for other in kept[1:]:
            for path in sorted(kept[0].glob("0*")):
                assert path.read_bytes() == (other / path.name).read_bytes(), path.name
        works: dict[str, Callable[[], object]] = {"encoder alone": alone, "encoder alone, batches": batches}
        for workers in chosen.workers:
            works[f"latents, {workers} workers"] = lambda workers=workers: run(workers)
        rates: dict[str, list[float]] = {each: [] for each in works}
        for number in range(chosen.rounds):
            for each in list(works) if number % 2 == 0 else reversed(list(works)):
                began = time.perf_counter()
                works[each]()
                rates[each].append(samples / (time.perf_counter() - began))
        print("| | samples/s | over the encoder alone |\n|---|---:|---:|")
        for each, found in rates.items():
            ratio = statistics.median(a / b for a, b in zip(found, rates["encoder alone"], strict=True))
            print(f"| {each} | {statistics.median(found):.2f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
