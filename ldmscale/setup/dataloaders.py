"""The data of a training run: its training samples, the images of previews, the held-out set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ldmscale.builders.feature_networks import open_features
from ldmscale.config import DiffusionJob, TrainingJob
from ldmscale.data.latents.format import LatentManifest, set_of
from ldmscale.data.loading.draws import BatchDraws
from ldmscale.data.loading.held_out import fixed_batches, rank_batches
from ldmscale.data.loading.loader import Batch, MakeItem
from ldmscale.data.loading.skipped_samples import Ledger
from ldmscale.data.loading.training_data import BadDataLimit, TrainingData
from ldmscale.data.loading.transforms import ImageItem, LatentItem
from ldmscale.data.shards.urls import expand, is_local
from ldmscale.diffusion.sample_latents import SamplerOptions
from ldmscale.errors import DataError
from ldmscale.setup.index import open_index, storage_of
from ldmscale.setup.node_checks import usable_workers
from ldmscale.setup.run import Run
from ldmscale.stages.first_stage import FirstStage
from ldmscale.stages.validation import FeatureNetwork, GenerationFigures, HeldOut
from ldmscale.storage.object_store import Storage, StoreError


def training_data(run: Run, config: TrainingJob, make_item: MakeItem, draws: BatchDraws) -> TrainingData:
    """The samples that the run trains on, with the random numbers that their training needs."""
    data = config.data
    return TrainingData(
        run.index,
        make_item,
        run.ranks,
        seed=config.seed,
        global_batch=config.train.global_batch,
        rank_micro_batch=config.train.rank_micro_batch,
        block_shards=data.shuffle_block_shards,
        workers=usable_workers(data.workers),
        pin_memory=run.device.type == "cuda",
        ledger=Ledger(run.folder.ledger, run.ranks.rank),
        limit=BadDataLimit(data.max_bad_share, data.max_bad_in_a_row),
        draws=draws,
    )


def preview_batch(run: Run, config: TrainingJob, make_item: MakeItem) -> Batch:
    """The fixed images of previews: of `preview_batches` those of the most frequent shape."""
    return max(preview_batches(run, config, make_item), key=lambda batch: len(batch["key"]))


def preview_batches(run: Run, config: TrainingJob, make_item: MakeItem) -> list[Batch]:
    """The fixed samples of previews, a batch of each shape, the same on every rank: from the held-out shards, else from the
    training shards.
    """
    index = run.index
    if config.data.heldout_shards is not None:
        index = open_index(config.data.heldout_shards, config.data, run.ranks)
    count = min(config.preview.images, index.total)
    return fixed_batches(index, make_item, count, size=count)


def held_out(run: Run, config: DiffusionJob, make_item: MakeItem) -> HeldOut | None:
    """This rank's share of the samples that the validation loss is measured on; None where it is not asked for."""
    chosen = config.validation
    if not chosen.every_steps:
        return None
    batches, samples = _held_out_batches(
        run, config, make_item, chosen.samples, config.train.rank_micro_batch
    )
    return HeldOut(batches, samples, chosen.timestep_bins)


def generation_figures(
    run: Run, config: DiffusionJob, make_item: MakeItem, first_stage: FirstStage
) -> GenerationFigures | None:
    """What the figures of drawn images need on this rank; None where they are not asked for. Collective."""
    chosen = config.generation
    if not chosen.every_steps:
        return None
    network = open_features(
        chosen.features, chosen.features_weights, chosen.features_weights_sha256, run.device,
        key="generation.features",
    )  # fmt: skip
    assert network is not None
    run.note("generation_features", {"name": chosen.features, "sha256": network.sha256})
    batches, samples = _held_out_batches(run, config, make_item, chosen.samples, chosen.rank_batch)
    if samples < 2:  # now, and not at the first measurement
        raise DataError(
            f"data.heldout_shards={config.data.heldout_shards} holds {samples} samples, and {network.distance} needs two, for a "
            "covariance: give more, or generation.every_steps=0", shared=True,
        )  # fmt: skip
    sampler = SamplerOptions(chosen.sampler_steps, chosen.guidance, prediction=config.diffusion.prediction)
    named = FeatureNetwork(network.distance, network.width, network)
    return GenerationFigures(batches, samples, named, sampler, chosen.seed, first_stage)


def _held_out_batches(
    run: Run, config: DiffusionJob, make_item: MakeItem, wanted: int, size: int
) -> tuple[list[Batch], int]:
    """This rank's micro-batches of at most `size`, as many as every rank has, and how many of their positions count."""
    data, patterns = config.data, config.data.heldout_shards
    assert patterns is not None
    shard = expand(patterns, allow_pipe=data.allow_pipe, storage=storage_of(data))[0]
    if isinstance(make_item, LatentItem):
        make_item = _held_out_item(config, shard, make_item)
        if isinstance(make_item, ImageItem):
            data = replace(data, kind="images")
    if isinstance(make_item, ImageItem) and make_item.shapes:
        index = open_index(patterns, data, run.ranks, make_item.shapes)
    else:
        index = open_index(patterns, data, run.ranks)
    samples = min(wanted, index.total)
    batches = rank_batches(index, make_item, samples, size, rank=run.ranks.rank, world=run.ranks.size)
    return batches, samples


def _held_out_item(config: DiffusionJob, shard: str, make_item: LatentItem) -> LatentItem | ImageItem:
    """A run on latents may be measured on held-out images, too, which are then encoded as the latents were.

    Raises DataError where it has no autoencoder to encode them, and for latents that were made in another way.
    """
    manifest = _manifest_of(shard, storage_of(config.data))
    if manifest is not None:
        if not manifest.format.mixes_with(make_item.format):
            raise DataError(
                f"data.heldout_shards: the latents of {shard} are {manifest.format}, those of data.shards {make_item.format}: "
                "give held-out latents that the same autoencoder made in the same way"
            )
        return make_item
    if config.first_stage.path is None:
        raise DataError(
            f"data.heldout_shards: {shard} holds no latents (there is no manifest.json beside it), and without "
            "first_stage.path images cannot be encoded: give shards of latents, or the autoencoder"
        )
    factor, form = config.autoencoder.factor, make_item.format
    return ImageItem(
        form.shape[1] * factor,
        seed=0,
        shapes=tuple((width * factor, height * factor) for _, height, width in form.shapes),
        max_pixels=config.data.max_pixels,
        caption_source=make_item.caption_source,
        tokenizer=make_item.tokenizer,
        decoder=config.data.decoder,
        labels=make_item.labels,
    )


def _manifest_of(shard: str, storage: Storage) -> LatentManifest | None:
    """The manifest in the folder of a shard; None where there is none, and the shard holds images."""
    folder = set_of(shard)[0]
    if is_local(folder) and not (Path(folder) / "manifest.json").is_file():
        return None
    try:
        return LatentManifest.load(folder, storage)
    except StoreError:
        raise
    except DataError:
        if is_local(folder):
            raise  # damaged
        return None
