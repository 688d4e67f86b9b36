"""Opening the frozen first stage of a diffusion run, and the conditions of its previews."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ldmscale.builders.networks import build_first_stage
from ldmscale.checkpoint.run_folder import is_foreign
from ldmscale.config import DiffusionJob, FirstStageConfig
from ldmscale.config.inherit import size_warning
from ldmscale.config.typed import differences, plain_part
from ldmscale.data.latents.format import LatentFormat, LatentManifest, LatentShape, set_of
from ldmscale.errors import DataError
from ldmscale.inference.load import load
from ldmscale.inference.parts import Parts
from ldmscale.models.first_stage import LatentScale
from ldmscale.setup.foreign_models import FREE
from ldmscale.setup.index import shapes_of, storage_of
from ldmscale.setup.run import Run
from ldmscale.stages.first_stage import FirstStage
from ldmscale.storage.object_store import Storage

log = logging.getLogger(__name__)
_T = TypeVar("_T")


def open_first_stage(
    config: DiffusionJob, run: Run
) -> tuple[FirstStage, tuple[LatentShape, ...], LatentFormat | None]:
    """The autoencoder (None where latents are trained on without pictures), the latents' shape in each aspect-ratio bucket
    (one without buckets), and their stored format.

    Raises DataError for latents that another autoencoder made, for an autoencoder of another format that is not the one
    that `config` describes, and where no scale of its latents is known.
    """
    chosen = config.first_stage
    parts = Parts()
    if (differs := size_warning(config)) and run.ranks.is_main:
        log.warning("%s", differs)
    if config.autoencoder.kind != "pixels" and chosen.path is not None:
        if is_foreign(Path(chosen.path)):
            _check_foreign(Path(chosen.path), config)
        parts = load(chosen.path, chosen.average)
    manifest = _manifest(run.shards, storage_of(config.data)) if config.data.kind == "latents" else None
    if config.autoencoder.kind == "pixels":
        parts = Parts(autoencoder=build_first_stage(config.autoencoder))
        # Images lie in [-1, 1] already.
        width = config.autoencoder.latent_width
        scale = LatentScale(torch.zeros(width), torch.ones(width))
    else:
        scale = scale_of(chosen, config.autoencoder.latent_width, parts, manifest)
    if manifest is not None:
        shapes = tuple(manifest.format.shape_of(bucket) for bucket in range(manifest.format.buckets))
        _check_halving(config, shapes)
    else:
        assert config.data.image_size is not None
        factor, channels = config.autoencoder.factor, config.autoencoder.latent_width
        sizes = shapes_of(config.data) or ((config.data.image_size, config.data.image_size),)
        shapes = tuple((channels, height // factor, width // factor) for width, height in sizes)
    first_stage = FirstStage(parts.autoencoder, scale, run.device)
    if manifest is not None and config.data.flip and not manifest.format.flips:
        raise DataError(
            f"data.flip=true, but the latents of {run.shards[0]} were made without the mirrored images: give data.flip=false, "
            "or make them anew with latents.flips=true"
        )
    if manifest is not None and first_stage.digest is not None:
        manifest.check_autoencoder(first_stage.digest, run.shards[0])
    return first_stage, shapes, manifest.format if manifest else None


def _check_halving(config: DiffusionJob, shapes: Sequence[LatentShape]) -> None:
    """Raises DataError where the sides of latents do not halve evenly through the U-Net."""
    whole = 2 ** (len(config.unet.channel_mult) - 1)
    for shape in shapes:
        if shape[1] % whole or shape[2] % whole:
            raise DataError(
                f"latents of height {shape[1]} and width {shape[2]} do not halve evenly through the U-Net of "
                f"{len(config.unet.channel_mult)} levels: make them of images whose sides are multiples of "
                f"{whole * config.autoencoder.factor} "
                "(data.bucket_step, data.image_size), or give another unet.channel_mult"
            )


def scale_of(
    chosen: FirstStageConfig, channels: int, parts: Parts, manifest: LatentManifest | None
) -> LatentScale:
    """The scale of latents: the given factor; else the autoencoder's own; else as the set of latents was measured.

    The autoencoder's own goes before the set's, so that precomputed latents and online encoding see the same. That of a run
    was measured at its end; that of a model of another format is the factor that it came with.

    Raises DataError where none is known.
    """
    if chosen.fixed_factor is not None:
        return LatentScale(torch.zeros(channels), torch.full((channels,), chosen.fixed_factor))
    if parts.latent_statistics is not None:
        return LatentScale.of(parts.latent_statistics, chosen.scale)
    if parts.scale is not None and chosen.scale == "factor":
        log.info("latents are multiplied by %.6g, as %s says", float(parts.scale.factor[0]), chosen.path)
        return parts.scale
    if manifest is not None:
        measured = {
            "channel_mean": list(manifest.channel_mean),
            "channel_std": list(manifest.channel_std),
            "factor": manifest.scale_factor,
        }
        return LatentScale.of(measured, chosen.scale)
    raise DataError(
        f"first_stage.path={chosen.path} has no measured scale of its latents: let the run of an autoencoder reach its last "
        "step; of a model of another format give first_stage.fixed_factor=N, or train on latents, which are measured"
    )


def _check_foreign(path: Path, config: DiffusionJob) -> None:
    """A run's autoencoder is compared before anything starts; that of another format is known when it is opened."""
    from ldmscale.interop.reading import read

    found = read(path).autoencoder
    if found is None:
        raise DataError(f"first_stage.path={path} has no autoencoder: give a model that has one, or a run")
    other = differences(plain_part(found), plain_part(config.autoencoder))
    if faults := [
        f"autoencoder.{key}={here!r}, but that of {path} has {there!r}: give the autoencoder= that it is of"
        for key, (there, here) in other.items()
        if key not in FREE
    ]:
        raise DataError(faults)


def _manifest(shards: list[str], storage: Storage) -> LatentManifest:
    folders = sorted({set_of(shard)[0] for shard in shards})
    manifests = [LatentManifest.load(folder, storage) for folder in folders]
    listed = {
        (folder, name) for folder, found in zip(folders, manifests, strict=True) for name in found.shards
    }
    if unlisted := [shard for shard in shards if set_of(shard) not in listed]:
        raise DataError(
            f"{unlisted[0]} is not in the manifest.json beside it ({len(unlisted)} such shards): it is of another set; "
            "give the shards that the manifest lists, or move the others away"
        )
    for folder, manifest in zip(folders[1:], manifests[1:], strict=True):
        if not manifest.format.mixes_with(manifests[0].format):
            raise DataError(
                f"the latents in {folder} are {manifest.format}, those in {folders[0]} {manifests[0].format}: "
                "train on sets that one autoencoder made in one way"
            )
    return manifests[0]
