"""`ldmscale latents`: encode shards of images into shards of latents. Finished shards are never made again."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldmscale.config import LatentsJob
from ldmscale.distributed.environment import Ranks
from ldmscale.distributed.stop import EXIT_STOPPED, StopFlag
from ldmscale.errors import DataError
from ldmscale.jobs.start import configured

if TYPE_CHECKING:
    from ldmscale.data.items import ImageItem
    from ldmscale.data.latents import LatentFormat
    from ldmscale.data.ledger import Ledger
    from ldmscale.data.samples import Sample, SampleReader
    from ldmscale.stages.first_stage import FirstStage

log = logging.getLogger(__name__)

FREE_FAULTS = 20  # samples of a shard that may be bad before their share counts


def main(overrides: Sequence[str]) -> int:
    """Encode as configured; see `cli` for the exit status."""
    config, ranks = configured(LatentsJob, overrides)
    with StopFlag().install() as stop:
        return _run(config, ranks, stop)


def _run(config: LatentsJob, ranks: Ranks, stop: StopFlag) -> int:
    from ldmscale.data.items import ImageItem
    from ldmscale.data.latents import finish_set, is_finished
    from ldmscale.data.ledger import Ledger
    from ldmscale.data.samples import SampleReader
    from ldmscale.distributed.collectives import from_main_rank
    from ldmscale.distributed.world import close_world, open_world
    from ldmscale.jobs.open_index import open_index
    from ldmscale.tracking.logs import set_up_logging

    world = open_world(ranks, timeout_minutes=24 * 60)  # ranks end hours apart on a large set
    folder = Path(config.latents.path)
    set_up_logging(folder, ranks)
    data = config.data
    index = open_index(data.shards, data, ranks)
    shards = index.shards
    assert data.image_size is not None
    first_stage, stored = _open(config, world.device, data.image_size)
    reader = SampleReader(index)
    read = ImageItem(
        data.image_size, 0, data.crop, False, data.max_pixels, data.caption, decoder=data.decoder
    )
    ledger = Ledger(folder / "data_ledger.jsonl", ranks.rank)
    names = [f"{number:05d}.tar" for number in range(len(shards))]
    for number in range(ranks.rank, len(shards), ranks.size):
        if stop.requested:
            break
        if is_finished(folder, names[number], stored):
            log.info("shard %d of %d is done already", number + 1, len(shards))
            continue
        _encode_shard(
            reader,
            number,
            folder / names[number],
            stored,
            read,
            first_stage,
            ledger,
            config,
        )
        log.info("shard %d of %d: %d samples", number + 1, len(shards), int(index.counts[number]))
    stopped = stop.agreed()
    if stopped:
        log.info(
            "stopped (%s); finished shards stay, the same command goes on", stop.reason or "another rank"
        )
    else:
        manifest = from_main_rank(lambda: finish_set(folder, names, stored))
        log.info(
            "%d latents in %s (%d samples could not be used); scale factor %.5f",
            manifest.samples, folder, manifest.skipped, manifest.scale_factor,
        )  # fmt: skip
    close_world()
    return EXIT_STOPPED if stopped else 0


def _open(config: LatentsJob, device: object, image_size: int) -> tuple[FirstStage, LatentFormat]:
    import torch

    from ldmscale.data.latents import LatentFormat
    from ldmscale.models.autoencoder import KLAutoencoder
    from ldmscale.parts import load
    from ldmscale.run_folder import is_foreign
    from ldmscale.stages.first_stage import FirstStage, digest
    from ldmscale.stages.latent_scale import LatentScale

    assert isinstance(device, torch.device)
    parts = load(config.first_stage.path, config.first_stage.average)
    foreign = is_foreign(Path(config.first_stage.path))  # finished as it is; the set itself is measured
    if parts.autoencoder is None or (parts.latent_statistics is None and not foreign):
        expected = (
            "has no autoencoder" if foreign else "is no finished autoencoder run: let it reach its last step"
        )
        raise DataError(f"first_stage.path={config.first_stage.path} {expected}")
    autoencoder = parts.autoencoder
    if image_size % autoencoder.downsampling:
        raise DataError(
            f"data.image_size={image_size} is no multiple of the autoencoder's factor {autoencoder.downsampling}"
        )
    side = image_size // autoencoder.downsampling
    stored = LatentFormat(
        digest(autoencoder),
        "moments" if isinstance(autoencoder, KLAutoencoder) else "latent",
        {"fp16": "float16", "fp32": "float32"}[config.latents.dtype],
        (autoencoder.latent_channels, side, side),
        {"size": image_size, "crop": config.data.crop},
    )
    channels = autoencoder.latent_channels
    unscaled = LatentScale(torch.zeros(channels), torch.ones(channels))  # moments are stored as they are
    return FirstStage(autoencoder, unscaled, device), stored


def _encode_shard(
    reader: SampleReader,
    number: int,
    path: Path,
    stored: LatentFormat,
    read: ImageItem,
    first_stage: FirstStage,
    ledger: Ledger,
    options: LatentsJob,
) -> None:
    """Encode one shard whole: it appears when its last sample is in it. What cannot be used goes to the ledger."""
    import numpy as np
    import torch

    from ldmscale.data.latents import LatentShardWriter

    count, batch = int(reader.index.counts[number]), options.latents.rank_batch
    with LatentShardWriter(path.parent, path.name, stored) as writer:

        def skip(key: str, error: DataError) -> None:
            writer.skipped += 1
            ledger.record(shard=reader.index.shards[number], key=key, reason=str(error), position=None)

        for start in range(0, count, batch):
            samples: list[tuple[Sample, dict[str, object], dict[str, object]]] = []
            for at in range(start, min(start + batch, count)):
                try:
                    sample = reader.read(number, at)
                    samples.append((sample, dict(read(sample, at)), _metadata(sample)))
                except DataError as error:
                    skip(f"sample {at}", error)
            if not samples:
                continue
            images = torch.from_numpy(np.stack([np.asarray(item["image"]) for _, item, _ in samples]))
            moments = first_stage.moments(images).cpu().numpy()
            for (sample, item, metadata), latent in zip(samples, moments, strict=True):
                try:
                    writer.write(sample.key, latent, str(item["caption"]), metadata)
                except DataError as error:
                    skip(sample.key, error)
        if writer.skipped > max(FREE_FAULTS, options.data.max_bad_share * count):
            raise DataError(
                f"{writer.skipped} of the {count} samples of {reader.index.shards[number]} cannot be used, more than "
                f"data.max_bad_share={options.data.max_bad_share}; data_ledger.jsonl in {path.parent} names them"
            )


def _metadata(sample: Sample) -> dict[str, object]:
    try:
        found = json.loads(sample.members.get("json", b"{}"))
    except ValueError as error:
        raise DataError(f"its json cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"its json is a {type(found).__name__}, expected an object")
    return found
